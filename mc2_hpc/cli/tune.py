"""``mc2 tune``."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from mc2_hpc.cli.json_result import STDOUT, add_json_flag, write_result
from mc2_hpc.cli.numbers import amount, whole
from mc2_hpc.cli.slurm_flags import NO_JOB, add_slurm_flags
from mc2_hpc.errors import UserError

if TYPE_CHECKING:
    from mc2_hpc.tuning.machines import Machine
    from mc2_hpc.tuning.trial import Runner

SUMMARY = "find the settings with which a run trains the most pairs per second"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="values that override the file's")
    parser.add_argument("--trials", type=whole(1, 1000), default=16, help="most settings to measure [16]")
    parser.add_argument("--minutes", type=amount, default=30.0, help="most time for them [30]")
    parser.add_argument("--steps", type=whole(1, 10_000), default=8, help="measured in each of the first trials [8]")
    parser.add_argument(
        "--processes", type=whole(1, 4096), help="ranks on this machine [one per GPU, or a single one without]"
    )
    parser.add_argument("--synthetic", action="store_true", help="train on generated pairs in place of the run's data")
    parser.add_argument(
        "--caption-tokens", type=amount, default=18.0, help="mean tokens of a caption, to plan memory [18]"
    )
    parser.add_argument("--gpu", help="with --slurm: h100, ... or a YAML file, as for mc2 plan, to plan memory")
    parser.add_argument("--out", type=Path, help="folder of the trials and results [runs/tune/CONFIG]")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write a copy of the config with the best settings")
    add_json_flag(parser)
    add_slurm_flags(parser)


def run(arguments: argparse.Namespace) -> int:
    from mc2_hpc.tuning.report import require_matplotlib, summary, table, write_config, write_report
    from mc2_hpc.tuning.space import text_of
    from mc2_hpc.tuning.tune import tune

    out = arguments.out or Path("runs/tune") / arguments.config.stem
    options = _slurm_options(arguments)
    if arguments.dry_run:
        print(_first_script(arguments, options, out), end="")
        return 0
    require_matplotlib()
    machine, runner = _cluster(options, arguments.gpu) if options is not None else (None, None)
    tuning = tune(
        arguments.config,
        arguments.overrides,
        out,
        trials=arguments.trials,
        minutes=arguments.minutes,
        steps=arguments.steps,
        ranks=arguments.processes,
        synthetic=arguments.synthetic,
        caption_tokens=arguments.caption_tokens,
        machine=machine,
        runner=runner,
    )
    write_report(tuning, out)
    if arguments.write is not None:
        write_config(tuning, arguments.config, arguments.overrides, arguments.write)
    if arguments.json:
        write_result(tuning.to_json(), arguments.json)
    if arguments.json != STDOUT:
        print("\n".join([*table(tuning), "", *summary(tuning)]))
        words = [str(arguments.config), *arguments.overrides, *text_of(tuning.best.settings)]
        run_as = [str(arguments.write)] if arguments.write is not None else words
        print(f"mc2 train {' '.join(run_as)}")
        print(f"{out / 'best.yaml'}, tune.json and tune.png")
    return 0


def _slurm_options(arguments: argparse.Namespace) -> dict[str, str] | None:
    from mc2_hpc.training.slurm import parse_options

    if arguments.slurm is None:
        if arguments.dry_run:
            raise UserError(NO_JOB)
        if arguments.gpu is not None:
            raise UserError("--gpu is for --slurm: without it, this machine's own memory counts")
        return None
    if arguments.processes is not None:
        raise UserError("--processes is for ranks on this machine: with --slurm, give nodes=N and gpus=N or ranks=N")
    return parse_options(arguments.slurm)


def _first_script(arguments: argparse.Namespace, options: dict[str, str] | None, out: Path) -> str:
    from mc2_hpc.config import load_config
    from mc2_hpc.tuning.cluster import example_script

    config = load_config(arguments.config, arguments.overrides)
    return example_script(config, out, options or {}, steps=arguments.steps, minutes=arguments.minutes)


def _cluster(options: dict[str, str], gpu: str | None) -> "tuple[Machine, Runner]":
    from mc2_hpc.tuning.cluster import SlurmRunner, cluster_machine

    return cluster_machine(options, gpu=gpu), SlurmRunner(options)
