"""The neuron's family: its members on every backend, learned thresholds and decay, and what the definition implies."""

import itertools

import pytest
import torch
from cases import Case, assert_close_grads, assert_same_outputs, run

import multifire as mf
from multifire import ops
from multifire.config import neurons
from multifire.nn import ILIF, MLF, MSF, Ternary

MEMBERS = [
    {"membranes": membranes, "reset": reset, "signed": signed}
    for membranes, reset in (("own", "zero"), ("own", "subtract"), ("shared", "any"), ("shared", "subtract"))
    for signed in (False, True)
]
"""All that exist; the first is the MLF neuron."""
SURROGATES = ["rect", "triangle", "atan", "sigmoid", "gaussian"]


def name_of(member: dict) -> str:
    return f"{member['membranes']}-{member['reset']}{'-signed' * member['signed']}"


def assert_equals_reference(case: Case, backend: str) -> None:
    got, want = run(case, backend), run(case, "reference")
    assert_same_outputs(got, want)
    assert_close_grads(got, want)


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("levels", [1, 2, 3, 5])
@pytest.mark.parametrize("member", MEMBERS, ids=name_of)
def test_members_equal_the_reference(backend, member, levels, learned):
    for layout, training in (("last", True), ("contiguous", False)):
        options = {"layout": layout, "training": training, "add_before": True, "add_after": True, "state": True}
        assert_equals_reference(Case(5, 17, levels, learned=learned, **options, **member), backend)


@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("detach_reset", [False, True])
@pytest.mark.parametrize("member", MEMBERS, ids=name_of)
def test_surrogates_equal_the_reference(backend, member, detach_reset, surrogate):
    for levels, learned in itertools.product((1, 3), (False, True)):
        options = {"surrogate": surrogate, "detach_reset": detach_reset, "state": True, "learned": learned}
        assert_equals_reference(Case(4, 3, levels, **options, **member), backend)


@pytest.mark.parametrize("member", MEMBERS, ids=name_of)
def test_static_input_and_unusual_sizes_equal_the_reference(backend, member):
    for case in (
        Case(4, 17, static=True, state=True, add_before=True, learned=True, **member),
        Case(7, 1, 8, size=(3, 1, 1), learned=True, **member),
        Case(1, 100, 2, layout="strided", size=(1, 33, 1), learned=True, **member),
        Case(40, 5, 3, layout="contiguous", size=(1, 3, 11), learned=True, affine=False, **member),
    ):
        assert_equals_reference(case, backend)


@pytest.mark.parametrize("member", MEMBERS, ids=name_of)
def test_bf16_equals_the_reference(backend, member):
    case = Case(4, 64, add_after=True, add_before=True, learned=True, dtype=torch.bfloat16, **member)
    got, want = run(case, backend), run(case, "reference")
    assert (got.outputs["out"] != want.outputs["out"]).float().mean() <= 1e-4
    assert_close_grads(got, want, rtol=2e-2)


@pytest.mark.parametrize("needed", ["thresholds", "decay"])
@pytest.mark.parametrize("member", [MEMBERS[0], MEMBERS[-1]], ids=name_of)
def test_one_learned_number_may_need_a_gradient_alone(backend, member, needed):
    torch.manual_seed(0)
    x = torch.randn(4, 200)
    grads = []
    for name in (backend, "reference"):
        learned = torch.tensor([0.5, 1.5]) if needed == "thresholds" else torch.tensor(0.25)
        learned.requires_grad_()
        out, _ = ops.mlf(x, (0.5, 1.5), 0.25, **{f"learned_{needed}": learned}, **member, backend=name)
        out.sum().backward()
        grads.append(learned.grad)
    assert grads[1].abs().min() > 0
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


def test_same_call_gives_the_same_gradients_of_learned_numbers(backend):
    case = Case(4, 17, size=(3, 40, 40), learned=True, state=True)
    first, second = run(case, backend), run(case, backend)
    for name in ("learned_thresholds", "learned_decay"):
        assert torch.equal(first.grads[name], second.grads[name])


