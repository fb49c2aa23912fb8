"""Test cases for `ops.tdbn_mlf` with dyadic inputs, and a function that runs one on a backend."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import multifire as mf
from multifire import ops


def device_of(backend: str) -> torch.device:
    """Return the device on which the tests of a backend create their tensors."""
    on_gpu = backend == "triton" and torch.cuda.is_available() and not ops.triton.INTERPRETED
    return torch.device("cuda" if on_gpu else "cpu")


def fix_tile(monkeypatch, tile: int, programs: int = 2) -> None:
    """Let every Triton kernel compute this many elements at a time, in this many programs on each multiprocessor."""
    for kernel, choice in ops.triton.CHOICES.items():
        monkeypatch.setitem(ops.triton.CHOICES, kernel, choice._replace(tile=tile, programs=programs))


def each_backend(*backends: str) -> Iterator[str]:
    """Yield each backend in turn while its device is the default device; that of the reference is the CPU."""
    for backend in backends:
        with device_of(backend):
            yield backend


def integers(low: int, high: int, shape: Sequence[int]) -> Tensor:
    """Return random integers that are the same on every device."""
    return torch.randint(low, high, tuple(shape), device="cpu").to(torch.get_default_device())


def uniform(*shape: int) -> Tensor:
    """Return uniform random numbers that are the same on every device."""
    return torch.rand(shape, device="cpu").to(torch.get_default_device())


def dyadic(*shape: int, low: int = -256, high: int = 384) -> Tensor:
    """Return random multiples of 1/128: their sums and products with simple numbers are exact in any order."""
    return integers(low, high, shape).float() / 128


def channels_last(x: Tensor) -> Tensor:
    return x.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)


@dataclass(frozen=True)
class Case:
    """One call of `ops.tdbn_mlf`; these fields and a fixed seed determine its tensors."""

    timesteps: int = 4
    channels: int = 16
    levels: int = 3
    layout: str = "last"
    training: bool = True
    affine: bool = True
    add_before: bool = False
    add_after: bool = False
    state: bool = False
    static: bool = False
    surrogate: str = "rect"
    detach_reset: bool = False
    membranes: str = "own"
    reset: str = "zero"
    signed: bool = False
    learned: bool = False
    dtype: torch.dtype = torch.float32
    size: tuple[int, int, int] = (2, 5, 7)

    def inputs(self) -> dict[str, Tensor | None]:
        torch.manual_seed(0)
        samples, rows, columns = self.size
        step = (samples, self.channels, rows, columns)
        to_layout = channels_last if self.layout == "last" else torch.Tensor.contiguous
        x = to_layout(dyadic(1 if self.static else self.timesteps, *step))
        if self.layout == "strided":
            x = torch.stack([x, x], -1).flatten(-2)[..., ::2]
        return {
            "x": x.to(self.dtype),
            "weight": dyadic(self.channels, low=64, high=192) if self.affine else None,
            "bias": dyadic(self.channels, low=-64, high=64) if self.affine else None,
            "add_before": to_layout(dyadic(self.timesteps, *step)).to(self.dtype) if self.add_before else None,
            "add_after": to_layout(integers(0, 7, (self.timesteps, *step))).to(self.dtype) if self.add_after else None,
            "state": dyadic(1 if self.membranes == "shared" else self.levels, *step) if self.state else None,
            "learned_thresholds": torch.tensor(self.thresholds()) if self.learned else None,
            "learned_decay": torch.tensor(0.25) if self.learned else None,
        }

    def thresholds(self) -> tuple[float, ...]:
        return ops.default_thresholds(self.levels, 0.5 if self.membranes == "shared" or self.signed else 0.6)


@dataclass
class Result:
    outputs: dict[str, Tensor]
    grads: dict[str, Tensor]


def run(case: Case, backend: str, grad_out: Tensor | None = None, grad_state_out: Tensor | None = None) -> Result:
    """Run a case; return its outputs, updated running statistics and all gradients as CPU tensors."""
    with device_of(backend):
        return _run(case, backend, grad_out, grad_state_out)


def _run(case: Case, backend: str, grad_out: Tensor | None, grad_state_out: Tensor | None) -> Result:
    inputs = {k: None if v is None else v.detach().requires_grad_() for k, v in case.inputs().items()}
    running = [dyadic(case.channels, low=-64, high=64), dyadic(case.channels, low=64, high=256)]
    x, weight, bias = (inputs[name] for name in ("x", "weight", "bias"))
    assert x is not None
    out, state = ops.tdbn_mlf(
        x,
        weight,
        bias,
        *running,
        training=case.training,
        thresholds=case.thresholds(),
        membranes=case.membranes,
        reset=case.reset,
        signed=case.signed,
        learned_thresholds=inputs["learned_thresholds"],
        learned_decay=inputs["learned_decay"],
        surrogate=case.surrogate,
        detach_reset=case.detach_reset,
        add_before=inputs["add_before"],
        add_after=inputs["add_after"],
        state=inputs["state"],
        return_state=case.state,
        timesteps=case.timesteps,
        backend=backend,
    )
    torch.manual_seed(1)
    outputs_and_grads = [(out, uniform(*out.shape).to(out.dtype) if grad_out is None else grad_out.to(out.device))]
    if state is not None:
        outputs_and_grads.append(
            (state, uniform(*state.shape) if grad_state_out is None else grad_state_out.to(state.device))
        )
    torch.autograd.backward(*zip(*outputs_and_grads, strict=True))
    outputs = {"out": out, "state": state, "running_mean": running[0], "running_var": running[1]}
    return Result(
        {k: v.detach().cpu() for k, v in outputs.items() if v is not None},
        {k: v.grad.cpu() for k, v in inputs.items() if v is not None and v.grad is not None},
    )


def assert_same_outputs(got: Result, want: Result) -> None:
    assert got.outputs.keys() == want.outputs.keys()
    for name, expected in want.outputs.items():
        assert got.outputs[name].dtype == expected.dtype
        assert torch.equal(got.outputs[name], expected), name


def assert_close_grads(got: Result, want: Result, rtol: float = 1e-5) -> None:
    assert got.grads.keys() == want.grads.keys()
    for name, expected in want.grads.items():
        assert got.grads[name].dtype == expected.dtype, name
        # The gradient of a channel, threshold or decay is a sum whose terms may cancel: its error is relative to the
        # sum of their magnitudes.
        scale = expected.abs().max() if expected.dim() > 1 else want.grads["x"].abs().float().sum() / expected.numel()
        scale = scale.clamp_min(1e-30)
        torch.testing.assert_close(
            got.grads[name] / scale, expected / scale, rtol=0, atol=rtol, msg=lambda m, n=name: f"{n}: {m}"
        )


def assert_tdbn_equals_the_authors_code(arrays: dict[str, Tensor], kind: str, backend: str) -> None:
    """Two training calls, gradients and evaluation against golden/tdbn.npz, affine or plain."""
    norm = mf.nn.TdBatchNorm2d(6, affine=kind == "affine", backend=backend)
    if kind == "affine":
        norm.load_state_dict({"weight": arrays["weight"], "bias": arrays["bias"]}, strict=False)
    x = arrays[f"{kind}_x"].unflatten(0, (4, 3)).requires_grad_()
    norm(x)
    out = norm(2 * x)
    out.backward(arrays[f"{kind}_grad_out"].unflatten(0, (4, 3)))
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(out.flatten(0, 1), arrays[f"{kind}_train_out_second_call"], **close)
    # Channel 0 is almost constant, so its gradient is large: compare relative to the channel.
    expected = arrays[f"{kind}_grad_x_second_call"]
    largest = expected.abs().amax((0, 2, 3), keepdim=True)
    torch.testing.assert_close(x.grad.flatten(0, 1) / largest, expected / largest, rtol=0, atol=1e-5)
    torch.testing.assert_close(norm.running_mean, arrays[f"{kind}_running_mean"], **close)
    torch.testing.assert_close(norm.running_var, arrays[f"{kind}_running_var"], **close)
    if kind == "affine":
        torch.testing.assert_close(norm.weight.grad, arrays["affine_grad_weight"], **close)
        torch.testing.assert_close(norm.bias.grad, arrays["affine_grad_bias"], **close)
    torch.testing.assert_close(norm.eval()(x).flatten(0, 1), arrays[f"{kind}_eval_out"], **close)
