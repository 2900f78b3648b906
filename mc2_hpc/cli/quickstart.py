"""``mc2 quickstart``."""

import argparse
from pathlib import Path

SUMMARY = "the whole job on this machine, in minutes"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, default=Path("runs/quickstart"), help="folder of all results")
    parser.add_argument("--processes", type=int, help="training processes (default: the GPUs found, or 2)")


def run(arguments: argparse.Namespace) -> int:
    from mc2_hpc.quickstart.run import run_quickstart

    return run_quickstart(arguments.output, processes=arguments.processes)
