"""Where a plan runs: the flags that every stage of ``mc2 curate`` shares, and running a plan with them."""

import argparse
import json
import os
from typing import TYPE_CHECKING, Any

from mc2_hpc.cli.numbers import whole
from mc2_hpc.errors import UserError

if TYPE_CHECKING:
    from mc2_hpc.jobs import Engine, Plan


def engine_flags() -> argparse.ArgumentParser:
    """The flags, as a parent parser; see :func:`engine_of`."""
    flags = argparse.ArgumentParser(add_help=False)
    add_engine_flags(flags)
    return flags


def add_engine_flags(flags: argparse.ArgumentParser) -> None:
    """Add the flags of :func:`engine_flags` to a parser."""
    flags.add_argument("--out", required=True, metavar="FOLDER", help="folder to write")
    group = flags.add_argument_group("where it runs")
    group.add_argument("--executor", choices=("local", "slurm", "ray"), help="[local; slurm if --slurm is given]")
    group.add_argument(
        "--workers", type=whole(1), metavar="N", help="tasks at a time [local: all cores; else no limit]"
    )
    group.add_argument(
        "--tasks",
        type=whole(1),
        metavar="N",
        help="number of tasks to divide the shards into [slurm, ray: one per shard, at most 1000]",
    )
    group.add_argument(
        "--slurm",
        nargs="+",
        action="extend",
        default=[],
        metavar="key=value",
        help="submit as Slurm jobs: partition=P time=T, cpus_per_task, mem_per_cpu_gb, max_array_size, and sbatch's "
        "options (docs/slurm.md)",
    )
    group.add_argument("--wait", action="store_true", help="with slurm, wait until the jobs have ended")


def engine_of(arguments: argparse.Namespace) -> "Engine":
    """The engine that the flags of :func:`engine_flags` name.

    Raises:
        UserError: incompatible flags, or a bad value.
    """
    from mc2_hpc.jobs.engines import SLURM_KEYS, Local, Ray, Slurm
    from mc2_hpc.jobs.slurm_options import parse_slurm_options

    executor = arguments.executor or ("slurm" if arguments.slurm else "local")
    if executor != "slurm" and (arguments.slurm or arguments.wait):
        raise UserError(f"--slurm and --wait go with --executor slurm, not {executor}")
    if executor == "slurm":
        options = parse_slurm_options(arguments.slurm, SLURM_KEYS)
        return Slurm(options, arguments.tasks, arguments.workers, arguments.wait)
    if executor == "ray":
        return Ray(arguments.workers, arguments.tasks)
    workers = os.cpu_count() or 1 if arguments.workers is None else arguments.workers
    return Local(workers, arguments.tasks)


def run_plan(plan: "Plan", engine: "Engine") -> dict[str, Any] | None:
    """Run the plan, show its progress, and print its result or that it was submitted."""
    from mc2_hpc import jobs
    from mc2_hpc.terminal import progress

    with progress() as report:
        result = jobs.run(plan, engine, report)
    if result is None:
        print("submitted; run the same command again to see its progress, or with --wait to wait until it ends")
    else:
        print(json.dumps(result, indent=2, ensure_ascii=False))
    return result
