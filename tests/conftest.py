"""Fixtures that every test may use."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from mc2_hpc.peers import import_open_clip, import_transformers

# Tests are no package, so the file beside this one is loaded by its path.
_spec = importlib.util.spec_from_file_location("slurm_cluster", Path(__file__).with_name("slurm_cluster.py"))
_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_module)
slurm_cluster = _module.slurm_cluster


@pytest.fixture(scope="session")
def open_clip() -> ModuleType:
    """open_clip, imported the way the product imports it."""
    return import_open_clip()


@pytest.fixture(scope="session")
def transformers() -> ModuleType:
    """transformers, imported the way the product imports it."""
    return import_transformers()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real data that lies beside a checkout on some machines; tests that need it skip elsewhere."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real data beside the checkout ({folder.name} folder of shared is missing)")
    return folder