@pytest.mark.parametrize("detach_reset", [False, True])
@pytest.mark.parametrize("member", MEMBERS, ids=name_of)
def test_learned_numbers_change_no_spike(backend, member, detach_reset):
    case = Case(5, 17, state=True, detach_reset=detach_reset, **member)
    constant, learned = (run(Case(**{**vars(case), "learned": value}), backend) for value in (False, True))
    assert_same_outputs(constant, learned)
    learned.grads.pop("learned_thresholds"), learned.grads.pop("learned_decay")
    assert_close_grads(learned, constant)


@pytest.mark.parametrize("member", MEMBERS, ids=name_of)
@pytest.mark.parametrize("detach_reset", [False, True])
@pytest.mark.parametrize("surrogate", ["sigmoid", "rect"])
def test_gradient_equals_the_recursion_of_the_definition(member, detach_reset, surrogate):
    """The recursions of docs/neurons.md, one neuron at a time."""
    torch.manual_seed(0)
    thresholds, decay, shape = (0.5, 1.25, 2.0), 0.5, (6, 40)
    x = torch.randn(shape, dtype=torch.float64).mul(1.5).requires_grad_()
    theta = torch.tensor(thresholds, dtype=torch.float64, requires_grad=True)
    beta = torch.tensor(decay, dtype=torch.float64, requires_grad=True)
    g = torch.randn(shape, dtype=torch.float64)
    learned = {"learned_thresholds": theta, "learned_decay": beta}
    out, _ = ops.mlf(x, thresholds, decay, surrogate=surrogate, detach_reset=detach_reset, **learned, **member)
    out.backward(g)
    grad_x, grad_theta, grad_beta = torch.zeros(shape, dtype=torch.float64), [0.0] * 3, 0.0
    for neuron in range(shape[1]):
        found = gradients_of_neuron(x[:, neuron].tolist(), g[:, neuron].tolist(), thresholds, decay, surrogate,
                                    detach_reset, **member)  # fmt: skip
        grad_x[:, neuron] = torch.tensor(found[0], dtype=torch.float64)
        grad_theta = [a + b for a, b in zip(grad_theta, found[1], strict=True)]
        grad_beta += found[2]
    torch.testing.assert_close(x.grad, grad_x, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(theta.grad, torch.tensor(grad_theta, dtype=torch.float64), rtol=1e-11, atol=1e-11)
    assert beta.grad.item() == pytest.approx(grad_beta, rel=1e-11)


def gradients_of_neuron(x, g, thresholds, decay, surrogate, detach_reset, membranes, reset, signed):
    """Return ∂L/∂x, ∂L/∂θ and ∂L/∂decay of one neuron, computed number by number."""

    def h(v):
        return ops.surrogates.SURROGATES[surrogate](torch.tensor(v, dtype=torch.float64), 1.0).item()

    shared, steps = membranes == "shared", len(x)
    groups = [range(len(thresholds))] if shared else [[k] for k in range(len(thresholds))]
    grad_x, grad_theta, grad_decay = [0.0] * steps, [0.0] * len(thresholds), 0.0
    for group in groups:
        u, kept, carry = [], [], 0.0
        for t in range(steps):
            u.append(decay * carry + x[t])
            spikes = [(u[t] > thresholds[k]) - (signed and -u[t] > thresholds[k]) for k in group]
            if reset == "subtract":
                carry = u[t] - sum(s * (1 if shared else thresholds[k]) for s, k in zip(spikes, group, strict=True))
            else:
                carry = 0.0 if any(spikes) else u[t]
            kept.append(carry)
        delta = 0.0
        for t in reversed(range(steps)):
            c = decay * delta
            grad_decay += delta * kept[t]
            spiked = any((u[t] > thresholds[k]) or (signed and -u[t] > thresholds[k]) for k in group)
            delta = c if reset == "subtract" or not spiked else 0.0
            for k in group:
                up, down = h(u[t] - thresholds[k]), h(-u[t] - thresholds[k]) if signed else 0.0
                price = 1.0 if shared else thresholds[k]
                up_pull = down_pull = g[t]
                if not detach_reset and reset == "subtract":
                    up_pull = down_pull = g[t] - price * c
                elif not detach_reset and k == group[0]:
                    up_pull, down_pull = g[t] - u[t] * c, g[t] + u[t] * c
                delta += up * up_pull + down * down_pull
                grad_theta[k] -= up * up_pull - down * down_pull
                if reset == "subtract" and not shared:
                    grad_theta[k] -= c * ((u[t] > thresholds[k]) - (signed and -u[t] > thresholds[k]))
            grad_x[t] += delta
    return grad_x, grad_theta, grad_decay


@pytest.mark.parametrize("member", MEMBERS, ids=name_of)
def test_finite_differences_confirm_the_gradients_where_no_spike_flips(member):
    """Spikes are steps, so the loss is of what membranes keep; the surrogate's windows are empty at these membranes."""
    torch.manual_seed(0)
    thresholds, width = (0.5, 1.5), 1e-6
    x = torch.randn(5, 300, dtype=torch.float64) * 1.5
    weights = torch.rand(1 if member["membranes"] == "shared" else 2, 300, dtype=torch.float64)

    def call(theta, beta):
        learned = {"learned_thresholds": theta, "learned_decay": beta}
        out, state = ops.mlf(x, thresholds, 0.5, width=width, **learned, **member)
        return out, (state.square() * weights).sum()

    theta = torch.tensor(thresholds, dtype=torch.float64, requires_grad=True)
    beta = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    spikes, loss = call(theta, beta)
    loss.backward()
    step = 1e-7
    for parameter, index in ((theta, 0), (theta, 1), (beta, ())):
        losses = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter[index] += sign * step
                moved, value = call(theta, beta)
                parameter[index] -= sign * step
            assert torch.equal(moved, spikes)
            losses.append(value.item())
        difference = (losses[0] - losses[1]) / (2 * step)
        assert parameter.grad[index].item() == pytest.approx(difference, rel=1e-5, abs=1e-5)
    has_gradient = member["reset"] == "subtract" and member["membranes"] == "own"
    assert (theta.grad.abs().min() > 0) == has_gradient
    assert beta.grad.abs() > 0


@pytest.mark.parametrize("member", MEMBERS, ids=name_of)
def test_finite_differences_confirm_the_gradients_of_soft_spikes(monkeypatch, member):
    """With σ(4v) as a spike, whose derivative is the surrogate "sigmoid", the loss has a derivative everywhere."""

    class SoftFire:
        @staticmethod
        def apply(v, surrogate, width):
            return torch.sigmoid(4 * v / width)

    torch.manual_seed(0)
    x, theta, beta, state = (
        value.double().requires_grad_()
        for value in (torch.randn(3, 4), torch.tensor([0.5, 1.5]), torch.tensor(0.5), torch.randn(2, 4))
    )
    state = state[:1] if member["membranes"] == "shared" else state
    monkeypatch.setattr(ops.reference, "Fire", SoftFire)

    def call(x, theta, beta, state):
        learned = {"learned_thresholds": theta, "learned_decay": beta}
        return ops.mlf(x, (0.5, 1.5), 0.5, state=state, **learned, **member, backend="reference")

    assert torch.autograd.gradcheck(call, (x, theta, beta, state.detach().requires_grad_()))


def test_surrogate_of_a_sigmoid_is_its_derivative():
    v = torch.linspace(-3, 3, 101, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(torch.sigmoid(4 * v / 0.75).sum(), v)
    torch.testing.assert_close(ops.surrogates.sigmoid(v.detach(), 0.75), slope)


def test_mlf_is_k_ordinary_neurons(backend):
    """K membranes of their own are exactly K neurons of one level with the same input: so MLF runs on binary chips."""
    torch.manual_seed(0)
    x, thresholds = torch.randn(10, 500) * 2, (0.6, 1.6, 2.6)
    together, state = ops.mlf(x, thresholds, 0.25, backend=backend)
    separate = [ops.mlf(x, (threshold,), 0.25, backend=backend) for threshold in thresholds]
    assert torch.equal(together, sum(out for out, _ in separate))
    assert torch.equal(state, torch.cat([last for _, last in separate]))
    assert all(out.unique().tolist() == [0, 1] for out, _ in separate)


@pytest.mark.parametrize("levels", [1, 3, 8])
def test_integer_neuron_of_one_step_rounds(backend, levels):
    """o = round(clip(u, 0, K)), except at ties, where torch rounds to even and the neuron does not fire."""
    torch.manual_seed(0)
    x = torch.rand(1, 4000) * (levels + 3) - 1.5
    out = ILIF(levels, backend=backend)(x)
    assert torch.equal(out, x.clamp(0, levels).round())
    ties = torch.arange(levels).float()[None] + 0.5
    assert ILIF(levels, backend=backend)(ties).tolist() == [list(range(levels))]


def test_integer_neuron_over_time_is_the_published_one(backend):
    torch.manual_seed(0)
    x, u = torch.randn(8, 300) * 2, torch.zeros(300)
    out, previous = ILIF(4, 0.5, backend=backend)(x), torch.zeros(300)
    for t in range(8):
        u = 0.5 * (u - previous) + x[t]
        previous = u.clamp(0, 4).round()
        assert torch.equal(out[t], previous)


def test_msf_neuron_is_the_published_one_except_at_ties(backend):
    torch.manual_seed(0)
    x, u, out = torch.randn(8, 300) * 2, torch.zeros(300), torch.zeros(300)
    got = MSF((0.6, 1.6, 2.6), 0.25, backend=backend)(x)
    for t in range(8):
        u = 0.25 * u * (out == 0) + x[t]
        out = sum((u > theta).float() for theta in (0.6, 1.6, 2.6))
        assert torch.equal(got[t], out)


def test_ternary_neuron_is_the_published_one_except_at_ties(backend):
    torch.manual_seed(0)
    x, u, out = torch.randn(8, 300), torch.zeros(300), torch.zeros(300)
    got = Ternary(backend=backend)(x)
    for t in range(8):
        u = 0.25 * u * (1 - out.abs()) + x[t]
        out = u.sign() * (u.abs() > 0.5)
        assert torch.equal(got[t], out)
    assert got.unique().tolist() == [-1, 0, 1]


@pytest.mark.parametrize("make", [MSF, ILIF, Ternary, lambda **o: MLF(reset="subtract", learn_decay=True, **o)])
def test_steps_equal_one_call(backend, make):
    torch.manual_seed(0)
    neuron, x = make(backend=backend), torch.randn(7, 2, 3) * 2
    state, outs = None, []
    for frame in x:
        out, state = neuron.step(frame, state)
        outs.append(out)
    assert torch.equal(torch.stack(outs), neuron(x))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: ops.mlf(x, reset="any"), "reset='any' is for membranes='shared'.*take reset='zero'"),
        (lambda x: ops.mlf(x, membranes="shared"), "reset='zero' is for membranes='own'.*take reset='any'"),
        (lambda x: ops.mlf(x, membranes="common"), "unknown membranes 'common'.*own, shared"),
        (lambda x: ops.mlf(x, reset="subtracted"), "unknown reset 'subtracted'; did you mean subtract"),
        (lambda x: MSF((1.0, 0.5)), "expected ascending ones where levels share a membrane"),
        (lambda x: MLF((-0.5, 0.5), signed=True), "expected none below 0 for signed levels"),
        (lambda x: MLF((1.0, 0.5), learn_thresholds=True), "expected ascending ones above 0 with learn_thresholds"),
        (lambda x: MLF((0.0, 0.5), learn_thresholds=True), "expected ascending ones above 0 with learn_thresholds"),
        (lambda x: MLF(decay=1.0, learn_decay=True), "expected 0 < decay < 1 with learn_decay"),
        (lambda x: MLF(torch.ones(2)), "thresholds is a tensor.*learn_thresholds=True"),
        (lambda x: MLF((0.5, torch.tensor(1.0))), "thresholds is a tensor.*learn_thresholds=True"),
        (lambda x: MLF(decay=torch.tensor(0.5)), "decay is a tensor.*learn_decay=True"),
        (lambda x: ops.mlf(x, (0.5,), learned_thresholds=torch.ones(2)), r"shape \(2,\).*expected \(1,\)"),
        (lambda x: ops.mlf(x, learned_decay=torch.ones(1)), r"learned_decay has shape \(1,\).*expected \(\)"),
        (lambda x: ops.mlf(x, membranes="shared", reset="any", state=torch.ones(3, 4)), r"expected \(1, 4\)"),
    ],
)
def test_wrong_options_are_refused_in_a_sentence(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(2, 4))


