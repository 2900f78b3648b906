"""Importing the curation package loads neither torch nor numba; numba is loaded by the first match."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    "module",
    [
        "mc2_hpc.curation.run",
        "mc2_hpc.curation.fetch",
        "mc2_hpc.filters",
        "mc2_hpc.balancing.selection",
        "mc2_hpc.metadata.build",
    ],
)
def test_import_is_light(module):
    heavy = ("torch", "numba", "fasttext", "num2words", "datatrove", "ray", "aiohttp")
    code = f"import {module}, sys; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"
