"""The record of a run's takedown list: ``takedown/`` in the run's folder, from which ``mc2 data proof`` recomputes.

    <run>/takedown/list.jsonl      every line that the run has applied
    <run>/takedown/versions.json   from which step on how many of its bytes were in force, and where every lane was

The list may only grow, so a version is the beginning of the last one. A resumed run drops the versions of steps that it
trains again, but not their lines: they are then in force from the step that it resumes from.
"""

import hashlib
import logging
import time
from pathlib import Path
from typing import Any

import msgspec

from mc2_hpc.data.takedown import MOST_BYTES, read_list
from mc2_hpc.errors import UserError
from mc2_hpc.reading.json_file import Count, File, Sha256, read_json
from mc2_hpc.storage import atomic_path, write_json
from mc2_hpc.training.checkpoint import SavedLane

logger = logging.getLogger(__name__)

FOLDER, LIST, VERSIONS = "takedown", "list.jsonl", "versions.json"


class Version(File):
    """A version of the list."""

    step: Count
    """It was in force from the step after this one."""
    bytes: Count
    """Of ``list.jsonl``."""
    lines: Count
    sha256: Sha256
    """Of these bytes."""
    time: float
    """When it took effect, in seconds since 1970."""
    position: list[SavedLane]
    """Of every lane after that step; empty at the start of a run."""
    samples_seen: Count
    skipped: dict[str, Count]
    """Samples skipped until then, by reason, over all ranks."""


class _Versions(File):
    versions: list[Version]


class TakedownRecord:
    """The record in a run's folder; empty if there is none yet.

    Raises:
        UserError: it is damaged.
    """

    def __init__(self, run: Path) -> None:
        self.folder = run / FOLDER
        self.content = b""
        """Every line applied so far."""
        self.versions: list[Version] = []
        if (self.folder / LIST).exists():
            self.content = read_list(self.folder / LIST)
        if (self.folder / VERSIONS).exists():
            self.versions = read_json(self.folder / VERSIONS, _Versions, most=MOST_BYTES).versions
        digest, done = hashlib.sha256(), 0
        for version in self.versions:
            digest.update(self.content[done : version.bytes])
            done = version.bytes
            if version.bytes > len(self.content) or digest.hexdigest() != version.sha256:
                raise UserError(
                    f"{self.folder / LIST}: its first {version.lines} lines are not those in force after step "
                    f"{version.step}; restore the file, or remove {self.folder}, which ends the proof for this run"
                )

    def resume(self, step: int) -> None:
        """Drop the versions of steps beyond ``step``, which are trained again."""
        self.versions = [version for version in self.versions if version.step <= step]

    def add(self, content: bytes, *, step: int, progress: dict[str, Any]) -> None:
        """``content`` is in force after ``step``; ``progress`` is what a checkpoint would say of that step."""
        if self.versions and self.versions[-1].bytes == len(content):
            return
        self.content = content
        num_bytes, lines, sha256 = describe(content)
        version = {"step": step, "bytes": num_bytes, "lines": lines, "sha256": sha256, "time": time.time()}
        self.versions.append(msgspec.convert({**version, **progress}, Version))

    def write(self) -> None:
        """Write both files. If that fails, it is logged, and the next call tries again: the list is in force."""
        try:
            with atomic_path(self.folder / LIST) as temporary:
                temporary.write_bytes(self.content)
            write_json(self.folder / VERSIONS, {"versions": msgspec.to_builtins(self.versions)})
        except (OSError, UserError) as error:
            logger.error("%s is not up to date, so the proof is incomplete: %s", self.folder, error)


def describe(content: bytes) -> tuple[int, int, str]:
    """Bytes, lines and SHA-256 of a version."""
    return len(content), content.count(b"\n"), hashlib.sha256(content).hexdigest()
