"""What is to be done: stages over shards, and plans of stages.

A shard's outputs are files of their own, each written atomically; that all of them are there says that the shard is
done. A stage's work is a name and plain arguments (:mod:`mc2_hpc.jobs.named`), so any machine can be told of it.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from mc2_hpc.storage import remove_folder

SHARD = "{shard}"
"""Stands for the shard's name in the names of outputs."""


class Work(Protocol):
    """A module-level function, or a frozen dataclass of plain values (strings, numbers, paths, collections of them)."""

    def __call__(self, shard: str, value: Any, /) -> object:
        """Do a shard, of which ``value`` is the input, annotated with its type.

        Raises:
            UserError: the shard cannot be done; the others are.
        """
        ...


@runtime_checkable
class ChecksOutputs(Protocol):
    """Work whose outputs tell by their content, too, whether a shard is done."""

    def is_current(self, shard: str) -> bool:
        """Whether the outputs, which are all there, are what the work would write."""
        ...


def has_outputs(folder: Path, outputs: Iterable[str], shard: str) -> bool:
    """Whether all ``outputs`` (see :attr:`Stage.outputs`) of a shard are files below ``folder``."""
    return all((folder / output.replace(SHARD, shard)).is_file() for output in outputs)


@dataclass(frozen=True)
class Stage:
    """Work on every shard of a list, on any engine."""

    name: str
    folder: Path
    """Where the stage writes; its logs and its executor's markers go to ``logs/<name>/`` below."""
    inputs: Mapping[str, Any]
    """What the work is given for each shard, by name; plain."""
    work: Work
    outputs: tuple[str, ...]
    """Files below ``folder`` that are there when a shard is done, ``{shard}`` standing for its name."""
    unit: str = "shards"
    """What the shards of this stage are, in the plural."""
    invalidates: tuple[Path, ...] = field(default=(), kw_only=True)
    """Files and folders made from this stage's outputs: removed before it does anything."""

    @property
    def logs(self) -> Path:
        """Folder of the stage's logs, plan and markers."""
        return self.folder / "logs" / self.name.replace(" ", "-")

    def is_done(self, shard: str) -> bool:
        """Whether all outputs of the shard are there."""
        if not has_outputs(self.folder, self.outputs, shard):
            return False
        return self.work.is_current(shard) if isinstance(self.work, ChecksOutputs) else True

    def undone(self) -> list[str]:
        """Names of the shards that are not done, in order."""
        return [name for name in self.inputs if not self.is_done(name)]

    def invalidate(self) -> None:
        """Remove what was made from outputs that are about to change."""
        for path in self.invalidates:
            if path.is_dir():
                remove_folder(path)
            else:
                path.unlink(missing_ok=True)


@dataclass(frozen=True)
class Plan:
    """A command: its stages, each after the one before, and what it answers when all of them are done."""

    stages: tuple[Stage, ...]
    result: Callable[[], dict[str, Any]]
    """Reads what the finished stages left; called in the process that the command was given to."""