@pytest.mark.parametrize("op", ["mlf", "tdbn_mlf"])
@pytest.mark.parametrize("argument", ["thresholds", "decay"])
def test_tensor_where_a_number_is_expected_is_refused(op, argument):
    """It would be detached, and never learn."""
    x = torch.zeros(2, 1, 3, 4, 4)
    value = torch.nn.Parameter(torch.tensor([0.6]) if argument == "thresholds" else torch.tensor(0.25))
    rest = () if op == "mlf" else (None, None, torch.zeros(3), torch.ones(3))
    options = {} if op == "mlf" else {"training": True}
    for backend in ("auto", "cpu", "reference"):
        with pytest.raises(ValueError, match=f"{argument} is a tensor, expected.*learn_{argument}=True"):
            getattr(ops, op)(x, *rest, **options, **{argument: value}, backend=backend)


def test_learned_numbers_start_at_the_given_ones_and_stay_in_order():
    neuron = MLF((0.6, 1.6, 2.6), 0.25, learn_thresholds=True, learn_decay=True)
    assert neuron.thresholds == pytest.approx((0.6, 1.6, 2.6), rel=1e-6)
    assert neuron.decay == pytest.approx(0.25, rel=1e-6)
    assert [p.shape for p in neuron.parameters()] == [(3,), ()]
    with torch.no_grad():
        for parameter in neuron.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 20)
    first, second, third = neuron.thresholds
    assert 0 < first < second < third
    assert 0 <= neuron.decay <= 1


