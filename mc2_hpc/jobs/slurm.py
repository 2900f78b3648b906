"""Stages as Slurm array jobs, each depending on the one before: submit, look, wait."""

import logging
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from datatrove.executor import SlurmPipelineExecutor

from mc2_hpc.errors import UserError
from mc2_hpc.jobs.engines import Slurm
from mc2_hpc.jobs.executors import quiet_datatrove
from mc2_hpc.jobs.stages import BUSY_S, JOB, Stage, plan_tasks
from mc2_hpc.jobs.tasks import RunTask, TaskFiles
from mc2_hpc.jobs.watch import Progress, Watch
from mc2_hpc.reading.json_file import Count, File, read_json
from mc2_hpc.storage import exclusive_folder, write_json


class _Job(File):
    """``job.json``: the job of a stage, and how many shards it was to do."""

    job: str
    shards: Count


_POLL_S = 5.0
_NO_ANSWER_S = 600.0
"""How long squeue may fail before that is an error."""
_OF_EXECUTOR = ("cpus_per_task", "mem_per_cpu_gb", "max_array_size")

log = logging.getLogger(__name__)


class _Executor(SlurmPipelineExecutor):
    """Without datatrove's last job, which adds up counters that our tasks do not have."""

    def launch_merge_stats(self) -> None:
        pass


def run_on_slurm(stages: Sequence[Stage], engine: Slurm, progress: Progress | None) -> bool:
    """Submit what is to be done, unless it is submitted already; wait for it if the engine says so.

    Returns:
        whether all is done

    Raises:
        UserError: Slurm is not there or refuses the jobs; or, having waited, some shards are not done.
    """
    for program in ("sbatch", "squeue"):
        if shutil.which(program) is None:
            raise UserError(f"--executor slurm: no {program} on this machine; run on a login node of the cluster")
    with ExitStack() as stack:
        for folder in sorted({stage.folder for stage in stages}):
            stack.enter_context(exclusive_folder(folder, wait_s=BUSY_S))
        jobs = live_jobs(stages)
        if not jobs:
            _tell_last_failures(stages)
            jobs = _submit(stages, engine)
    if not jobs:
        return True
    if not engine.wait:
        for stage in stages:
            if stage.name in jobs:
                left = len(stage.undone())
                done = len(stage.shards) - left
                log.info(
                    "%s: %d/%d %s done, Slurm job %s", stage.name, done, len(stage.shards), stage.unit, jobs[stage.name]
                )
        return False
    _wait(stages, jobs, progress)
    return True


def live_jobs(stages: Sequence[Stage]) -> dict[str, str]:
    """Ids of the stages' jobs that Slurm still has in its queue, by stage."""
    ids = {}
    for stage in stages:
        if (stage.logs / JOB).is_file():
            ids[stage.name] = read_json(stage.logs / JOB, _Job).job
    in_queue = _queue() if ids else set()
    return {name: job for name, job in ids.items() if job in in_queue}


def refuse_live_job(stage: Stage) -> None:
    """Raise a :class:`UserError` if a Slurm job is still doing this stage."""
    if shutil.which("squeue") is None:
        log.warning(
            "%s: was submitted to Slurm before; this machine cannot tell whether that job has ended", stage.name
        )
    elif jobs := live_jobs([stage]):
        raise UserError(
            f"{stage.folder}: Slurm job {jobs[stage.name]} is working there; wait for it (--executor slurm --wait), "
            "or cancel it"
        )


