"""The fixture over the fused backends."""

import pytest
import torch
from cases import home, take_block_size

from multifire import ops

# Backends held to the reference; one that cannot run here is skipped with its reason.
# Triton's interpreter takes minutes for all cases; test_triton.py has a few for every day.
SLOW = {"triton": pytest.mark.slow} if ops.triton.INTERPRETED else {}
FUSED = [pytest.param(name, marks=SLOW.get(name, ())) for name in ops.BACKENDS if name != "reference"]


@pytest.fixture(params=FUSED)
def backend(request, monkeypatch):
    """A fused backend's name; in the test, tensors are made where it computes, and no time is spent on tuning."""
    with home(request.param):
        reason = ops.BACKENDS[request.param].why_not(torch.zeros(1), 1)
        if reason is not None:
            pytest.skip(f"{request.param}: {reason}")
        if request.param == "triton":
            take_block_size(monkeypatch, 0)
        yield request.param
