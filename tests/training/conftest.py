"""Ranks started by torchrun, and jobs of the fault matrix."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults import matrix

Torchrun = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def torchrun() -> Torchrun:
    """``torchrun(processes, *arguments, check=True)``: run a script or ``-m module`` on several gloo ranks."""

    def run(processes: int, *arguments: str | Path, check: bool = True, timeout: float = 240):
        launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        result = subprocess.run(
            [sys.executable, "-m", *launcher, *map(str, arguments)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        if check and result.returncode:
            pytest.fail(f"exit code {result.returncode}\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}")
        return result

    return run


@pytest.fixture(scope="session")
def starter(fork_server) -> matrix.Starter:
    """Runs jobs in forked processes."""
    return matrix.Starter(fork_server)