def test_learned_numbers_learn_what_another_neuron_does():
    """A neuron finds the thresholds and the decay of the one that it imitates."""
    torch.manual_seed(0)
    x = torch.rand(6, 4000) * 2 - 0.3
    teacher = MLF((0.7, 1.4), 0.5)(x)
    neuron = MLF((0.5, 1.0), 0.2, learn_thresholds=True, learn_decay=True, surrogate="triangle", width=0.5)
    optimizer = torch.optim.Adam(neuron.parameters(), 0.02)
    losses = []
    for _ in range(150):
        loss = (neuron(x) - teacher).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 10
    assert neuron.thresholds == pytest.approx((0.7, 1.4), abs=0.05)
    assert neuron.decay == pytest.approx(0.5, abs=0.1)


@pytest.fixture
def registered(monkeypatch):
    """Register a surrogate for one test."""
    monkeypatch.setattr(neurons, "_registered", [])
    monkeypatch.setattr(ops.surrogates, "SURROGATES", dict(ops.surrogates.SURROGATES))
    monkeypatch.setattr(ops, "_announced_surrogates", set())

    @mf.register_surrogate("like-sigmoid")
    def like_sigmoid(v, width):
        return torch.sigmoid(4 * v / width) * torch.sigmoid(-4 * v / width) * 4 / width

    return "like-sigmoid"


