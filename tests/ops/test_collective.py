"""Statistics over all processes: two processes with a part of a batch each compute what one computes with all of it."""

import itertools

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from multifire import ops
from tests.ops.cases import channels_last, grid, home

SAMPLES = 5
SHARDS = ((3, 2), (5, 0))  # uneven, and one without a sample
TENSORS = ("weight", "bias", "running_mean", "running_var")


def compute(backend, dtype, shared, begin, end, sync):
    """Output, running statistics and gradients of samples begin..end of a batch."""
    torch.manual_seed(0)
    inputs = {
        "x": channels_last(grid(1 if shared else 3, SAMPLES, 4, 6, 6)),
        "add_before": channels_last(grid(3, SAMPLES, 4, 6, 6)),
    }
    grad = channels_last(grid(3, SAMPLES, 4, 6, 6))[:, begin:end].to(dtype)
    inputs = {name: x[:, begin:end].to(dtype).requires_grad_() for name, x in inputs.items()}
    norm = {"weight": torch.rand(4) + 0.5, "bias": torch.rand(4), "running_mean": torch.zeros(4),
            "running_var": torch.ones(4)}  # fmt: skip
    norm = {name: tensor.to(dtype) for name, tensor in norm.items()}
    learnt = [norm["weight"].requires_grad_(), norm["bias"].requires_grad_()]
    out, _ = ops.tdbn_mlf(
        inputs["x"], *norm.values(), add_before=inputs["add_before"],
        training=True, sync=sync, timesteps=3, surrogate="atan", backend=backend,
    )  # fmt: skip
    out.backward(grad)
    of_samples = {"out": out.detach(), **{f"grad {name}": x.grad for name, x in inputs.items()}}
    of_channels = {name: norm[name] for name in TENSORS[2:]}
    summands = {f"grad {name}": tensor.grad for name, tensor in zip(TENSORS, learnt, strict=False)}
    return of_samples, of_channels, summands


def run(rank, rendezvous, backend, dtype):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    with home(backend):
        for shards, shared in itertools.product(SHARDS, (False, True)):
            compare(rank, backend, dtype, shards, shared)
    dist.destroy_process_group()


def compare(rank, backend, dtype, shards, shared):
    begin = sum(shards[:rank])
    end = begin + shards[rank]
    of_samples, of_channels, summands = compute(backend, dtype, shared, begin, end, sync=True)
    samples_alone, channels_alone, sums_alone = compute(backend, dtype, shared, 0, SAMPLES, sync=False)
    for summand in summands.values():
        dist.all_reduce(summand)
    tolerance = {"rtol": 0, "atol": 1e-12 if dtype == torch.float64 else 2e-5}
    for name, found in of_samples.items():
        torch.testing.assert_close(found, samples_alone[name][:, begin:end], msg=name, **tolerance)
    for name, found in (of_channels | summands).items():
        torch.testing.assert_close(found, (channels_alone | sums_alone)[name], msg=name, **tolerance)


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        ("cpu", torch.float32),
        ("reference", torch.float64),
        pytest.param("triton", torch.float32, marks=pytest.mark.slow),
    ],
)
def test_two_processes_equal_one(tmp_path, backend, dtype):
    mp.spawn(run, (str(tmp_path / "rendezvous"), backend, dtype), nprocs=2)


def test_sync_without_a_group():
    x = torch.zeros(1, 2, 3, 4, 4)
    with pytest.raises(ValueError, match="start the program with torchrun"):
        ops.tdbn(x, None, None, torch.zeros(3), torch.ones(3), training=True, sync=True)