def _submit(stages: Sequence[Stage], engine: Slurm) -> dict[str, str]:
    """Submit the stages that have something to do; returns their job ids."""
    jobs: dict[str, str] = {}
    before: _Executor | None = None
    try:
        for stage in stages:
            # What comes after a stage that will change something has to look again, in its tasks, when its turn comes.
            todo = list(stage.shards) if before else stage.undone()
            if not todo:
                continue
            tasks = plan_tasks(stage, engine, todo)
            TaskFiles(stage.logs).write_work(stage.work, stage.is_done)
            before = _executor(stage, engine, tasks, before)
            with quiet_datatrove():
                before.run()
            jobs[stage.name] = str(before.job_id)
            write_json(stage.logs / JOB, {"job": jobs[stage.name], "shards": len(todo)})
    except BaseException as error:
        if jobs:
            subprocess.run(["scancel", *jobs.values()], check=False)
        if isinstance(error, subprocess.CalledProcessError):
            raise UserError(f"{stage.name}: sbatch refused the job (its message is above); mend --slurm") from None
        raise
    return jobs


def _executor(stage: Stage, engine: Slurm, tasks: int, before: _Executor | None) -> _Executor:
    logs = stage.logs.resolve()
    if re.search(r"\s", str(logs)):
        raise UserError(f"{logs}: Slurm's scripts cannot take a folder with a space in its name; choose another --out")
    options = dict(engine.options)
    known = {key: int(options.pop(key)) for key in _OF_EXECUTOR if key in options}
    return _Executor(
        [RunTask(logs, fail=True)],
        tasks,
        options.pop("time"),
        options.pop("partition"),
        **known,
        qos=options.pop("qos", ""),
        workers=engine.workers or -1,
        job_name=f"mc2-{stage.name.replace(' ', '-')}",
        env_command=f"export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH OMP_NUM_THREADS=1",
        # A job whose dependency failed would wait in the queue for ever.
        sbatch_args={"kill-on-invalid-dep": "yes", **{key.replace("_", "-"): value for key, value in options.items()}},
        depends=before,
        job_id_retriever=_job_id,
        logging_dir=str(logs),
        with_srun=False,
    )


def _job_id(output: str) -> str:
    found = re.search(r"\d+", output)
    if not found:
        raise UserError(f"sbatch gave no job id: {output.strip()!r}")
    return found.group()


def _queue() -> set[str]:
    """Ids of this user's jobs in the queue, those of arrays without the task's number."""
    deadline = time.monotonic() + _NO_ANSWER_S
    while True:
        done = subprocess.run(["squeue", "--me", "-h", "-o", "%F"], capture_output=True, text=True, timeout=300)
        if done.returncode == 0:
            return set(done.stdout.split())
        if time.monotonic() > deadline:
            raise UserError(f"squeue has not answered for {_NO_ANSWER_S:.0f} s ({done.stderr.strip()}); jobs go on")
        log.warning("squeue does not answer (%s); asking again", done.stderr.strip())
        time.sleep(_POLL_S)


def _wait(stages: Sequence[Stage], jobs: dict[str, str], progress: Progress | None) -> None:
    """Follow the jobs to their end.

    Raises:
        UserError: a stage is not done; what failed in the first such stage is named.
    """
    for stage in (stage for stage in stages if stage.name in jobs):
        done_before = len(stage.shards) - read_json(stage.logs / JOB, _Job).shards
        watch = Watch(stage.name, stage.unit, len(stage.shards), done_before, progress)
        waiting = True
        while waiting:
            waiting = jobs[stage.name] in _queue()  # before the records are read: what was written last is seen
            watch.read(stage.logs / "events")
            if waiting:
                time.sleep(_POLL_S)
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
        f"{stage.name}: its Slurm job has ended and {len(left)} of {len(stage.shards)} {stage.unit} are not done, the "
        f"first is {left[0]!r}; {output} tells why; run the same command again"
    )


def _tell_last_failures(stages: Sequence[Stage]) -> None:
    """Say what failed in the jobs of the last submission, which nobody may have waited for."""
    for stage in stages:
        if (stage.logs / JOB).is_file() and (stage.logs / "events").is_dir():
            watch = Watch(stage.name, stage.unit, len(stage.shards), 0, None)
            watch.read(stage.logs / "events")
            for shard, message in sorted({**watch.crashes, **watch.failures}.items())[:3]:
                log.warning("%s: failed before at %r: %s", stage.name, shard, message.strip().splitlines()[-1])
