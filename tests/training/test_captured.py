"""Check that a captured training step computes what an eager one does, and does nothing that a CUDA graph cannot do.

Without a GPU the captured step is called as an ordinary function of its fixed tensors; the tests that need a graph run
on a GPU.
"""

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from multifire.config import RunConfig, TrainOptions, get_recipe
from multifire.nn import model_from_config
from multifire.training.average import MovingAverage
from multifire.training.captured import TrainingStep, logits_function, why_not_captured
from multifire.training.checkpoint import load_checkpoint
from multifire.training.distributed import ALONE, Processes
from multifire.training.loop import train
from multifire.training.optim import SGD, parameter_groups
from multifire.training.signals import Interrupted
from multifire.utils.cuda_graph import WARM_UP_CALLS, CapturedFunction
from tests.test_train import TINY, override, stop_after

DIGITS = get_recipe("digits")
SMALL = replace(DIGITS, model=replace(DIGITS.model, width=4))
CASES: dict[str, RunConfig] = {
    "static images": SMALL,
    "events": override(SMALL, data={"name": "digits-dvs"}, model={"in_channels": 2, "norm_input": True}),
    "TET, label smoothing and moving average": override(
        SMALL, optim={"loss": "tet", "label_smoothing": 0.2, "ema_decay": 0.8}
    ),
    "accumulation and clipping": override(SMALL, optim={"accumulate": 3, "clip_norm": 0.1}),
    "checkpointed stages": override(SMALL, model={"checkpoint_stages": True}),
    "plain blocks": override(SMALL, model={"name": "plain_resnet8"}),
    "bf16": replace(SMALL, precision="bf16"),
}
STEPS = WARM_UP_CALLS + 4
SAMPLES = 6
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]


def batches(cfg: RunConfig, device: str) -> list[tuple[Tensor, Tensor]]:
    """Return random batches, the last of which is smaller."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for step in range(STEPS):
        samples = SAMPLES if step < STEPS - 1 else SAMPLES - 2
        shape = (cfg.data.timesteps, samples, cfg.model.in_channels, 12, 12)
        if cfg.data.name == "digits":
            x_TNCHW = torch.randn(shape[1:], generator=generator).to(device).expand(shape)
        else:
            x_TNCHW = torch.rand(shape, generator=generator).lt(0.1).float().to(device)
        found.append((x_TNCHW, torch.randint(10, (samples,), generator=generator).to(device)))
    return found


class Trained:
    """A network after some steps, and the figures of each step."""

    def __init__(self, cfg: RunConfig, captured: bool, device: str = "cpu"):
        torch.manual_seed(0)
        self.model = model_from_config(cfg.model, cfg.backend).to(device)
        rate = torch.tensor(0.05, device=device)
        self.optimizer = SGD(parameter_groups(self.model, cfg.optim), rate, 0.9, 1e-3)
        self.average = MovingAverage(self.model, cfg.optim.ema_decay) if cfg.optim.ema_decay is not None else None
        self.step = TrainingStep(self.model, self.optimizer, cfg, average=self.average, captured=captured)
        self.figures: list[Tensor] = []
        for number, (x_TNCHW, y) in enumerate(batches(cfg, device)):
            rate.fill_(0.05 / (1 + number))
            self.figures += [figure.clone() for figure in self.step(x_TNCHW, y)]

    def tensors(self) -> list[Tensor]:
        """Return weights, running statistics, momenta and moving averages."""
        momenta = [self.optimizer.state[p]["momentum_buffer"] for p in self.model.parameters()]
        averages = [] if self.average is None else list(self.average.module.state_dict().values())
        return [*self.model.state_dict().values(), *momenta, *averages]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", CASES)
def test_captured_steps_compute_the_same_bits(name, device):
    eager, captured = (Trained(CASES[name], is_captured, device) for is_captured in (False, True))
    same = torch.equal if device == "cpu" else torch.allclose
    assert all(same(a, b) for a, b in zip(eager.figures, captured.figures, strict=True))
    assert all(same(a, b) for a, b in zip(eager.tensors(), captured.tensors(), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_a_step_does_nothing_that_a_cuda_graph_cannot_do(name):
    """A graph cannot read a tensor's value on the host, and cannot copy a number or a tensor from it."""
    trained = Trained(CASES[name], captured=True)
    x_TNCHW, y = batches(CASES[name], "cpu")[0]
    with ForbidHost():
        trained.step(x_TNCHW, y)
    trained.model.eval()
    with ForbidHost(), torch.no_grad():
        logits_function(trained.model, CASES[name].precision, captured=True)(x_TNCHW)


