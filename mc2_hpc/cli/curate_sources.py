"""``mc2 curate extract | deduplicate | decontaminate``: into the caption pool, and out of it."""

import argparse
from pathlib import Path
from typing import Any

from mc2_hpc.cli.curate_stages import engine_flags, on_engine
from mc2_hpc.cli.numbers import whole


def add_actions(actions: Any) -> None:
    common = argparse.ArgumentParser(add_help=False, parents=[engine_flags()])
    common.add_argument("--out", type=Path, required=True, help="folder to write")
    extract = actions.add_parser("extract", parents=[common], help="Common Crawl's WAT or WARC files to a caption pool")
    extract.add_argument("archives", type=Path, nargs="+", help="files, or folders searched at any depth")
    extract.set_defaults(action=on_engine(_extract))

    deduplicate = actions.add_parser("deduplicate", parents=[common], help="every image key in one shard, texts once")
    deduplicate.add_argument("pool", type=Path, help="folder of <shard>.parquet, such as extract wrote")
    deduplicate.add_argument("--shards", type=whole(1, 1 << 20), help="to write [one for each million rows]")
    deduplicate.set_defaults(action=on_engine(_deduplicate))

    decontaminate = actions.add_parser("decontaminate", parents=[common], help="training shards without benchmarks")
    decontaminate.add_argument("shards", type=Path, help="folder of training shards")
    decontaminate.add_argument(
        "--against", type=Path, required=True, help="folder of benchmark pictures or tars of them"
    )
    decontaminate.add_argument(
        "--max-distance",
        type=whole(0, 64),
        default=6,
        metavar="BITS",
        help="of 64, up to which pictures count as one [6]",
    )
    decontaminate.set_defaults(action=on_engine(_decontaminate))


def _extract(arguments: argparse.Namespace, engine: Any, report: Any) -> dict[str, Any] | None:
    from mc2_hpc.curation.pool.common_crawl import extract

    return extract(arguments.archives, arguments.out, engine=engine, progress=report)


def _deduplicate(arguments: argparse.Namespace, engine: Any, report: Any) -> dict[str, Any] | None:
    from mc2_hpc.curation.pool.url_dedup import deduplicate

    return deduplicate(arguments.pool, arguments.out, shards=arguments.shards, engine=engine, progress=report)


def _decontaminate(arguments: argparse.Namespace, engine: Any, report: Any) -> dict[str, Any] | None:
    from mc2_hpc.curation.pool.decontaminate import decontaminate

    return decontaminate(
        arguments.shards,
        arguments.against,
        arguments.out,
        max_distance=arguments.max_distance,
        engine=engine,
        progress=report,
    )
