"""``mc2 eval``."""

import argparse
from pathlib import Path
from typing import Any

from mc2_hpc.cli.numbers import whole
from mc2_hpc.errors import UserError

SUMMARY = "score a checkpoint on a suite of sets, or on image-text shards"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint", type=Path, help="checkpoint or run folder; or an open_clip or transformers folder"
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--suite", type=Path, metavar="FILE", help="YAML file of evaluation sets (configs/eval/)")
    what.add_argument("--shards", type=Path, metavar="DIR", help="folder of curated or WebDataset shards: retrieval")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="values that differ from the suite's")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write results.json, results.md, report.html there")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="keep features of pictures there [OUT/features]")
    parser.add_argument("--batch", type=whole(1, 1 << 20), default=64, help="pictures encoded at a time [64]")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of the encoders [fp32]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="with --shards: write all numbers here")


def run(arguments: argparse.Namespace) -> int:
    return _suite(arguments) if arguments.suite else _shards(arguments)


def _shards(arguments: argparse.Namespace) -> int:
    from mc2_hpc.evaluation.shards import evaluate_shards
    from mc2_hpc.storage import write_json
    from mc2_hpc.terminal import progress

    if arguments.overrides:
        raise UserError(f"{arguments.overrides[0]}: only a suite has values to change")
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


def _suite(arguments: argparse.Namespace) -> int:
    from mc2_hpc.distributed import process_group
    from mc2_hpc.evaluation.suite import load_suite

    suite = load_suite(arguments.suite, arguments.overrides)
    with process_group() as ranks:
        return _score(arguments, suite, ranks)


def _score(arguments: argparse.Namespace, suite: Any, ranks: Any) -> int:
    """Score the suite on all ranks; the first one writes and prints."""
    from mc2_hpc import __version__
    from mc2_hpc.cli.checkpoints import as_ours
    from mc2_hpc.evaluation.encoder import Encoder
    from mc2_hpc.evaluation.paper import columns_of, reported
    from mc2_hpc.evaluation.results import markdown, write_report
    from mc2_hpc.evaluation.suite import run_suite, to_json
    from mc2_hpc.storage import atomic_path, write_json
    from mc2_hpc.terminal import progress

    cache = arguments.cache or (arguments.out / "features" if arguments.out else None)
    with as_ours(arguments.checkpoint) as checkpoint, progress() as report:
        encoder = Encoder.load(checkpoint, ranks, batch=arguments.batch, cache=cache, precision=arguments.precision)
        results = run_suite(suite, encoder, report if ranks.is_first else None)
        if arguments.out:
            write_report(arguments.out / "report.html", arguments.checkpoint.name, results, encoder)
    sets = to_json(results)
    assert encoder.card is not None
    vision = encoder.card.arch.vision
    table = markdown(arguments.checkpoint.name, sets, reported(vision.width, vision.patch_size))
    if ranks.is_first:
        print(table)
        if arguments.out:
            result = {
                "checkpoint": str(arguments.checkpoint),
                "identity": encoder.identity,
                "precision": arguments.precision,
                "version": __version__,
                "paper_columns": columns_of(sets),
                "sets": sets,
            }
            write_json(arguments.out / "results.json", result)
            with atomic_path(arguments.out / "results.md") as temporary:
                temporary.write_text(table, encoding="utf-8")
    if not any(result.scores for result in results):
        raise UserError(f"{arguments.suite}: not one set could be scored; see the table above")
    return 0
