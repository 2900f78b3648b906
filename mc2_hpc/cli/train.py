"""``mc2 train``."""

import argparse
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from mc2_hpc.cli import train_slurm
from mc2_hpc.cli.numbers import seconds, whole
from mc2_hpc.errors import UserError

if TYPE_CHECKING:
    from mc2_hpc.training.stop import StopRequest

SUMMARY = "train a model from a config file"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="values that differ from the file's")
    parser.add_argument(
        "--processes", type=whole(1, 4096), help="start this many processes on this machine (one a GPU)"
    )
    parser.add_argument(
        "--restarts", type=whole(0), default=0, help="with --processes: start all again this often if one dies [0]"
    )
    parser.add_argument("--timeout", type=seconds, default=600, help="seconds a rank waits for the others [600]")
    train_slurm.add_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    from mc2_hpc.training.stop import StopRequest

    if arguments.slurm or arguments.dry_run:
        return train_slurm.run(arguments)
    if arguments.processes is not None or arguments.restarts:
        return _launch(arguments)
    stop = StopRequest()
    with stop.listening():
        code = _train(arguments, stop)
    if int(os.environ.get("WORLD_SIZE", os.environ.get("SLURM_STEP_NUM_TASKS", "1"))) > 1:
        _leave(code)
    return code


def _train(arguments: argparse.Namespace, stop: "StopRequest") -> int:
    import warnings

    from mc2_hpc.config import load_config

    config = load_config(arguments.config, arguments.overrides)
    from mc2_hpc.data.workers import DataStalled
    from mc2_hpc.distributed import process_group
    from mc2_hpc.training.lost_rank import LostRankError, naming_the_wait
    from mc2_hpc.training.run_folder import exclusive_run
    from mc2_hpc.training.stop import LOST_RANK, SAVED, Stopped
    from mc2_hpc.training.trainer import NonFiniteError, SaveError, Trainer

    # DeepSpeed calls collectives by names that torch is about to retire; nothing a user can do about it.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
    try:
        with naming_the_wait(rank, lambda: "while starting"), process_group(arguments.timeout) as ranks:
            logging.getLogger("mc2_hpc").setLevel(logging.INFO if ranks.is_first else logging.WARNING)
            with exclusive_run(Path(config.output), ranks):
                Trainer(config, ranks, stop).train()
    except (NonFiniteError, SaveError) as error:
        print(f"mc2: {error}", file=sys.stderr)
        return 1
    except (LostRankError, DataStalled) as error:
        print(f"mc2: {error}", file=sys.stderr)
        return LOST_RANK
    except Stopped as stopped:
        if ranks.is_first:
            print(f"mc2: {stopped}", file=sys.stderr)
        return SAVED
    return 0


def _leave(code: int) -> NoReturn:
    """End one of several ranks, whose files are closed by now.

    Threads of the communication libraries outlive their groups and have been seen to abort the interpreter's own
    shutdown, which a launcher takes for a rank that was killed.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _launch(arguments: argparse.Namespace) -> int:
    """Start the wanted number of processes, each of which runs this command without ``--processes``."""
    from mc2_hpc.config import load_config
    from mc2_hpc.training.launch import launch

    if arguments.processes is None:
        raise UserError("--restarts needs --processes: elsewhere the launcher restarts (torchrun, Slurm)")
    if "WORLD_SIZE" in os.environ:
        raise UserError("--processes inside a launched job (WORLD_SIZE is set): leave it out")
    # Bad input shows here, once, before any process is started.
    config = load_config(arguments.config, arguments.overrides)
    if arguments.restarts and not config.checkpoint.resume:
        raise UserError(f"--restarts {arguments.restarts} with checkpoint.resume=false: a restart would begin anew")
    command = [sys.executable, "-m", "mc2_hpc.cli", *(["--debug"] if arguments.debug else []), "train"]
    command += ["--timeout", str(arguments.timeout), str(arguments.config), *arguments.overrides]
    return launch(command, processes=arguments.processes, restarts=arguments.restarts, stop_s=arguments.timeout)
