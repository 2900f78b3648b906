"""Trials as Slurm jobs, each the shipped ``slurm/train.sbatch`` on as many nodes as the run is to have.

All trials of a round are in the queue at the same time. Each job's id is in its trial's folder, so the same command
finds the jobs of one that was killed, and submits none of them again.
"""

import logging
import math
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mc2_hpc.config import RunConfig
from mc2_hpc.jobs import slurm_queue
from mc2_hpc.jobs.batch_scripts import submit
from mc2_hpc.jobs.slurm_queue import cancel, queued_jobs
from mc2_hpc.planning.machines import read_gpu
from mc2_hpc.planning.plan import RESERVE_BYTES
from mc2_hpc.reading.json_file import File, read_json
from mc2_hpc.storage import write_json
from mc2_hpc.training.slurm import fill_script, shape_of
from mc2_hpc.tuning.machines import HOST_RESERVE_BYTES, Machine, packages
from mc2_hpc.tuning.record import TrialResult
from mc2_hpc.tuning.trial import Trial, read_result

logger = logging.getLogger(__name__)

_JOB = "job.json"
_SPARE_MINUTES = 5
"""Of a job beyond its trial's own bound, for starting: if this process is killed, Slurm still ends the job."""
_COMMAND_S = 60
_LATE_S = 30
"""Longest wait for the files of a job that has ended to be seen here."""
_NOT_ABOUT_THE_TRIAL = ("NODE_FAIL", "BOOT_FAIL", "CANCELLED", "PREEMPTED", "REVOKED", "DEADLINE")
"""States of jobs that ended for a reason of the cluster."""


def cluster_machine(options: Mapping[str, str], *, gpu: str | None) -> Machine:
    """The nodes that ``--slurm`` asks for.

    Args:
        gpu: name or file, as for ``mc2 plan``; without it, the memory of GPUs is not known.

    Raises:
        UserError: no such GPU, or neither GPUs nor ranks are given.
    """
    shape = shape_of(options)
    cores, node_bytes = _smallest_node(options.get("partition"))
    device_type = "cuda" if shape.gpus_per_node else "cpu"
    memory = None
    if gpu is not None:
        memory = int(read_gpu(gpu).memory_bytes) - RESERVE_BYTES
    elif device_type == "cpu" and node_bytes is not None:
        memory = node_bytes // shape.ranks_per_node - HOST_RESERVE_BYTES
    return Machine(
        device_type=device_type,
        name="Slurm " + " ".join(f"{key}={value}" if value else key for key, value in sorted(options.items())),
        ranks=shape.ranks,
        ranks_per_node=shape.ranks_per_node,
        cores=cores or shape.ranks_per_node,
        memory_bytes=memory,
        **packages(device_type),
    )


def _smallest_node(partition: str | None) -> tuple[int | None, int | None]:
    """Cores and bytes of memory of the smallest node; None where Slurm does not say."""
    only = ["--partition", partition] if partition else []
    try:
        lines = _answer("sinfo", "--noheader", *only, "--format", "%c %m").splitlines()
        nodes = [[int(word.rstrip("+")) for word in line.split()] for line in lines]
    except (OSError, ValueError, subprocess.SubprocessError):
        return None, None
    if not nodes:
        return None, None
    return min(cores for cores, _ in nodes), min(megabytes for _, megabytes in nodes) << 20


class _Job(File):
    job: str


@dataclass(frozen=True)
class SlurmRunner:
    """Trials as jobs with the options of ``--slurm``, as :func:`mc2_hpc.training.slurm.parse_options` reads them."""

    options: Mapping[str, str]

    def script(self, trial: Trial) -> str:
        """The trial's batch script."""
        minutes = math.ceil(trial.bound_s / 60) + _SPARE_MINUTES
        # A trial that fails would fail again.
        options = {"job-name": "mc2-tune", "time": str(minutes), **self.options, "no-requeue": ""}
        options.pop("requeue", None)
        return fill_script(trial.run_config, [str(trial.yaml.absolute())], options)

    def run(self, trials: Sequence[Trial], report: Callable[[TrialResult], None], *, until: float) -> None:
        """Run the trials at the same time; those in the queue at ``until`` are cancelled, as after any exception."""
        if time.monotonic() >= until:
            return
        jobs: dict[str, Trial] = {}
        try:
            for trial in trials:
                jobs[self._job_of(trial)] = trial
            self._follow(jobs, report, until)
        finally:
            cancel(jobs)

    def _job_of(self, trial: Trial) -> str:
        """The trial's job: that of an earlier call if it is in the queue or has run to its end, or else a new one."""
        path = trial.folder / _JOB
        if path.is_file():
            job = read_json(path, _Job, cure="delete it to submit the trial again").job
            if job in queued_jobs() or read_result(trial, seconds=0.0, timed_out=False).ok:
                logger.info("Slurm job %s, of an earlier call: %s", job, trial.name)
                return job
        trial.prepare()
        Path(trial.run_config.output).mkdir(parents=True, exist_ok=True)  # Slurm does not create the log's folder
        job = submit(self.script(trial))
        write_json(path, {"job": job})
        logger.info("Slurm job %s: %s, %d steps", job, trial.name, trial.steps)
        return job

    def _follow(self, jobs: dict[str, Trial], report: Callable[[TrialResult], None], until: float) -> None:
        """Report each job's result when it has ended, and remove it from ``jobs``."""
        began: dict[str, float] = {}
        while jobs:
            queued, now = queued_jobs(), time.monotonic()
            for job, trial in list(jobs.items()):
                if job in queued:
                    if job not in began and _state(job) == "RUNNING":
                        began[job] = now
                    if now - began.get(job, now) <= trial.bound_s:
                        continue
                    cancel([job])
                    report(read_result(trial, seconds=now - began[job], timed_out=True))
                else:
                    self._report_end(job, trial, now - began.get(job, now), report)
                del jobs[job]
            if now > until:
                return
            if jobs:
                time.sleep(slurm_queue.POLL_S)

    def _report_end(self, job: str, trial: Trial, seconds: float, report: Callable[[TrialResult], None]) -> None:
        state = _state(job)
        if state in _NOT_ABOUT_THE_TRIAL:
            logger.warning("Slurm job %s ended as %s, so it has no result: %s", job, state, trial.name)
            return
        deadline = time.monotonic() + _LATE_S
        result = read_result(trial, seconds=seconds, timed_out=False, words=f"Slurm job {job} ended as {state}")
        while state == "COMPLETED" and not result.ok and time.monotonic() < deadline:
            time.sleep(1)  # a shared file system may show them late
            result = read_result(trial, seconds=seconds, timed_out=False)
        report(result)


def example_script(config: RunConfig, out: Path, options: Mapping[str, str], *, steps: int, minutes: float) -> str:
    """The script of the first trial, for ``--dry-run``."""
    trial = Trial(
        key="first",
        config=config,
        settings={},
        steps=steps,
        folder=out / "trials" / "first",
        ranks=shape_of(options).ranks,
        bound_s=60 * minutes,
    )
    return SlurmRunner(options).script(trial)


def _state(job: str) -> str:
    """Slurm's word for the job's state; empty if it has forgotten the job."""
    try:
        text = _answer("scontrol", "show", "job", "--oneliner", job)
    except (OSError, subprocess.SubprocessError):
        return ""
    fields = dict(word.split("=", 1) for word in text.split() if "=" in word)
    return fields.get("JobState", "")


def _answer(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=_COMMAND_S, check=True).stdout
