"""A tiny pool to train on, and running scripts under torchrun."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from tiny_run import TinyPool, write_config, write_pool  # noqa: E402  # the fault matrix trains on the same

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
def tiny_pool(tmp_path_factory) -> TinyPool:
    """Shared and read-only: tests that damage shards copy them first."""
    return write_pool(tmp_path_factory.mktemp("pool"))


@pytest.fixture(scope="module")
def module_config(tiny_pool, tmp_path_factory) -> Path:
    """A run of fp32 steps on the tiny pool."""
    folder = tmp_path_factory.mktemp("config")
    values = {"steps": 12, "log_every": 2, "checkpoint": {"every": 6, "keep": 2}}
    return write_config(folder / "tiny.yaml", tiny_pool, output=str(folder / "run"), **values)
