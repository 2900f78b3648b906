"""``mc2 curate dedup-images``."""

import argparse
from typing import Any

from mc2_hpc.cli.curate_engine import engine_flags, engine_of, run_plan
from mc2_hpc.cli.numbers import whole


def add_action(actions: Any) -> None:
    """Add the action and its flags."""
    parser = actions.add_parser(
        "dedup-images", parents=[engine_flags()], help="keep one of the images that are copies of each other"
    )
    parser.add_argument("pool", help="folder of <shard>.tar, with <shard>.parquet or captions inside")
    parser.add_argument(
        "--max-distance", type=whole(0, 16), default=6, metavar="BITS", help="in which 64-bit hashes may differ [6]"
    )
    parser.add_argument(
        "--max-check",
        type=whole(0, 192),
        default=40,
        metavar="BITS",
        help="in which the 192 bits that confirm them may differ [40]",
    )
    parser.set_defaults(action=_run)


def _run(arguments: argparse.Namespace) -> int:
    from mc2_hpc.curation.dedup_images import plan_dedup_images

    engine = engine_of(arguments)
    plan = plan_dedup_images(
        arguments.pool, arguments.out, max_distance=arguments.max_distance, max_check=arguments.max_check
    )
    run_plan(plan, engine)
    return 0
