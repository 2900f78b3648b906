"""A quickstart of full size, for slow tests."""

from pathlib import Path

import pytest

from mc2_hpc.quickstart.run import run_quickstart


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory) -> Path:
    """Its output."""
    output = tmp_path_factory.mktemp("whole") / "quickstart"
    assert run_quickstart(output, processes=2) == 0
    return output
