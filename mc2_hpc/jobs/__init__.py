"""Work on many shards, on this machine, on Slurm or on Ray: ``run(plan, engine, progress)``. Independent of captions.

A plan is a tuple of stages, and a stage is a declaration: inputs, outputs, one piece of work. Read ``stages.py`` first,
then ``driver.py``, which runs a plan, and ``tasks.py``, which runs on the workers:

    stages          what to do                             folders        settings and counters beside the outputs
    driver          run a plan                             named          work as a name and JSON, no pickles
    engines         where: Local, Slurm, Ray               slurm_options  the grammar of ``--slurm``
    tasks, events   a stage cut into tasks; their record   watch          progress, failures, killed workers
    executors       datatrove's, in a separate process     slurm, slurm_queue  array jobs; the queue
"""

from mc2_hpc.jobs.driver import run
from mc2_hpc.jobs.engines import Engine, Local, Ray, Slurm
from mc2_hpc.jobs.folders import REDO, STATS, open_folder, stats_path, sum_kept, sum_stats
from mc2_hpc.jobs.stages import Plan, Stage, has_outputs
from mc2_hpc.jobs.watch import Progress

__all__ = [
    "REDO",
    "STATS",
    "Engine",
    "Local",
    "Plan",
    "Progress",
    "Ray",
    "Slurm",
    "Stage",
    "has_outputs",
    "open_folder",
    "run",
    "stats_path",
    "sum_kept",
    "sum_stats",
]
