"""``mc2 quickstart``."""

import argparse
from pathlib import Path

from mc2_hpc.cli.numbers import whole

SUMMARY = "run the whole pipeline on this machine, in minutes"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, default=Path("runs/quickstart"), help="folder for all results")
    parser.add_argument("--processes", type=whole(1, 4096), help="training processes (default: one per GPU, or 2)")


def run(arguments: argparse.Namespace) -> int:
    from mc2_hpc.quickstart.run import run_quickstart

    return run_quickstart(arguments.output, processes=arguments.processes)
