"""``mc2 train ... --slurm``."""

import argparse

from mc2_hpc.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--slurm",
        nargs="+",
        action="extend",
        metavar="key=value",
        help="submit as a Slurm job: nodes=N gpus=N (per node) time=T partition=P account=A ... (docs/slurm.md)",
    )
    parser.add_argument("--dry-run", action="store_true", help="with --slurm: print the batch script, do not submit")


def run(arguments: argparse.Namespace) -> int:
    """Submit the run and print the job id, or print its script."""
    from pathlib import Path

    from mc2_hpc.config import load_config
    from mc2_hpc.training import slurm

    if arguments.slurm is None:
        raise UserError("--dry-run prints the batch script of a Slurm job: add --slurm nodes=N gpus=N ...")
    if arguments.processes is not None or arguments.restarts:
        raise UserError("--processes and --restarts are for ranks on this machine: leave them out with --slurm")
    config = load_config(arguments.config, arguments.overrides)
    words = [str(arguments.config), *arguments.overrides, f"--timeout={arguments.timeout:g}"]
    script = slurm.fill_script(config, words, slurm.parse_options(arguments.slurm))
    if arguments.dry_run:
        print(script, end="")
        return 0
    Path(config.output).mkdir(parents=True, exist_ok=True)  # Slurm does not create the log's folder
    print(slurm.submit(script))
    return 0
