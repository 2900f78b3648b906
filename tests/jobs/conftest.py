"""User-defined work, in a module that only the test's own process can find by itself."""

import importlib

import pytest

WORK = """
from dataclasses import dataclass
from pathlib import Path

from mc2_hpc.errors import UserError


@dataclass(frozen=True)
class Touch:
    folder: Path

    def __call__(self, shard: str, times: int) -> None:
        if times < 0:
            raise UserError(f"{shard}: not {-times}")
        with open(self.folder / shard, "a") as file:
            file.write("x" * times)


@dataclass(frozen=True)
class Copy(Touch):
    def __call__(self, shard: str, source: Path | None) -> None:
        (self.folder / shard).write_text(source.read_text())

    def is_current(self, shard: str, value: object) -> bool:
        return (self.folder / shard).read_text() == (self.folder / "source").read_text()
"""


@pytest.fixture
def work(module_of):
    """A user's module, in a folder that only this process searches."""
    return importlib.import_module(module_of(WORK))
