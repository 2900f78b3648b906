"""``mc2 eval``."""

import argparse
from pathlib import Path

from mc2_hpc.errors import UserError

SUMMARY = "retrieval of a checkpoint on image-text shards"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, help="checkpoint or run folder")
    parser.add_argument("--shards", type=Path, required=True, help="folder of curated or WebDataset shards")
    parser.add_argument("--batch", type=int, default=64, help="pictures encoded at a time [64]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers here")


def run(arguments: argparse.Namespace) -> int:
    from mc2_hpc.evaluation.shards import evaluate_shards
    from mc2_hpc.storage import write_json
    from mc2_hpc.terminal import progress

    if arguments.batch < 1:
        raise UserError(f"--batch {arguments.batch}: must be at least 1")
    with progress() as report:
        result = evaluate_shards(
            arguments.checkpoint,
            arguments.shards,
            batch=arguments.batch,
            progress=lambda done: report("pictures", done, 0, ""),
        )
    if arguments.json:
        write_json(arguments.json, result)
    for name, row in result["retrieval"].items():
        forward, back = row["text_to_image"]["R@1"], row["image_to_text"]["R@1"]
        print(f"{name:>5}  {row['texts']:>7} texts  text-to-image R@1 {forward:6.1%}  image-to-text R@1 {back:6.1%}")
    if result["skipped"]:
        print("skipped:", ", ".join(f"{reason} {count}" for reason, count in result["skipped"].items()))
    return 0
