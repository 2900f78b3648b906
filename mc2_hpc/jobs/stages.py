"""Declarations of work: stages over shards, and plans of stages.

A shard has its own output files, each written atomically; once all of them exist, the shard is done. A stage's work is
a name and plain arguments (:mod:`mc2_hpc.jobs.named`), so it can be sent to any machine.
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
        """Process a shard with the input ``value``, whose parameter is annotated with its type.

        Raises:
            UserError: the shard cannot be processed; the others still are.
        """
        ...


@runtime_checkable
class ChecksOutputs(Protocol):
    """Work that also checks the contents of its outputs to decide whether a shard is done."""

    def is_current(self, shard: str, value: Any, /) -> bool:
        """Whether the existing outputs are what the work would write for the input ``value``."""
        ...


def has_outputs(folder: Path, outputs: Iterable[str], shard: str) -> bool:
    """Whether all ``outputs`` (see :attr:`Stage.outputs`) of a shard exist below ``folder``."""
    return all((folder / output.replace(SHARD, shard)).is_file() for output in outputs)


@dataclass(frozen=True)
class Stage:
    """Work on every shard of a list, on any engine."""

    name: str
    folder: Path
    """Where the stage writes; its logs and its executor's markers go to ``logs/<name>/`` below."""
    inputs: Mapping[str, Any]
    """The work's input for each shard, by name; plain values."""
    work: Work
    outputs: tuple[str, ...]
    """Files below ``folder`` that exist when a shard is done; ``{shard}`` stands for its name."""
    unit: str = "shards"
    """The plural noun for the shards of this stage, for messages."""
    invalidates: tuple[Path, ...] = field(default=(), kw_only=True)
    """Files and folders made from this stage's outputs, removed before it runs."""

    @property
    def logs(self) -> Path:
        """Folder of the stage's logs, plan and markers."""
        return self.folder / "logs" / self.name.replace(" ", "-")

    def is_done(self, shard: str) -> bool:
        """Whether all outputs of the shard exist and are current."""
        if not has_outputs(self.folder, self.outputs, shard):
            return False
        return self.work.is_current(shard, self.inputs[shard]) if isinstance(self.work, ChecksOutputs) else True

    def undone(self) -> list[str]:
        """Names of the shards that are not done, in order."""
        return [name for name in self.inputs if not self.is_done(name)]

    def invalidate(self) -> None:
        """Remove files and folders made from outputs that are about to change."""
        for path in self.invalidates:
            if path.is_dir():
                remove_folder(path)
            else:
                path.unlink(missing_ok=True)


@dataclass(frozen=True)
class Plan:
    """A command: its stages in order, and its result once all of them are done."""

    stages: tuple[Stage, ...]
    result: Callable[[], dict[str, Any]]
    """Reads the outputs of the finished stages; called in the process that runs the command."""
