"""The fixture that runs a test with every fused backend."""

import pytest
import torch
from cases import device_of, fix_tile

from multifire import ops

# These backends are compared with the reference. A backend that cannot run here is skipped, and the reason is shown.
# Triton's interpreter needs minutes for all cases, so they count as slow; test_triton.py always runs a few of them.
SLOW = {"triton": pytest.mark.slow} if ops.triton.INTERPRETED else {}
FUSED = [pytest.param(name, marks=SLOW.get(name, ())) for name in ops.BACKENDS if name != "reference"]


@pytest.fixture(params=FUSED)
def backend(request, monkeypatch):
    """Return the name of a fused backend; its device is the default device."""
    with device_of(request.param):
        reason = ops.BACKENDS[request.param].why_not(torch.zeros(1), 1)
        if reason is not None:
            pytest.skip(f"{request.param}: {reason}")
        if request.param == "triton":
            fix_tile(monkeypatch, 256)
        yield request.param
