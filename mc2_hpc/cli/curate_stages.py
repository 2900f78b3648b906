"""``mc2 curate match | balance | pack | run``: the stages of curation."""

import argparse
import json
import os
from pathlib import Path
from typing import Any

from mc2_hpc.errors import UserError


def add_actions(actions: Any) -> None:
    from_pool = argparse.ArgumentParser(add_help=False)
    from_pool.add_argument("pool", type=Path, help="folder of <shard>.parquet and <shard>.tar, or of WebDataset tars")
    matching = argparse.ArgumentParser(add_help=False)
    matching.add_argument("--metadata", type=Path, required=True, help="folder of <lang>.json")
    matching.add_argument("--mode", choices=("fixed", "compat"), default="fixed", help="matching rules [fixed]")
    threshold = argparse.ArgumentParser(add_help=False)
    threshold.add_argument("--t-en", type=int, required=True, help="English threshold: 20000 (400M) to 170000 (2.5B)")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--out", type=Path, required=True, help="folder to write")
    common.add_argument("--workers", type=int, default=os.cpu_count(), help="processes [all cores]")
    match = actions.add_parser("match", parents=[from_pool, matching, common], help="captions to the entries in them")
    balance = actions.add_parser("balance", parents=[threshold, common], help="counts, thresholds, probabilities")
    balance.add_argument("matched", type=Path, help="what match wrote")
    balance.add_argument("--metadata", type=Path, required=True, help="folder of <lang>.json")
    pack = actions.add_parser("pack", parents=[from_pool, common], help="training shards of what matched")
    pack.add_argument("--matched", type=Path, required=True, help="what match wrote")
    every = actions.add_parser("run", parents=[from_pool, matching, threshold, common], help="all three in turn")
    for parser, stage in ((match, _match), (balance, _balance), (pack, _pack), (every, _run)):
        parser.set_defaults(action=_reporting(stage))


def _reporting(stage: Any) -> Any:
    """The stage as an action: shows its progress and prints what it returns."""

    def action(arguments: argparse.Namespace) -> int:
        from mc2_hpc.terminal import progress

        if arguments.workers < 1:
            raise UserError(f"--workers {arguments.workers}: must be at least 1")
        with progress() as report:
            result = stage(arguments, report)
        print(json.dumps(result, indent=2, ensure_ascii=False))
        return 0

    return action


def _match(arguments: argparse.Namespace, report: Any) -> dict[str, Any]:
    from mc2_hpc.curation import pipeline

    return pipeline.match(
        arguments.pool,
        arguments.metadata,
        arguments.out,
        arguments.mode,
        workers=arguments.workers,
        progress=report,
    )


def _balance(arguments: argparse.Namespace, report: Any) -> dict[str, Any]:
    from mc2_hpc.curation import pipeline

    return pipeline.balance(arguments.matched, arguments.metadata, arguments.out, arguments.t_en, progress=report)


def _pack(arguments: argparse.Namespace, report: Any) -> dict[str, Any]:
    from mc2_hpc.curation import pipeline

    return pipeline.pack(arguments.pool, arguments.matched, arguments.out, workers=arguments.workers, progress=report)


def _run(arguments: argparse.Namespace, report: Any) -> dict[str, Any]:
    from mc2_hpc.curation import pipeline

    return pipeline.run(
        arguments.pool,
        arguments.metadata,
        arguments.out,
        t_en=arguments.t_en,
        mode=arguments.mode,
        workers=arguments.workers,
        progress=report,
    )
