"""Fixtures of all tests, and Triton's interpreter on machines without a GPU."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

# Set before multifire is imported, which reads it: without a GPU, Triton's interpreter runs the kernels.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def golden():
    """Arrays that the authors' published code computed, on the default device: `golden("tdbn")["weight"]`."""

    def load(name: str) -> dict[str, torch.Tensor]:
        with np.load(GOLDEN / f"{name}.npz") as arrays:
            return {key: torch.tensor(arrays[key]) for key in arrays.files if arrays[key].dtype.kind in "fiub"}

    return load


@pytest.fixture(scope="session")
def gesture_checkpoint() -> Path:
    return GOLDEN / "gesture_ds_resnet20_reference_checkpoint.pth"


@pytest.fixture(scope="session")
def gesture_parameter_names() -> list[str]:
    """The authors' parameter names, in the order of the golden gradient norms."""
    with np.load(GOLDEN / "gesture_ds_resnet20.npz") as arrays:
        return arrays["param_names"].tolist()
