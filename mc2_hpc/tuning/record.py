"""``trials.jsonl``: the result of every trial that has ended, one JSON line each, under what identifies the trial.

The file is replaced as a whole, so a kill leaves it with the results before or after a trial, never in between.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from mc2_hpc.reading.files import read_bytes
from mc2_hpc.reading.json_file import Count, File, Size, parse_json
from mc2_hpc.storage import atomic_path
from mc2_hpc.tuning.breakdown import Breakdown

TRIALS = "trials.jsonl"
_MOST_BYTES = 64 << 20

Status = Literal["ok", "out of memory", "crash", "timeout"]


class TrialResult(File):
    """A line of ``trials.jsonl``."""

    key: str
    """Of the run, the settings and the steps (:func:`trial_key`)."""
    settings: dict[str, str | int | float | bool | None]
    """What the trial changes, by ``key.sub``; nothing is the config as it is given."""
    steps: Size
    """Measured, after the warm-up."""
    status: Status
    seconds: float
    """From start to end of the processes."""
    turns: Size = 1
    """Trials of the same settings and steps that this is the median of."""
    error: str = ""
    """Its last error line, if it is not ok."""
    pairs_per_second: float = 0.0
    """Median of the measured rows."""
    slowest: float = 0.0
    fastest: float = 0.0
    """Of the rows."""
    waits: Breakdown | None = None
    log: str = ""
    """Of its processes, relative to the folder of the record."""

    @property
    def ok(self) -> bool:
        return self.status == "ok"


def run_hash(run: Mapping[str, Any]) -> str:
    """Identifies what all trials of a run share: its config, its data, its machine, its number of ranks."""
    return hashlib.sha256(json.dumps(run, sort_keys=True).encode()).hexdigest()[:16]


def trial_key(run: str, settings: Mapping[str, Any], steps: Count, turn: Count) -> str:
    """Identifies a trial; the same command asks for the same keys.

    Args:
        turn: 0 for the first trial of these settings and steps.
    """
    text = json.dumps([run, dict(sorted(settings.items())), steps, turn], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def combined(turns: Sequence[TrialResult]) -> TrialResult:
    """Trials of the same settings and steps as one: the trial with the median rate (of an even number, the slower of
    the two in the middle), with the slowest and fastest row of all; or the first that failed."""
    failed = next((each for each in turns if not each.ok), None)
    if failed is not None or len(turns) == 1:
        return failed or turns[0]
    return msgspec.structs.replace(
        sorted(turns, key=lambda each: each.pairs_per_second)[(len(turns) - 1) // 2],
        seconds=sum(each.seconds for each in turns),
        turns=len(turns),
        slowest=min(each.slowest for each in turns),
        fastest=max(each.fastest for each in turns),
    )


class Record:
    """The trials that have ended, in a folder that this process alone uses."""

    def __init__(self, folder: Path) -> None:
        """
        Raises:
            UserError: a line of the file is not a result.
        """
        self._path = folder / TRIALS
        self.results: dict[str, TrialResult] = {}
        """By key, in the order of their ends."""
        if self._path.is_file():
            for number, line in enumerate(read_bytes(self._path, most=_MOST_BYTES).splitlines(), start=1):
                where = f"{self._path}, line {number}"
                found = parse_json(line, TrialResult, where, cure="delete the line to repeat the trial")
                self.results[found.key] = found

    def add(self, result: TrialResult) -> None:
        """Add a result and write the file."""
        self.results[result.key] = result
        with atomic_path(self._path) as temporary:
            temporary.write_bytes(b"".join(msgspec.json.encode(each) + b"\n" for each in self.results.values()))