class ForbidHost(TorchDispatchMode):
    """Raises an error for every operation that reads a tensor on the host or copies from it."""

    FORBIDDEN = ("_local_scalar_dense", "item", "nonzero", "lift_fresh", "equal", "is_nonzero")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name == "index" and any(index is not None and index.dtype == torch.bool for index in args[1]):
            name = "nonzero"
        assert name not in self.FORBIDDEN, f"{name} waits for the device or copies from the host"
        return func(*args, **(kwargs or {}))


def test_the_check_for_host_work_can_fail():
    x = torch.ones(3)
    for work in (lambda: x.sum().item(), lambda: torch.tensor([1.0]), lambda: x[x > 0], lambda: x.new_tensor(2.0)):
        with pytest.raises(AssertionError, match="waits for the device"), ForbidHost():
            work()


def test_a_captured_function_reads_its_fixed_inputs_only():
    seen: list[Tensor] = []

    def double(x: Tensor, y: Tensor) -> Tensor:
        seen.append(x)
        return 2 * x + y

    function = CapturedFunction(double, "sums")
    for number in range(WARM_UP_CALLS + 3):
        x, y = torch.full((4, 2, 3), float(number))[:1].expand(4, 2, 3), torch.arange(3.0)
        assert torch.equal(function(x, y), 2 * x + y)
    fixed = seen[WARM_UP_CALLS:]
    assert len({x.data_ptr() for x in fixed}) == 1
    assert fixed[0].stride() == (0, 3, 1)


def test_batches_of_another_size_are_computed_without_a_graph_and_said_once(caplog):
    caplog.set_level("INFO", "multifire")
    calls: list[int] = []

    def count(x: Tensor) -> Tensor:
        calls.append(len(x))
        return x + 1

    function = CapturedFunction(count, "training steps")
    for size in [4] * (WARM_UP_CALLS + 1) + [3, 4, 3]:
        x = torch.rand(size)
        assert torch.equal(function(x), x + 1)
    assert calls.count(3) == 2
    assert caplog.messages == ["training steps with another batch size run without a CUDA graph"]


def test_runs_that_need_the_host_are_not_captured():
    assert why_not_captured(SMALL, ALONE) is None
    assert "several processes" in (why_not_captured(SMALL, Processes(0, 2)) or "")
    assert "skip_nonfinite" in (why_not_captured(override(SMALL, optim={"skip_nonfinite": 3}), ALONE) or "")


def test_captured_logits_equal_those_of_the_model():
    model = model_from_config(SMALL.model).eval()
    function = logits_function(model, "fp32", captured=True)
    with torch.no_grad():
        for x_TNCHW, _ in batches(SMALL, "cpu"):
            assert torch.equal(function(x_TNCHW), model(x_TNCHW, per_step=True))


def test_the_moving_average_does_not_share_memory_with_the_network():
    model = nn.BatchNorm1d(2)
    average = MovingAverage(model, 0.5)
    before = copy.deepcopy(model.state_dict())
    average.update()
    with torch.no_grad():
        model.weight.add_(1.0)
    assert torch.equal(average.module.weight, before["weight"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_captured_run_resumes_to_the_same_weights(tmp_path, monkeypatch):
    cfg = replace(override(TINY, optim={"epochs": 3, "ema_decay": 0.9}), device="cuda")
    train(cfg, tmp_path / "whole")
    stop_after(6, monkeypatch)
    with pytest.raises(Interrupted):
        train(cfg, tmp_path / "stopped")
    monkeypatch.undo()
    train(cfg, tmp_path / "stopped", TrainOptions(resume="yes"))
    whole, resumed = (load_checkpoint(tmp_path / name / "last.safetensors").model for name in ("whole", "stopped"))
    assert all(torch.allclose(whole[name], resumed[name], atol=1e-5) for name in whole)
