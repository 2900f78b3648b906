"""``mc2 bench``."""

import argparse
import sys
from pathlib import Path

from mc2_hpc.cli.json_result import STDOUT, add_json_flag
from mc2_hpc.cli.slurm_flags import NO_JOB, add_slurm_flags
from mc2_hpc.errors import UserError

SUMMARY = "run a benchmark against its named peer"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", help="benchmark: the <name> of benchmarks/bench_<name>.py")
    add_json_flag(parser)
    parser.add_argument("--quick", action="store_true", help="smoke test in under a minute; do not quote its numbers")
    add_slurm_flags(parser)


def run(arguments: argparse.Namespace) -> int:
    import importlib.util
    import subprocess

    # Benchmarks live beside the package in the repository, not in the wheel.
    folder = Path(importlib.util.find_spec("mc2_hpc").origin).parents[1] / "benchmarks"  # type: ignore[union-attr,arg-type]
    script = folder / f"bench_{arguments.name}.py"
    if not script.is_file():
        known = sorted(path.stem.removeprefix("bench_") for path in folder.glob("bench_*.py"))
        there = f"choose one of {', '.join(known)}" if known else f"no benchmarks in {folder}: use a source checkout"
        raise UserError(f"bench {arguments.name!r}: no such benchmark; {there}")
    if arguments.slurm or arguments.dry_run:
        return _submit(arguments)
    command = [sys.executable, "-m", f"benchmarks.bench_{arguments.name}", *(["--quick"] if arguments.quick else [])]
    if arguments.json:
        command += ["--json", arguments.json if arguments.json == STDOUT else str(Path(arguments.json).absolute())]
    return subprocess.run(command, cwd=folder.parent).returncode


def _submit(arguments: argparse.Namespace) -> int:
    """Submit the benchmark to run on every node of a job and print the job id, or print the script."""
    from mc2_hpc.jobs.batch_scripts import submit
    from mc2_hpc.jobs.bench_job import fill_bench_script

    if arguments.slurm is None:
        raise UserError(NO_JOB)
    if arguments.json:
        raise UserError(
            f"--json {arguments.json} with --slurm: every node writes its own bench-JOB/{arguments.name}-NODE.json; "
            f"leave it out"
        )
    script = fill_bench_script(arguments.name, arguments.slurm, quick=arguments.quick)
    print(script if arguments.dry_run else submit(script), end="" if arguments.dry_run else "\n")
    return 0
