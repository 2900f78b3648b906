"""``mc2 train ... --slurm``."""

import argparse

from mc2_hpc.cli.slurm_flags import NO_JOB, add_slurm_flags
from mc2_hpc.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_slurm_flags(parser)


def run(arguments: argparse.Namespace) -> int:
    """Submit the run and print the job id, or print its script."""
    from pathlib import Path

    from mc2_hpc.config import load_config
    from mc2_hpc.jobs.batch_scripts import submit
    from mc2_hpc.training import slurm

    if arguments.slurm is None:
        raise UserError(NO_JOB)
    if arguments.processes is not None or arguments.restarts:
        raise UserError("--processes and --restarts are for ranks on this machine: leave them out with --slurm")
    config = load_config(arguments.config, arguments.overrides)
    words = [str(arguments.config), *arguments.overrides, f"--timeout={arguments.timeout:g}"]
    script = slurm.fill_script(config, words, slurm.parse_options(arguments.slurm))
    if arguments.dry_run:
        print(script, end="")
        return 0
    Path(config.output).mkdir(parents=True, exist_ok=True)  # Slurm does not create the log's folder
    print(submit(script))
    return 0
