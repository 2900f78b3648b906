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
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="values that override the file's")
    parser.add_argument(
        "--processes", type=whole(1, 4096), help="start this many processes on this machine (one per GPU)"
    )
    parser.add_argument(
        "--restarts", type=whole(0), default=0, help="with --processes: restart all this often if one crashes [0]"
    )
    parser.add_argument("--timeout", type=seconds, default=600, help="seconds that a rank waits for others [600]")
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
    from mc2_hpc.planning.planned_peak import planned_peak
    from mc2_hpc.training.lost_rank import LostRankError, naming_the_wait
    from mc2_hpc.training.run_folder import exclusive_run, recorded_start
    from mc2_hpc.training.stop import LOST_RANK, SAVED, Stopped
    from mc2_hpc.training.trainer import NonFiniteError, SaveError, train_run

    # DeepSpeed calls collectives by deprecated names; users can do nothing about that.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
    try:
        with naming_the_wait(rank, lambda: "while starting"), process_group(arguments.timeout) as ranks:
            logging.getLogger("mc2_hpc").setLevel(logging.INFO if ranks.is_first else logging.WARNING)
            with exclusive_run(Path(config.output), ranks), recorded_start(config, ranks):
                with planned_peak(config, ranks) as after_row:
                    train_run(config, ranks, stop, after_row)
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
    """Exit one of several ranks, after its files are closed.

    Threads of the communication libraries outlive their groups and sometimes abort the interpreter's shutdown, which
    looks to a launcher like a killed rank.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _launch(arguments: argparse.Namespace) -> int:
    """Start the requested number of processes, each running this command without ``--processes``."""
    from mc2_hpc.config import load_config
    from mc2_hpc.training.launch import launch

    if arguments.processes is None:
        raise UserError("--restarts needs --processes: elsewhere the launcher restarts (torchrun, Slurm)")
    if "WORLD_SIZE" in os.environ:
        raise UserError("--processes inside a launched job (WORLD_SIZE is set): leave it out")
    # Bad input fails here, once, before any process starts.
    config = load_config(arguments.config, arguments.overrides)
    if arguments.restarts and not config.checkpoint.resume:
        raise UserError(
            f"--restarts {arguments.restarts} with checkpoint.resume=false: restarts would begin from scratch"
        )
    command = [sys.executable, "-m", "mc2_hpc.cli", *(["--debug"] if arguments.debug else []), "train"]
    command += ["--timeout", str(arguments.timeout), str(arguments.config), *arguments.overrides]
    return launch(command, processes=arguments.processes, restarts=arguments.restarts, stop_s=arguments.timeout)
