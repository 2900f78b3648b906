"""``--slurm`` and ``--dry-run``, the same in every command that fills in a shipped batch script."""

import argparse

NO_JOB = "--dry-run prints the batch script of a Slurm job: add --slurm nodes=N gpus=N ..."
"""The error for ``--dry-run`` alone."""


def add_slurm_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--slurm",
        nargs="+",
        action="extend",
        metavar="key=value",
        help="submit as a Slurm job: nodes=N gpus=N (per node) time=T partition=P account=A ... (docs/slurm.md)",
    )
    parser.add_argument("--dry-run", action="store_true", help="with --slurm: print the batch script, do not submit")
