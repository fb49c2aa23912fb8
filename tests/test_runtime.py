"""Settings of the process: glibc's malloc keeps freed memory."""

import os
import platform
import subprocess
import sys

import pytest

PROBE = """
import resource
import sys
from multifire.utils.memory import keep_freed_memory, first_step_done

if sys.argv[1] != "leave":
    keep_freed_memory(after_first_step=sys.argv[1] != "keep")
if sys.argv[1] == "a step was done":
    first_step_done()
def use():
    blocks = [b"1" * (size << 20) for size in (8, 40)]  # freed at the end, like the tensors of a step
for _ in range(3):
    use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
PAGES = 5 * (48 << 20) // os.sysconf("SC_PAGE_SIZE")


def faults(mode: str, **env: str) -> int:
    """Return the page faults while 48 MiB are allocated and freed five times, after a warm-up."""
    prefixes = ("MALLOC_", "GLIBC_", "LD_PRELOAD")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(prefixes)}
    done = subprocess.run(
        [sys.executable, "-c", PROBE, mode], env=clean | env, capture_output=True, text=True, check=True
    )
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's malloc is configured")
def test_freed_memory_is_reused_unless_the_user_has_configured_malloc():
    user_settings = {"MALLOC_MMAP_THRESHOLD_": "1048576"}
    if faults("leave") < PAGES / 2:
        pytest.skip("this system allocates huge pages, so that there are few page faults to avoid")
    assert faults("keep", **user_settings) > PAGES / 2
    assert faults("keep") < PAGES / 100
    assert faults("no step was done") > PAGES / 2
    assert faults("a step was done") < PAGES / 100
