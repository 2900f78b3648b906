"""``mc2 features``."""

import argparse
from pathlib import Path

from mc2_hpc.cli.numbers import whole

SUMMARY = "compute features of a run's data once, to train with a frozen image tower or with a teacher"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "config",
        type=Path,
        help="YAML file of the run, which names their folder: data.features or, with --teacher, distill.features",
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key.sub=value", help="settings that override those of the file"
    )
    parser.add_argument(
        "--teacher",
        metavar="MODEL",
        help="features of images and captions under this model, into distill.features, in place of the run's own",
    )
    parser.add_argument(
        "--batch", type=whole(1, 1 << 20), default=256, help="images or captions encoded at a time [256]"
    )


def run(arguments: argparse.Namespace) -> int:
    from mc2_hpc.config import load_config
    from mc2_hpc.distributed import process_group
    from mc2_hpc.training.image_features import compute_features, compute_teacher_features

    config = load_config(arguments.config, arguments.overrides)
    with process_group() as ranks:
        if arguments.teacher is None:
            folder, computed = compute_features(config, ranks, batch=arguments.batch)
        else:
            folder, computed = compute_teacher_features(config, arguments.teacher, ranks, batch=arguments.batch)
        if ranks.is_first:
            print(f"{folder}: {computed} shards computed")
    return 0
