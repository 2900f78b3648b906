"""Checks of features that were computed once and have changed since."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mc2_hpc.errors import UserError


def check_refused(
    read: Callable[[Path], object], features: Path, tmp_path: Path, change: Callable[[Path], object] | None, words: str
) -> None:
    """Check that ``read`` refuses a copy of ``features``, after ``change`` of it, in one line with ``words``."""
    folder = shutil.copytree(features, tmp_path / "features")
    if change is not None:
        change(folder)
    with pytest.raises(UserError, match=words) as error:
        read(folder)
    assert "\n" not in str(error.value)
