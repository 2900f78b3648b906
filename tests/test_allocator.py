"""Freed memory stays with the process, and what the environment asks of malloc is respected."""

import os
import platform
import subprocess
import sys

import pytest

# Prints whether the setting was made, and the page faults of the last of several rounds of the same allocations: the
# first ones let the heap grow. glibc may learn to keep blocks of 12 MiB on the heap, but always maps those of 80 MiB.
PROGRAM = """
import resource, sys
import torch
from mc2_hpc.allocator import keep_freed_memory
kept = keep_freed_memory() if "keep" in sys.argv else None
for _ in range(12):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.ones(size << 18) for size in (12, 80, 12, 80)]
    del blocks
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(kept, faults)
"""

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc's malloc")


def measure(*arguments, **variables):
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    command, variables = [sys.executable, "-c", PROGRAM, *arguments], {**clean, **variables}
    result = subprocess.run(command, env=variables, capture_output=True, text=True, check=True, timeout=120)
    kept, faults = result.stdout.split()
    return kept, int(faults)


def test_memory_that_was_freed_is_not_mapped_again():
    pages = (184 << 20) // os.sysconf("SC_PAGESIZE")
    assert measure("keep") == ("True", pytest.approx(0, abs=pages // 50))
    _, by_default = measure()
    assert by_default > pages // 2  # otherwise the setting would be of no use


@pytest.mark.parametrize(
    "variables", [{"MALLOC_TRIM_THRESHOLD_": "65536"}, {"GLIBC_TUNABLES": "glibc.malloc.mmap_max=100"}]
)
def test_settings_of_the_environment_are_left_alone(variables):
    kept, _ = measure("keep", **variables)
    assert kept == "False"
