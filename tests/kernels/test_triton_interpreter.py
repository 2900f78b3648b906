"""Runs the Triton tests in Triton's interpreter, in a separate process, if there is no GPU to run them directly."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent


@pytest.mark.timeout(660)  # longer than that of the process below
@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU runs them: pytest -m gpu")
@pytest.mark.parametrize("tests", ["test_triton_kernels.py", "test_triton_fused.py"])
def test_triton_kernels_in_the_interpreter(tests):
    pytest.importorskip("triton", reason="the package triton is not installed")
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(FOLDER / tests)],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=FOLDER.parents[1],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert "skipped" not in result.stdout.splitlines()[-1], result.stdout[-2000:]
