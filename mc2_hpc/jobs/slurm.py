"""Stages as Slurm array jobs, each depending on the one before: submit, look up, wait."""

import logging
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datatrove.executor import SlurmPipelineExecutor

from mc2_hpc.errors import UserError
from mc2_hpc.jobs import slurm_queue
from mc2_hpc.jobs.engines import SLURM_KEYS, Slurm
from mc2_hpc.jobs.executors import ExecutorSpec, quiet_datatrove
from mc2_hpc.jobs.slurm_options import check_text, directive
from mc2_hpc.jobs.slurm_queue import Job, cancel, is_submitted, live_jobs, queued_jobs, read_job, write_job
from mc2_hpc.jobs.stages import Stage
from mc2_hpc.jobs.tasks import RunTask, plan_tasks
from mc2_hpc.jobs.watch import Progress, Watch

log = logging.getLogger(__name__)


class _Executor(SlurmPipelineExecutor):
    """datatrove's executor with our own script: datatrove's does not quote, and its tasks load a pickle."""

    def get_launch_file_contents(self, sbatch_args: dict[str, Any], run_script: str) -> str:
        if {"mem", "mem-per-gpu"} & sbatch_args.keys():  # memory is requested in one way only
            del sbatch_args["mem-per-cpu"]
        # Slurm expands a single per cent sign.
        sbatch_args["output"] = sbatch_args["error"] = f"{self.slurm_logs_folder.replace('%', '%%')}/%A_%a.out"
        (step,) = self.pipeline
        spec = ExecutorSpec("slurm", str(step.logs), self.tasks, max_array_size=self.max_array_size)
        python_folder = shlex.quote(str(Path(sys.executable).parent))
        lines = [
            "#!/bin/bash",
            *(directive(name, str(value)) for name, value in sbatch_args.items()),
            f'export PATH={python_folder}:"$PATH" OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1',
            f"exec {shlex.join(spec.command())}",
        ]
        return "\n".join(lines) + "\n"

    def launch_merge_stats(self) -> None:
        """Skip datatrove's final job, which sums counters that our tasks do not have."""


def find_or_submit(stages: Sequence[Stage], engine: Slurm) -> dict[str, str]:
    """Ids of the stages' jobs, by stage: those in the queue, or else new ones for unfinished work.

    Raises:
        UserError: Slurm is not installed or rejects the jobs.
    """
    for program in ("sbatch", "squeue"):
        if shutil.which(program) is None:
            raise UserError(f"--executor slurm: no {program} on this machine; run on a login node of the cluster")
    if jobs := live_jobs(stages):
        return jobs
    _tell_last_failures(stages)
    return _submit(stages, engine)


def tell(stages: Sequence[Stage], jobs: dict[str, str]) -> None:
    """Log each stage's progress."""
    for stage in (stage for stage in stages if stage.name in jobs):
        done = len(stage.inputs) - len(stage.undone())
        facts = (stage.name, done, len(stage.inputs), stage.unit, jobs[stage.name])
        log.info("%s: %d/%d %s done, Slurm job %s", *facts)


def _submit(stages: Sequence[Stage], engine: Slurm) -> dict[str, str]:
    """Submit the stages that have unfinished work; returns their job ids."""
    jobs: dict[str, str] = {}
    before: _Executor | None = None
    try:
        for stage in stages:
            # After a stage that changes something, later stages get all shards; their tasks skip those that are done.
            todo = list(stage.inputs) if before else stage.undone()
            if not todo:
                continue
            tasks = plan_tasks(stage, engine, todo)
            before = _executor(stage, engine, tasks, before)
            with quiet_datatrove():
                before.run()
            jobs[stage.name] = str(before.job_id)
            write_job(stage, Job(jobs[stage.name], len(todo)))
    except BaseException as error:
        cancel(jobs.values())
        if isinstance(error, subprocess.CalledProcessError):
            raise UserError(f"{stage.name}: sbatch refused the job (its message is above); fix --slurm") from None
        raise
    return jobs


def _executor(stage: Stage, engine: Slurm, tasks: int, before: _Executor | None) -> _Executor:
    logs = stage.logs.resolve()
    check_text("--out", str(logs))
    options = dict(engine.options)
    known = {key.replace("-", "_"): int(options.pop(key)) for key in SLURM_KEYS if key in options}
    return _Executor(
        [RunTask(logs, fail=True)],
        tasks,
        options.pop("time"),
        options.pop("partition"),
        **known,
        qos=options.pop("qos", ""),
        workers=engine.workers or -1,
        job_name=options.pop("job-name", f"mc2-{stage.name.replace(' ', '-')}"),
        # A job whose dependency failed would wait in the queue forever.
        sbatch_args={"kill-on-invalid-dep": "yes", **options},
        requeue="no-requeue" not in options,
        depends=before,
        job_id_retriever=_job_id,
        logging_dir=str(logs),
        slurm_logs_folder=str(logs / "slurm_logs"),
    )


def _job_id(output: str) -> str:
    found = re.search(r"\d+", output)
    if not found:
        raise UserError(f"sbatch gave no job id: {output.strip()!r}")
    return found.group()


def wait(stages: Sequence[Stage], jobs: dict[str, str], progress: Progress | None) -> None:
    """Follow the jobs until they end.

    Raises:
        UserError: a stage is not done; the message names what failed in the first such stage.
    """
    for stage in (stage for stage in stages if stage.name in jobs):
        done_before = len(stage.inputs) - read_job(stage).shards
        watch = Watch(stage.name, stage.unit, len(stage.inputs), done_before, progress)
        waiting = True
        while waiting:
            waiting = jobs[stage.name] in queued_jobs()  # before reading the records, so that the last events are seen
            watch.read(stage.logs / "events")
            if waiting:
                time.sleep(slurm_queue.POLL_S)
        watch.raise_crash()
        watch.raise_failures()
        left = stage.undone()
        if left:
            raise _ended_early(stage, watch, left)


def _ended_early(stage: Stage, watch: Watch, left: list[str]) -> UserError:
    output = stage.logs / "slurm_logs"
    if watch.at_work:
        return watch.killed(watch.at_work, output)
    return UserError(
        f"{stage.name}: its Slurm job has ended but {len(left)} of {len(stage.inputs)} {stage.unit} are not done, the "
        f"first is {left[0]!r}; see {output}, then run the same command again"
    )


def _tell_last_failures(stages: Sequence[Stage]) -> None:
    """Log what failed in the last submission's jobs, since nobody may have waited for them."""
    for stage in stages:
        if is_submitted(stage) and (stage.logs / "events").is_dir():
            watch = Watch(stage.name, stage.unit, len(stage.inputs), 0, None)
            watch.read(stage.logs / "events")
            for shard, message in sorted({**watch.crashes, **watch.failures}.items())[:3]:
                log.warning("%s: failed before at %r: %s", stage.name, shard, message.strip().splitlines()[-1])
