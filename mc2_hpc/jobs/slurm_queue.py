"""The Slurm jobs that stages were submitted as, and whether they are still in the queue."""

import logging
import shutil
import subprocess
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mc2_hpc.errors import UserError, first_line
from mc2_hpc.jobs.named import read_plain, write_plain
from mc2_hpc.jobs.stages import Stage

POLL_S = 5.0
_NO_ANSWER_S = 600.0
"""How long squeue may fail before an error is raised."""
_COMMAND_S = 300.0
"""Longest wait for one answer."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """``job.json``, in a stage's logs."""

    job: str
    """Its id; if the tasks are several arrays, the last one's."""
    shards: int
    """Number of shards that it has to process."""


def _job_path(stage: Stage) -> Path:
    return stage.logs / "job.json"


def is_submitted(stage: Stage) -> bool:
    """Whether the stage was ever submitted."""
    return _job_path(stage).is_file()


def read_job(stage: Stage) -> Job:
    """The job that the stage was last submitted as."""
    return read_plain(_job_path(stage), Job)


def write_job(stage: Stage, job: Job) -> None:
    """Record the job that the stage is submitted as."""
    write_plain(_job_path(stage), job)


def live_jobs(stages: Sequence[Stage]) -> dict[str, str]:
    """Ids of the stages' jobs that are still in Slurm's queue, by stage."""
    ids = {}
    for stage in stages:
        if is_submitted(stage):
            ids[stage.name] = read_job(stage).job
    in_queue = queued_jobs() if ids else set()
    return {name: job for name, job in ids.items() if job in in_queue}


def refuse_live_job(stage: Stage) -> None:
    """Raise a :class:`UserError` if a Slurm job is still running this stage."""
    if shutil.which("squeue") is None:
        log.warning(
            "%s: was submitted to Slurm before; this machine cannot tell whether that job has ended", stage.name
        )
    elif jobs := live_jobs([stage]):
        raise UserError(
            f"{stage.folder}: Slurm job {jobs[stage.name]} is using it; wait for the job (--executor slurm --wait), "
            "or cancel it"
        )


def queued_jobs() -> set[str]:
    """Ids of this user's jobs in the queue; for arrays, without the task number.

    Raises:
        UserError: squeue fails or does not answer for a long time.
    """
    deadline = time.monotonic() + _NO_ANSWER_S
    while True:
        try:
            done = subprocess.run(
                ["squeue", "--me", "-h", "-o", "%F"], capture_output=True, text=True, timeout=_COMMAND_S
            )
            if done.returncode == 0:
                return set(done.stdout.split())
            reason = done.stderr.strip()
        except subprocess.TimeoutExpired:
            reason = f"nothing within {_COMMAND_S:g} s"
        if time.monotonic() > deadline:
            raise UserError(f"squeue has not answered for {_NO_ANSWER_S:.0f} s ({reason}); jobs continue")
        log.warning("squeue does not answer (%s); retrying", reason)
        time.sleep(POLL_S)


def cancel(jobs: Iterable[str]) -> None:
    """Cancel jobs; those that have ended are left as they are, and a failure is only a warning."""
    ids = list(jobs)
    if not ids:
        return
    try:
        done = subprocess.run(["scancel", *ids], capture_output=True, text=True, timeout=_COMMAND_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        log.warning("Slurm jobs %s may still run: %s", ", ".join(ids), first_line(error))
    else:
        if done.returncode:
            log.warning("scancel %s: %s", " ".join(ids), done.stderr.strip())
