"""The fixture over the fused backends."""

import pytest
import torch

from multifire import ops

# Backends held to the reference; one that cannot run here is skipped with its reason.
# Triton's interpreter takes minutes for all cases; test_triton.py has a few for every day.
SLOW = {"triton": pytest.mark.slow}
FUSED = [pytest.param(name, marks=SLOW.get(name, ())) for name in ops.BACKENDS if name != "reference"]


@pytest.fixture(params=FUSED)
def backend(request) -> str:
    reason = ops.BACKENDS[request.param].why_not(torch.zeros(1), 1)
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    return request.param
