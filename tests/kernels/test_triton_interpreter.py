"""Runs the Triton tests in Triton's interpreter, in a separate process, if there is no GPU to run them directly."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).with_name("test_triton_kernels.py")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU runs them: pytest -m gpu")
def test_triton_kernels_in_the_interpreter():
    pytest.importorskip("triton", reason="the package triton is not installed")
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(TESTS)],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=TESTS.parents[2],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert "skipped" not in result.stdout.splitlines()[-1], result.stdout[-2000:]
