"""The status of a run, from the files in its folder alone: progress, rate, data wait, skips, checkpoint, last error.

The run may be on another machine that shares the file system. Nothing is locked or written, and torch is not imported.
A killed run cannot say that it ended; what shows it is that its files have not changed for long (``silent``).
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar

from mc2_hpc.errors import UserError
from mc2_hpc.reading.files import read_tail, shown
from mc2_hpc.reading.json_file import Count, Foreign, Size, parse_json, read_json
from mc2_hpc.training.checkpoint_folders import MANIFEST, TRAINER, complete_folders, step_of
from mc2_hpc.training.log_errors import last_error, newest_log
from mc2_hpc.training.run_state import STATE, RunState, read_state
from mc2_hpc.training.slurm import STARTS, Starts, read_starts

METRICS = "metrics.jsonl"
_MOST_BYTES = 256 << 10
_RECENT = 10
"""Rows that rates are means over."""
_PATIENCE_ROWS, _PATIENCE_S = 10, 600.0
"""A run is silent if nothing changes for as long as this many rows take, but at least for ten minutes, because starts
and evaluations take minutes."""

State = Literal["starting", "running", "silent", "finished", "saved", "failed"]
Found = TypeVar("Found")


@dataclass(frozen=True, kw_only=True)
class Recent:
    """The last ten rows."""

    loss: float
    """Of the last row."""
    samples_per_second: float
    """Pairs per second, without saves and evaluations."""
    data_wait: float
    """Share of the time spent waiting for data."""
    step_seconds: float
    """Time per step, with saves and without evaluations."""
    row_seconds: float
    """Time between two rows, likewise."""


@dataclass(frozen=True, kw_only=True)
class LastCheckpoint:
    """The newest complete checkpoint."""

    step: int
    age: float
    """In seconds."""


@dataclass(frozen=True, kw_only=True)
class Start:
    """The newest start; ``None`` where nothing tells."""

    number: int | None
    """1 for the first start of the run."""
    age: float | None
    """In seconds."""
    ranks: int | None
    host: str | None
    """Of the first rank."""
    job: str | None
    """Slurm's id."""
    job_starts: int | None
    """Starts of that job since its newest checkpoint."""


@dataclass(frozen=True, kw_only=True)
class LastError:
    """The run's last error."""

    text: str
    """One line."""
    age: float | None
    """In seconds; ``None`` if it is from a log file."""
    before_this_start: bool


@dataclass(frozen=True, kw_only=True)
class Status:
    """The status of one run; ``None`` where its files do not tell."""

    run: str
    """Its folder, as given."""
    state: State
    """``silent``: it has not said that it ended, but nothing changes. ``saved``: a signal stopped it."""
    state_age: float | None
    """Seconds since it ended, or since this start began."""
    sign_of_life_age: float
    """Seconds since one of its files changed."""
    message: str
    """What the run said when it was asked to stop."""
    step: int
    steps: int | None
    """Total."""
    samples_seen: int
    """Pairs, over all ranks."""
    skipped: dict[str, int]
    """Samples skipped since the run began, by reason, most first."""
    recent: Recent | None
    eta_seconds: float | None
    """Time to the last step at the recent speed."""
    checkpoint: LastCheckpoint | None
    start: Start
    error: LastError | None
    unreadable: list[str]
    """Files of the run that are damaged, one line each."""


class _Row(Foreign):
    """The columns of a row of ``metrics.jsonl`` that are shown."""

    step: Count
    samples_seen: Count
    loss: float
    samples_per_second: float
    steps_per_second: float
    data_wait: float
    checkpoint_stall_seconds: float = 0.0
    skipped: dict[str, Count] = {}


class _Config(Foreign):
    steps: Size | None = None


class _Saved(Foreign):
    """What ``trainer.json`` says about progress."""

    samples_seen: Count
    skipped: dict[str, Count]
    config: _Config


def read_status(folder: Path) -> Status:
    """The status of the run in ``folder``.

    Raises:
        UserError: there is no such folder, or no run in it.
    """
    if not folder.is_dir():
        raise UserError(f"{shown(folder)}: no such folder; name the `output` folder of a run")
    now = time.time()
    checkpoints = complete_folders(folder / "checkpoints")
    silence = now - _last_sign_of_life(folder, checkpoints)
    unreadable: list[str] = []
    state = _unless_damaged(lambda: read_state(folder), unreadable)
    starts = _unless_damaged(lambda: read_starts(folder), unreadable)
    rows = _unless_damaged(lambda: _read_rows(folder / METRICS, unreadable), unreadable) or []
    checkpoint = None
    if checkpoints:
        age = now - _changed(checkpoints[-1] / MANIFEST)
        checkpoint = LastCheckpoint(step=step_of(checkpoints[-1]), age=max(0.0, age))
    step, samples_seen, skipped, steps = 0, 0, {}, state.steps if state is not None else None
    if rows:
        step, samples_seen, skipped = rows[-1].step, rows[-1].samples_seen, rows[-1].skipped
    if checkpoint is not None and (checkpoint.step > step or steps is None):
        saved = _unless_damaged(lambda: read_json(checkpoints[-1] / TRAINER, _Saved), unreadable)
        if saved is not None:
            steps = steps or saved.config.steps
            if checkpoint.step > step:
                step, samples_seen, skipped = checkpoint.step, saved.samples_seen, saved.skipped
    recent = _recent(rows)
    return Status(
        run=str(folder),
        state=_judge(folder, state, recent, silence, done=steps is not None and step >= steps),
        state_age=max(0.0, now - state.since) if state is not None else None,
        sign_of_life_age=max(0.0, silence),
        message=state.message if state is not None else "",
        step=step,
        steps=steps,
        samples_seen=samples_seen,
        skipped=dict(sorted(skipped.items(), key=lambda item: (-item[1], item[0]))),
        recent=recent,
        eta_seconds=(steps - step) * recent.step_seconds if recent and steps is not None and step < steps else None,
        checkpoint=checkpoint,
        start=_start(state, starts, now),
        error=_error(folder, state, now),
        unreadable=unreadable,
    )


