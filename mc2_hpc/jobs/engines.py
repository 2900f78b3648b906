"""Where the tasks of a stage run: processes of this machine, a Slurm array, or a Ray cluster."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from mc2_hpc.errors import UserError
from mc2_hpc.jobs.slurm_options import check_option

MAX_TASKS = 1000
"""Tasks of a stage on a cluster unless told otherwise: Slurm's own limit of an array is 1001."""
TASKS_PER_WORKER = 8
"""Tasks of a stage on this machine for each of several workers, so that they end at about the same time."""
SLURM_KEYS = {"cpus-per-task": 1, "mem-per-cpu-gb": 1, "max-array-size": 1}
"""Keys of ``--slurm`` that are counts: cores of a task [1], gigabytes of a core [2], tasks of an array [1001]."""


@dataclass(frozen=True)
class Local:
    """Processes of this machine; one worker is this process itself."""

    workers: int = 1
    tasks: int | None = None
    """Tasks that the shards are cut into; None is one for one worker, else :data:`TASKS_PER_WORKER` for each."""

    def __post_init__(self) -> None:
        _at_least_one("workers", self.workers)
        _at_least_one("tasks", self.tasks)


@dataclass(frozen=True)
class Slurm:
    """An array job a stage, each waiting for the one before."""

    options: Mapping[str, str]
    """``partition`` and ``time``, and any of :data:`SLURM_KEYS` and of sbatch's options; see
    :mod:`mc2_hpc.jobs.slurm_options`."""
    tasks: int | None = None
    """Tasks that the shards are cut into; None is one a shard, at most :data:`MAX_TASKS`."""
    workers: int | None = None
    """Tasks that run at a time; None leaves it to the cluster."""
    wait: bool = False
    """Stay until the jobs have ended, rather than return when they are submitted."""

    def __post_init__(self) -> None:
        _at_least_one("workers", self.workers)
        _at_least_one("tasks", self.tasks)
        options = {key.replace("_", "-"): value for key, value in self.options.items()}
        for key, value in options.items():
            check_option(key, value, SLURM_KEYS)
        object.__setattr__(self, "options", options)
        for key in ("partition", "time"):
            if not self.options.get(key):
                raise UserError(f"--executor slurm: no {key}; give --slurm partition=NAME time=HH:MM:SS")
        if "SLURM_ARRAY_TASK_ID" in os.environ:
            raise UserError(
                "--executor slurm: this is a task of a Slurm array already; submit from a login node or job"
            )


@dataclass(frozen=True)
class Ray:
    """The Ray cluster that RAY_ADDRESS names, or one started on this machine."""

    workers: int | None = None
    """Tasks that run at a time; None is all."""
    tasks: int | None = None
    """As of :class:`Slurm`."""

    def __post_init__(self) -> None:
        _at_least_one("workers", self.workers)
        _at_least_one("tasks", self.tasks)


Engine = Local | Slurm | Ray


def num_tasks(engine: Engine, num_shards: int) -> int:
    """Number of tasks that the shards of a stage are cut into."""
    most = engine.tasks
    if most is None and isinstance(engine, Local):
        most = 1 if engine.workers == 1 else TASKS_PER_WORKER * engine.workers
    return min(num_shards, most or MAX_TASKS)


def _at_least_one(name: str, value: int | None) -> None:
    if value is not None and value < 1:
        raise UserError(f"--{name} {value}: must be at least 1")
