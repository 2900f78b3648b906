"""``state.json`` in a run's folder: how its newest start is doing or how it ended, and the run's last error.

Written at the beginning and at the end of each start; in between, ``metrics.jsonl`` grows. A killed run leaves it as it
was, so readers also look at when the run's files last changed (``mc2_hpc.training.status``), without importing torch.
"""

import logging
import os
import time
from pathlib import Path
from typing import Literal

import msgspec

from mc2_hpc.errors import UserError
from mc2_hpc.reading.json_file import File, Size, read_json
from mc2_hpc.storage import write_json

logger = logging.getLogger(__name__)

STATE = "state.json"
_MOST_CHARACTERS = 2000
"""Of an error."""

Name = Literal["running", "finished", "saved", "failed"]
"""``saved``: a signal asked the run to stop, and its state is saved."""


class RunError(File):
    """Why a start failed."""

    time: float
    """Seconds since 1970."""
    text: str
    """One line."""


class RunState(File):
    """``state.json``."""

    state: Name
    since: float
    """When it was written, in seconds since 1970."""
    started: float
    """When the newest start began, in seconds since 1970."""
    starts: Size
    """Starts so far, including this one."""
    steps: Size
    """Total of the run."""
    global_batch: Size
    ranks: Size
    host: str
    """Of the first rank."""
    job: str | None
    """Slurm's id of the job, if it is one."""
    message: str = ""
    """What the run said when it was asked to stop."""
    error: RunError | None = None
    """The run's last error, perhaps of an earlier start."""


def read_state(folder: Path) -> RunState | None:
    """The run's state, or ``None`` if the file is missing (no start yet, or one of an earlier version).

    Raises:
        UserError: the file is damaged.
    """
    path = folder / STATE
    return read_json(path, RunState) if path.exists() else None


def begun(folder: Path, *, steps: int, global_batch: int, ranks: int) -> RunState:
    """The state of a start that begins now; counts it, and keeps the last error."""
    try:
        before = read_state(folder)
    except UserError as error:
        logger.warning("%s; it is replaced", error)
        before = None
    now = time.time()
    return RunState(
        state="running",
        since=now,
        started=now,
        starts=before.starts + 1 if before is not None else 1,
        steps=steps,
        global_batch=global_batch,
        ranks=ranks,
        host=os.uname().nodename,
        job=os.environ.get("SLURM_JOB_ID"),
        error=before.error if before is not None else None,
    )


def ended(state: RunState, name: Name, *, message: str = "") -> RunState:
    """``state`` after the start has ended now; ``message`` is the error if it ``failed``."""
    now = time.time()
    text = " ".join(message.split())[:_MOST_CHARACTERS]
    if name == "failed":
        return msgspec.structs.replace(state, state=name, since=now, error=RunError(time=now, text=text))
    return msgspec.structs.replace(state, state=name, since=now, message=text)


def write_state(folder: Path, state: RunState) -> None:
    """Write ``state.json`` atomically. A run does not need it, so a full disk or a folder there is only logged."""
    try:
        write_json(folder / STATE, msgspec.to_builtins(state))
    except (OSError, UserError) as error:
        logger.warning("%s is not up to date: %s", folder / STATE, error)
