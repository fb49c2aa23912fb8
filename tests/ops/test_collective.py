"""Norm statistics over all processes: two processes with parts of a batch compute what one computes with all of it."""

import itertools

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from multifire import ops
from tests.ops.cases import channels_last, device_of, dyadic

SAMPLES = 5
SHARDS = ((3, 2), (5, 0))  # samples of each process: uneven, and one process without a sample
TENSORS = ("weight", "bias", "running_mean", "running_var")


def compute(backend, dtype, static, begin, end, sync):
    """Return the output, the running statistics and the gradients of samples begin to end of a batch."""
    torch.manual_seed(0)
    inputs = {
        "x": channels_last(dyadic(1 if static else 3, SAMPLES, 4, 6, 6)),
        "add_before": channels_last(dyadic(3, SAMPLES, 4, 6, 6)),
    }
    grad = channels_last(dyadic(3, SAMPLES, 4, 6, 6))[:, begin:end].to(dtype)
    inputs = {name: x[:, begin:end].to(dtype).requires_grad_() for name, x in inputs.items()}
    norm = {"weight": torch.rand(4) + 0.5, "bias": torch.rand(4), "running_mean": torch.zeros(4),
            "running_var": torch.ones(4)}  # fmt: skip
    norm = {name: tensor.to(dtype) for name, tensor in norm.items()}
    parameters = [norm["weight"].requires_grad_(), norm["bias"].requires_grad_()]
    out, _ = ops.tdbn_mlf(
        inputs["x"], *norm.values(), add_before=inputs["add_before"],
        training=True, sync=sync, timesteps=3, surrogate="atan", backend=backend,
    )  # fmt: skip
    out.backward(grad)
    per_sample = {"out": out.detach(), **{f"grad {name}": x.grad for name, x in inputs.items()}}
    per_channel = {name: norm[name] for name in TENSORS[2:]}
    parameter_grads = {f"grad {name}": tensor.grad for name, tensor in zip(TENSORS, parameters, strict=False)}
    return per_sample, per_channel, parameter_grads


def run_process(rank, rendezvous, backend, dtype):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    with device_of(backend):
        for shards, static in itertools.product(SHARDS, (False, True)):
            assert_equals_one_process(rank, backend, dtype, shards, static)
    dist.destroy_process_group()


def assert_equals_one_process(rank, backend, dtype, shards, static):
    begin = sum(shards[:rank])
    end = begin + shards[rank]
    per_sample, per_channel, parameter_grads = compute(backend, dtype, static, begin, end, sync=True)
    expected_samples, expected_channels, expected_grads = compute(backend, dtype, static, 0, SAMPLES, sync=False)
    for grad in parameter_grads.values():
        dist.all_reduce(grad)
    tolerance = {"rtol": 0, "atol": 1e-12 if dtype == torch.float64 else 2e-5}
    for name, found in per_sample.items():
        torch.testing.assert_close(found, expected_samples[name][:, begin:end], msg=name, **tolerance)
    for name, found in (per_channel | parameter_grads).items():
        torch.testing.assert_close(found, (expected_channels | expected_grads)[name], msg=name, **tolerance)


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        ("cpu", torch.float32),
        ("reference", torch.float64),
        pytest.param("triton", torch.float32, marks=pytest.mark.slow),
    ],
)
def test_two_processes_compute_what_one_process_computes(tmp_path, backend, dtype):
    mp.spawn(run_process, (str(tmp_path / "rendezvous"), backend, dtype), nprocs=2)


def test_sync_without_a_process_group_is_refused():
    x = torch.zeros(1, 2, 3, 4, 4)
    with pytest.raises(ValueError, match="start the program with torchrun"):
        ops.tdbn(x, None, None, torch.zeros(3), torch.ones(3), training=True, sync=True)
