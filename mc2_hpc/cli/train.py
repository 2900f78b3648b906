"""``mc2 train``."""

import argparse
import logging
import os
import sys
from pathlib import Path

from mc2_hpc.errors import UserError

SUMMARY = "train a model from a config file"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="values that differ from the file's")
    parser.add_argument("--processes", type=int, help="start this many processes on this machine (one a GPU)")
    parser.add_argument("--timeout", type=float, default=600, help="seconds a rank waits for the others [600]")


def run(arguments: argparse.Namespace) -> int:
    from mc2_hpc.config import load_config

    # Bad input shows here, once, before any process is started.
    config = load_config(arguments.config, arguments.overrides)
    if arguments.processes is not None:
        _launch(arguments)
    import warnings

    from mc2_hpc.distributed import process_group
    from mc2_hpc.training.trainer import NonFiniteError, Trainer, exclusive_run

    # DeepSpeed calls collectives by names that torch is about to retire; nothing a user can do about it.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    with process_group(arguments.timeout) as ranks:
        logging.getLogger("mc2_hpc").setLevel(logging.INFO if ranks.is_first else logging.WARNING)
        try:
            with exclusive_run(config, ranks):
                Trainer(config, ranks).train()
        except NonFiniteError as error:
            print(f"mc2: {error}", file=sys.stderr)
            return 1
    return 0


def _launch(arguments: argparse.Namespace) -> None:
    """Replace this process by torchrun with the wanted number of processes."""
    if arguments.processes < 1:
        raise UserError(f"--processes {arguments.processes}: must be at least 1")
    if "WORLD_SIZE" in os.environ:
        raise UserError("--processes inside a launched job (WORLD_SIZE is set): leave it out")
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(arguments.processes)]
    command = ["-m", "mc2_hpc.cli", *(["--debug"] if arguments.debug else []), "train"]
    command += ["--timeout", str(arguments.timeout), str(arguments.config), *arguments.overrides]
    os.execv(sys.executable, [sys.executable, "-m", *launcher, *command])