def _last_sign_of_life(folder: Path, checkpoints: Sequence[Path]) -> float:
    """When a file of the run last changed, in seconds since 1970.

    Raises:
        UserError: there are no files of a run.
    """
    times = [_changed(folder / name) for name in (STATE, STARTS, METRICS, "evaluations.jsonl")]
    times += [_changed(path) for path in folder.glob("slurm-*.log")]
    times += [_changed(path / MANIFEST) for path in checkpoints]
    if not any(times):
        raise UserError(
            f"{shown(folder)}: not a run: no {STATE}, {METRICS} or checkpoints in it; name the `output` folder of a run"
        )
    return max(*times, *(_changed(path) for path in (folder / "checkpoints").glob(".step-*.partial")), 0.0)


def _changed(path: Path) -> float:
    """When the file last changed; 0 if it is missing, perhaps only just removed."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _unless_damaged(read: Callable[[], Found], unreadable: list[str]) -> Found | None:
    try:
        return read()
    except UserError as error:
        unreadable.append(str(error))
        return None


def _read_rows(path: Path, unreadable: list[str]) -> list[_Row]:
    """The newest rows, oldest first. The last line is often half written; the first other one that is not a row is
    added to ``unreadable``, and all such lines are left out."""
    if not path.exists():
        return []
    rows: list[_Row] = []
    damage: list[str] = []
    for line in reversed(read_tail(path, most=_MOST_BYTES).split(b"\n")[:-1]):
        row = _unless_damaged(partial(parse_json, line, _Row, path), damage)
        if row is not None and row.steps_per_second > 0 and row.samples_per_second > 0:
            rows.append(row)
        if len(rows) > _RECENT:
            break
    unreadable += damage[:1]
    return rows[::-1]


def _recent(rows: Sequence[_Row]) -> Recent | None:
    if not rows:
        return None
    steps = pairs = seconds = waited = stalled = 0.0
    taken = rows[1:] or rows
    for before, row in zip(rows[:-1] or rows, taken, strict=True):
        num = max(1, row.step - before.step)
        took = num / row.steps_per_second
        steps += num
        pairs += took * row.samples_per_second
        seconds += took
        waited += took * row.data_wait
        stalled += row.checkpoint_stall_seconds
    return Recent(
        loss=rows[-1].loss,
        samples_per_second=pairs / seconds,
        data_wait=waited / seconds,
        step_seconds=(seconds + stalled) / steps,
        row_seconds=(seconds + stalled) / len(taken),
    )


def _judge(folder: Path, state: RunState | None, recent: Recent | None, silence: float, *, done: bool) -> State:
    if state is not None and state.state != "running":
        return state.state
    if state is None and done:
        return "finished"
    if silence > max(_PATIENCE_S, _PATIENCE_ROWS * recent.row_seconds if recent is not None else 0):
        return "silent"
    # The trainer opens the metrics once everything is built.
    return "starting" if _changed(folder / METRICS) < _changed(folder / STATE) else "running"


def _start(state: RunState | None, starts: Starts | None, now: float) -> Start:
    job = state.job if state is not None else None
    return Start(
        number=state.starts if state is not None else None,
        age=max(0.0, now - state.started) if state is not None else None,
        ranks=state.ranks if state is not None else None,
        host=state.host if state is not None else None,
        job=job or (starts.job if starts is not None else None),
        job_starts=starts.starts if starts is not None and job in (None, starts.job) else None,
    )


def _error(folder: Path, state: RunState | None, now: float) -> LastError | None:
    """The error of the newest start if there is one, else of an earlier start; rather from the trainer than a log."""
    ours = None
    if state is not None and state.error is not None:
        earlier = state.error.time < state.started
        ours = LastError(text=state.error.text, age=max(0.0, now - state.error.time), before_this_start=earlier)
    log = newest_log(folder)
    if log is None or (ours is not None and not ours.before_this_start):
        return ours
    found = last_error(log)
    if found is None:
        return ours
    text, of_last_start = found
    earlier = not of_last_start or (state is not None and _changed(log) < state.started)
    return ours if earlier and ours is not None else LastError(text=text, age=None, before_this_start=earlier)
