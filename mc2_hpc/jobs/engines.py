"""Where the tasks of a stage run: processes on this machine, a Slurm array, or a Ray cluster."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from mc2_hpc.errors import UserError
from mc2_hpc.jobs.slurm_options import check_option

MAX_TASKS = 1000
"""Default limit of tasks per stage on a cluster: Slurm's own limit for an array is 1001."""
_MOST = 4096
"""Worker processes on this machine: more would take minutes to start."""
TASKS_PER_WORKER = 8
"""Tasks per worker and stage on this machine, so that several workers end at about the same time."""
SLURM_KEYS = {"cpus-per-task": 1, "mem-per-cpu-gb": 1, "max-array-size": 1}
"""Keys of ``--slurm`` that are counts: cores per task [1], gigabytes per core [2], tasks per array [1001]."""


@dataclass(frozen=True)
class Local:
    """Processes on this machine; a single worker is this process itself."""

    workers: int = 1
    tasks: int | None = None
    """Tasks that the shards are divided into; None: one for a single worker, else :data:`TASKS_PER_WORKER` each."""

    def __post_init__(self) -> None:
        _at_least_one("workers", self.workers)
        _at_least_one("tasks", self.tasks)
        if self.workers > _MOST:
            raise UserError(f"--workers: must be at most {_MOST:,}")


@dataclass(frozen=True)
class Slurm:
    """One array job per stage, each waiting for the one before."""

    options: Mapping[str, str]
    """``partition`` and ``time``, and any of :data:`SLURM_KEYS` and of sbatch's options; see
    :mod:`mc2_hpc.jobs.slurm_options`."""
    tasks: int | None = None
    """Tasks that the shards are divided into; None: one per shard, at most :data:`MAX_TASKS`."""
    workers: int | None = None
    """Tasks that run at a time; None leaves it to the cluster."""
    wait: bool = False
    """Wait until the jobs have ended instead of returning once they are submitted."""

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
                "--executor slurm: this already is a task of a Slurm array; submit from a login node or job"
            )


@dataclass(frozen=True)
class Ray:
    """The Ray cluster that RAY_ADDRESS names, or one started on this machine."""

    workers: int | None = None
    """Tasks that run at a time; None: all."""
    tasks: int | None = None
    """As in :class:`Slurm`."""

    def __post_init__(self) -> None:
        _at_least_one("workers", self.workers)
        _at_least_one("tasks", self.tasks)


Engine = Local | Slurm | Ray


def num_tasks(engine: Engine, num_shards: int) -> int:
    """Number of tasks that the shards of a stage are divided into."""
    most = engine.tasks
    if most is None and isinstance(engine, Local):
        most = 1 if engine.workers == 1 else TASKS_PER_WORKER * engine.workers
    return min(num_shards, most or MAX_TASKS)


def _at_least_one(name: str, value: int | None) -> None:
    if value is not None and value < 1:
        raise UserError(f"--{name} {value}: must be at least 1")
