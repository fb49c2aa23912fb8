import os
from pathlib import Path

# Read when multifire is imported: without a GPU, Triton's kernels are run step by step by its interpreter.
os.environ.setdefault("TRITON_INTERPRET", "1")

import numpy as np
import pytest
import torch

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def golden():
    """Arrays that the authors' published code computed: `golden("tdbn")["weight"]`."""

    def load(name: str) -> dict[str, torch.Tensor]:
        with np.load(GOLDEN / f"{name}.npz") as arrays:
            return {key: torch.from_numpy(arrays[key]) for key in arrays.files if arrays[key].dtype.kind in "fiub"}

    return load


@pytest.fixture(scope="session")
def gesture_checkpoint() -> Path:
    return GOLDEN / "gesture_ds_resnet20_reference_checkpoint.pth"


@pytest.fixture(scope="session")
def gesture_parameter_names() -> list[str]:
    """The authors' parameter names, in the order of the golden gradient norms."""
    with np.load(GOLDEN / "gesture_ds_resnet20.npz") as arrays:
        return arrays["param_names"].tolist()
