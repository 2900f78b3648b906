"""datatrove's executors run the tasks of a stage: in this process, in processes of this machine, or on Ray.

The executor of several processes runs in a process of its own, in a group of its own, while this one reads the tasks'
records. So progress is shown, a worker that is killed is noticed (datatrove's pool would wait for it for ever), and
no process outlives this one, however it ends.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import dill
from datatrove.executor import LocalPipelineExecutor, RayPipelineExecutor
from datatrove.executor.base import DistributedEnvVars, PipelineExecutor
from datatrove.utils.logging import logger

from mc2_hpc.errors import UserError
from mc2_hpc.jobs.engines import Local, Ray
from mc2_hpc.jobs.tasks import IsDone, RunTask, TaskFiles, Work
from mc2_hpc.jobs.watch import Watch

STALL_S = 180.0
"""An executor none of whose tasks is at work for so long is taken for dead."""
SILENCE_S = 120.0
"""A task on another machine that leaves no heartbeat for so long is taken for dead."""


class InProcessExecutor(PipelineExecutor):
    """The tasks one after another in this process, with datatrove's markers and logs."""

    def __init__(self, step: RunTask, tasks: int):
        super().__init__([step], str(step.logs))
        self.tasks = tasks

    def run(self) -> None:
        for task in self.get_incomplete_ranks():
            self._run_for_rank(task)

    @property
    def world_size(self) -> int:
        return self.tasks

    def get_distributed_env(self, node_rank: int = -1) -> DistributedEnvVars:
        return {
            "datatrove_node_ips": "localhost",
            "datatrove_cpus_per_task": "-1",
            "datatrove_mem_per_cpu": "-1",
            "datatrove_gpus_on_node": "-1",
            "datatrove_executor": "LOCAL",
        }


@contextmanager
def quiet_datatrove() -> Iterator[None]:
    """Keep what datatrove logs in this process off the console."""
    logger.disable("datatrove")
    try:
        yield
    finally:
        logger.enable("datatrove")


def run_in_process(logs: Path, tasks: int, work: Work, is_done: IsDone, watch: Watch) -> None:
    """Do every incomplete task in this process."""
    with quiet_datatrove():
        InProcessExecutor(RunTask(logs, in_process=(work, is_done, watch.tell)), tasks).run()


def run_in_processes(logs: Path, tasks: int, work: Work, is_done: IsDone, engine: Local | Ray, watch: Watch) -> None:
    """Do every incomplete task in worker processes or on Ray.

    Raises:
        UserError: a worker was killed.
        RuntimeError: an error of the program in one of them.
    """
    TaskFiles(logs).write_work(work, is_done)
    workers = engine.workers or -1
    executor: PipelineExecutor
    with quiet_datatrove():
        if isinstance(engine, Ray):
            executor = RayPipelineExecutor([RunTask(logs, heartbeat=True)], tasks, workers, logging_dir=str(logs))
        else:
            executor = LocalPipelineExecutor([RunTask(logs)], tasks, workers, logging_dir=str(logs))
    path = logs / "executor.pik"
    with open(path, "wb") as stream:
        dill.dump(executor, stream)
    log = logs / "executor.log"
    with _own_group([sys.executable, "-m", "mc2_hpc.jobs.executor_process", str(path)], log) as process:
        code = None
        while code is None:
            code = process.poll()  # before the records are read: what was written last is seen
            began = time.monotonic()
            watch.read(logs / "events")
            lost = watch.lost_here(logs / "events") if isinstance(engine, Local) else watch.silent(SILENCE_S)
            watch.raise_crash()  # which ends the workers too
            if lost:
                raise watch.killed(lost, log)
            if code is None:
                _check_stall(watch, log)
                time.sleep(max(0.1, 10 * (time.monotonic() - began)))
    if code:
        if watch.at_work or code < 0:
            raise watch.killed(watch.at_work, log)
        raise UserError(f"{watch.stage}: the executor ended with code {code}; {log} tells why: {_last_line(log)}")


def _check_stall(watch: Watch, log: Path) -> None:
    if not watch.at_work and time.monotonic() - watch.last_event > STALL_S:
        raise watch.killed([], log)


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


@contextmanager
def _own_group(command: list[str], log: Path) -> Iterator[subprocess.Popen]:
    """A process with its own group, all of which is gone when the context is left or this process ends."""
    # One thread of numerical libraries a worker: the workers are the parallelism.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open(log, "wb") as stream:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=stream, stderr=stream, env=environment, start_new_session=True
        )
    try:
        yield process
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass  # the group is gone already
        process.wait()
        assert process.stdin is not None
        process.stdin.close()
