"""``run``: run a plan on an engine. Finished work is skipped, so the same call resumes a killed run."""

from collections.abc import Sequence
from contextlib import ExitStack
from importlib.util import find_spec
from typing import Any

from mc2_hpc.errors import UserError
from mc2_hpc.jobs.engines import Engine, Local, Ray, Slurm
from mc2_hpc.jobs.slurm_queue import is_submitted, refuse_live_job
from mc2_hpc.jobs.stages import Plan, Stage
from mc2_hpc.jobs.tasks import plan_tasks
from mc2_hpc.jobs.watch import Progress, Watch
from mc2_hpc.storage import exclusive_folder

BUSY_S = 10.0
"""How long to wait for another process in the same folder before raising an error."""


def run(plan: Plan, engine: Engine | None = None, progress: Progress | None = None) -> dict[str, Any] | None:
    """Process every unfinished shard of every stage, one stage after the other.

    Args:
        engine: where to run; one worker on this machine by default.

    Returns:
        the plan's result; None if the stages were only submitted to Slurm

    Raises:
        UserError: some shards failed (all others of that stage are done), or a worker was killed.
    """
    engine = engine or Local()
    if isinstance(engine, Slurm):
        return plan.result() if _run_on_slurm(plan.stages, engine, progress) else None
    if isinstance(engine, Ray) and find_spec("ray") is None:
        raise UserError("--executor ray: Ray is not installed: pip install 'mc2_hpc[ray]'")
    for stage in plan.stages:
        _run_here(stage, engine, progress)
    return plan.result()


def _run_here(stage: Stage, engine: Local | Ray, progress: Progress | None) -> None:
    """Run one stage in this process, in processes on this machine, or on Ray."""
    with exclusive_folder(stage.folder, wait_s=BUSY_S):
        if is_submitted(stage):
            refuse_live_job(stage)
        undone = stage.undone()
        watch = Watch(stage.name, stage.unit, len(stage.inputs), len(stage.inputs) - len(undone), progress)
        if not undone:
            return
        tasks = plan_tasks(stage, engine, undone)
        from mc2_hpc.jobs import executors  # loads datatrove, so only when there is work

        if isinstance(engine, Local) and (engine.workers == 1 or len(undone) == 1):
            executors.run_in_process(stage.logs, tasks, watch)
        else:
            executors.run_in_processes(stage.logs, tasks, engine, watch)
        watch.raise_failures()


def _run_on_slurm(stages: Sequence[Stage], engine: Slurm, progress: Progress | None) -> bool:
    """Submit unfinished work unless it is already submitted; wait for it if the engine says so.

    Returns:
        whether everything is done
    """
    from mc2_hpc.jobs import slurm  # loads datatrove

    with ExitStack() as stack:
        for folder in sorted({stage.folder for stage in stages}):
            stack.enter_context(exclusive_folder(folder, wait_s=BUSY_S))
        jobs = slurm.find_or_submit(stages, engine)
    if jobs and not engine.wait:
        slurm.tell(stages, jobs)
        return False
    slurm.wait(stages, jobs, progress)
    return True
