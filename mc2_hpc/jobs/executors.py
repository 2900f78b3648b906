"""datatrove's executors run the tasks of a stage: in this process, in processes on this machine, or on Ray.

A multi-process executor runs in its own process and process group, while this process reads the tasks' records. So this
process can show progress and detect killed workers (datatrove's pool would wait for them forever), and no process
outlives it, however it ends.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from datatrove.executor import LocalPipelineExecutor, RayPipelineExecutor, SlurmPipelineExecutor
from datatrove.executor.base import DistributedEnvVars, PipelineExecutor
from datatrove.utils.logging import logger

from mc2_hpc.errors import UserError
from mc2_hpc.jobs.engines import Local, Ray
from mc2_hpc.jobs.tasks import RunTask
from mc2_hpc.jobs.watch import Watch

STALL_S = 180.0
"""An executor without an active task for this long counts as dead."""
SILENCE_S = 120.0
"""A task on another machine without a heartbeat for this long counts as dead."""


class InProcessExecutor(PipelineExecutor):
    """Runs the tasks one after another in this process, with datatrove's markers and logs."""

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
    """Keep datatrove's logs in this process off the console."""
    logger.disable("datatrove")
    try:
        yield
    finally:
        logger.enable("datatrove")


@dataclass(frozen=True)
class ExecutorSpec:
    """An executor that another process creates and runs; see ``executor_process``."""

    kind: Literal["local", "ray", "slurm"]
    logs: str
    tasks: int
    workers: int = -1
    max_array_size: int = 1001
    """Maximum size of a Slurm array; an array's task needs it to compute its task number in the stage."""

    def command(self) -> list[str]:
        """The command that runs the executor."""
        return [sys.executable, "-m", "mc2_hpc.jobs.executor_process", json.dumps(asdict(self))]

    def make(self) -> PipelineExecutor:
        """The executor, in the process that runs it."""
        logs, where = Path(self.logs), {"tasks": self.tasks, "workers": self.workers, "logging_dir": self.logs}
        if self.kind == "ray":
            return RayPipelineExecutor([RunTask(logs, heartbeat=True)], **where)
        if self.kind == "local":
            return LocalPipelineExecutor([RunTask(logs)], **where)
        # Already inside a job, which has its time and partition.
        step = RunTask(logs, fail=True)
        return SlurmPipelineExecutor([step], time="", partition="", max_array_size=self.max_array_size, **where)


def run_in_process(logs: Path, tasks: int, watch: Watch) -> None:
    """Run every incomplete task in this process."""
    with quiet_datatrove():
        InProcessExecutor(RunTask(logs, listener=watch.tell), tasks).run()


def run_in_processes(logs: Path, tasks: int, engine: Local | Ray, watch: Watch) -> None:
    """Run every incomplete task in worker processes or on Ray.

    Raises:
        UserError: a worker was killed.
        RuntimeError: one of them hit a bug in the program.
    """
    kind: Literal["local", "ray"] = "local" if isinstance(engine, Local) else "ray"
    spec = ExecutorSpec(kind, str(logs.absolute()), tasks, engine.workers or -1)
    log = logs / "executor.log"
    with _own_group(spec.command(), log) as process:
        code = None
        while code is None:
            code = process.poll()  # before reading the records, so that the last events are seen
            began = time.monotonic()
            watch.read(logs / "events")
            lost = watch.lost_here(logs / "events") if isinstance(engine, Local) else watch.silent(SILENCE_S)
            watch.raise_crash()  # this ends the workers too
            if lost:
                raise watch.killed(lost, log)
            if code is None:
                _check_stall(watch, log)
                time.sleep(max(0.1, 10 * (time.monotonic() - began)))
    if code:
        if watch.at_work or code < 0:
            raise watch.killed(watch.at_work, log)
        raise UserError(f"{watch.stage}: the executor ended with code {code}; see {log}: {_last_line(log)}")


def _check_stall(watch: Watch, log: Path) -> None:
    if not watch.at_work and time.monotonic() - watch.last_event > STALL_S:
        raise watch.killed([], log)


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


@contextmanager
def _own_group(command: list[str], log: Path) -> Iterator[subprocess.Popen]:
    """A process with its own group, which is killed when the context is left or this process ends."""
    # One thread per worker for numerical libraries, because the workers are parallel.
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
            pass  # the group is already gone
        process.wait()
        assert process.stdin is not None
        process.stdin.close()
