"""The inputs that people report trouble with, as the shared tool writes them."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from multifire.events import read_events

TOOL = Path(__file__).parents[3] / "shared" / "field" / "make_inputs.py"


@pytest.mark.skipif(not TOOL.is_file(), reason="the shared tool that writes inputs from the field is not here")
def test_inputs_from_the_field_are_read(tmp_path):
    pytest.importorskip("h5py", reason="the extra `cameras` is not installed")
    subprocess.run([sys.executable, TOOL, tmp_path], check=True, stdout=subprocess.DEVNULL)
    expected = sorted(tmp_path.glob("*.expected.npy"))
    assert len(expected) >= 12
    for path in expected:
        wanted = np.load(path)
        events = read_events(tmp_path / path.name.removesuffix(".expected.npy"))
        assert all(np.array_equal(events[name], wanted[name]) for name in "txyp"), path.name
    with pytest.raises(ValueError, match="; 3 events of 2,000 lie beside it"):
        read_events(tmp_path / "stray346.npy", (260, 346))
    assert len(read_events(tmp_path / "stray346.npy", (260, 346), stray="drop")) == 1997