def test_registered_surrogate_trains_and_the_log_says_once_that_it_is_slow(registered, caplog):
    torch.manual_seed(0)
    grads = []
    for surrogate in (registered, registered, "sigmoid"):
        x = torch.randn(4, 100, generator=torch.Generator().manual_seed(0)).requires_grad_()
        neuron = MLF(surrogate=surrogate, learn_thresholds=True)
        neuron(x).sum().backward()
        grads.append((x.grad, neuron.raw_thresholds.grad))
    for mine, built_in in zip(grads[0], grads[2], strict=True):
        torch.testing.assert_close(mine, built_in, rtol=1e-4, atol=1e-5)
    assert sum("takes" in message or "slow path" in message for message in caplog.messages) == 1


@pytest.mark.slow
def test_large_layers_with_a_registered_surrogate_are_compiled(registered, monkeypatch):
    """The reference of the same call gives the same spikes, to the last bit."""
    assert not ops.compiled._compile_failed
    x = torch.randn(4, 2, 64, 32, 32, generator=torch.Generator().manual_seed(0))
    results = []
    for smallest in (0, 1 << 40):
        monkeypatch.setattr(ops.compiled, "MIN_VALUES", smallest)
        leaf, neuron = x.clone().requires_grad_(), MLF(surrogate=registered, learn_decay=True)
        out = neuron(leaf)
        out.square().sum().backward()
        results.append((out, leaf.grad, neuron.raw_decay.grad))
    assert not ops.compiled._compile_failed
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(results[0][2], results[1][2], rtol=1e-4, atol=1e-2)


