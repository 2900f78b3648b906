"""``mc2 curate dedup-images``."""

import argparse
import os
from typing import TYPE_CHECKING, Any

from mc2_hpc.cli.curate_engine import engine_flags, engine_of, run_plan
from mc2_hpc.cli.numbers import whole

if TYPE_CHECKING:
    from mc2_hpc.jobs.named import Named


def add_action(actions: Any) -> None:
    """Add the action and its flags."""
    parser = actions.add_parser(
        "dedup-images", parents=[engine_flags()], help="remove copies of images, keeping one image of each group"
    )
    parser.add_argument("pool", help="folder of <shard>.tar files, with captions inside or in <shard>.parquet")
    parser.add_argument(
        "--max-distance",
        type=whole(0, 16),
        default=6,
        metavar="BITS",
        help="most bits in which the 64-bit hashes of two copies differ [6]",
    )
    parser.add_argument(
        "--max-check",
        type=whole(0, 192),
        default=40,
        metavar="BITS",
        help="most bits in which the 192 bits that confirm a copy differ [40]",
    )
    parser.add_argument(
        "--memory-gb",
        type=whole(1, 10_000),
        default=2,
        metavar="N",
        help="memory for hashes in each search worker, in GB; with more, the search reads them fewer times [2]",
    )
    add_feature_flags(parser)
    parser.set_defaults(action=_run)


def add_feature_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that choose an encoder; see :func:`encoder_of`."""
    group = parser.add_argument_group("features (docs/images.md)")
    group.add_argument(
        "--features",
        nargs="+",
        metavar=("MODEL", "key=value"),
        help="also compare image features, from the folder of a CLIP model or from package.module.Class key=value ...",
    )
    group.add_argument(
        "--feature-distance",
        type=whole(0, 16),
        default=10,
        metavar="BITS",
        help="most bits in which one of the four 64-bit hashes of two copies' features differs [10]",
    )
    group.add_argument(
        "--feature-check",
        type=whole(0, 192),
        default=46,
        metavar="BITS",
        help="most bits in which the other three differ in total [46]",
    )


def _run(arguments: argparse.Namespace) -> int:
    from mc2_hpc.curation.dedup_images import plan_dedup_images

    engine = engine_of(arguments)
    options = ("max_distance", "max_check", "feature_distance", "feature_check", "memory_gb")
    plan = plan_dedup_images(
        arguments.pool,
        arguments.out,
        features=encoder_of(arguments.features),
        **{name: getattr(arguments, name) for name in options},
    )
    run_plan(plan, engine)
    return 0


def encoder_of(words: list[str] | None) -> "Named | None":
    """The encoder that the words of ``--features`` name."""
    from mc2_hpc.curation.copies.features import parse_encoder
    from mc2_hpc.jobs.named import extend_search_path

    if not words:
        return None
    extend_search_path([os.getcwd()])  # for the user's own modules; a console script does not search it
    return parse_encoder(words)