def test_machine_without_a_compiler_computes_a_registered_surrogate(registered, monkeypatch, caplog):
    def fails():
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(ops.compiled, "_compile_failed", False)
    monkeypatch.setattr(ops.compiled, "_compiled", fails)
    monkeypatch.setattr(ops.compiled, "MIN_VALUES", 0)
    x = torch.randn(3, 5)
    for _ in range(2):
        assert torch.equal(ops.mlf(x, surrogate=registered)[0], ops.mlf(x)[0])
    assert [m for m in caplog.messages if "torch.compile failed" in m] == [
        "torch.compile failed, neurons are computed without it: no C++ compiler"
    ]


def test_registered_surrogate_runs_on_the_reference_alone(registered):
    with pytest.raises(ValueError, match="backend 'cpu' cannot run here: surrogate 'like-sigmoid' is a registered"):
        ops.mlf(torch.zeros(2, 3), surrogate=registered, backend="cpu")


def test_existing_surrogate_cannot_be_registered_again(registered):
    for name in ("rect", registered):
        with pytest.raises(ValueError, match=f"a surrogate '{name}' exists already"):
            mf.register_surrogate(name)(lambda v, width: v)


def test_surrogate_that_returns_another_shape_is_refused(registered):
    mf.register_surrogate("sums")(lambda v, width: v.sum())
    x = torch.randn(2, 3, requires_grad=True)
    with pytest.raises(ValueError, match=r"surrogate 'sums' returned shape \(\), expected a tensor of v's shape"):
        MLF(surrogate="sums")(x).sum().backward()


@pytest.mark.parametrize("kind", ["half", "bfloat16"])
def test_network_in_half_precision_says_which_precision_to_take(kind):
    network = getattr(mf.build_model("ds_resnet8", width=8), kind)()
    x = getattr(torch.randn(2, 2, 3, 16, 16), kind)()
    with pytest.raises(ValueError, match=r"torch.autocast .*--precision bf16"):
        network(x)
