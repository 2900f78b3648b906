"""``mc2 eval``."""

import argparse
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mc2_hpc.cli.json_result import STDOUT, add_json_flag, write_result
from mc2_hpc.cli.numbers import whole
from mc2_hpc.errors import UserError

SUMMARY = "score a model on a suite of sets, or on image-text shards"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint", type=Path, help="a checkpoint or run, or a folder of open_clip, transformers or ONNX"
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--suite", type=Path, metavar="FILE", help="YAML file of evaluation sets (configs/eval/)")
    what.add_argument("--shards", metavar="WHERE", help="image-text shards for retrieval, named as in data.train")
    parser.add_argument(
        "overrides", nargs="*", metavar="key.sub=value", help="settings that override those of the suite"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="write results.json, results.md and report.html here")
    add_json_flag(parser)
    parser.add_argument("--cache", type=Path, metavar="DIR", help="cache image features here [OUT/features]")
    parser.add_argument("--batch", type=whole(1, 1 << 20), default=64, help="images encoded at a time [64]")
    parser.add_argument(
        "--precision", choices=("fp32", "bf16"), default="fp32", help="precision of the encoders [fp32]"
    )
    parser.add_argument("--ema", action="store_true", help="score the moving average of a checkpoint's weights")


def run(arguments: argparse.Namespace) -> int:
    from mc2_hpc.distributed import process_group
    from mc2_hpc.evaluation.suite import load_suite, shards_suite

    if arguments.shards is not None:
        suite = shards_suite(arguments.shards, arguments.overrides)
    else:
        suite = load_suite(arguments.suite, arguments.overrides)
    with process_group() as ranks:
        return _score(arguments, suite, ranks)


def _score(arguments: argparse.Namespace, suite: Any, ranks: Any) -> int:
    """Score the suite on all ranks; the first one writes and prints."""
    from mc2_hpc.evaluation.encoder import Encoder
    from mc2_hpc.evaluation.paper import reported
    from mc2_hpc.evaluation.results import markdown, write_report
    from mc2_hpc.evaluation.suite import run_suite, to_json
    from mc2_hpc.storage import write_json, write_text
    from mc2_hpc.terminal import progress

    cache = arguments.cache or (arguments.out / "features" if arguments.out else None)
    encoder = Encoder.load(
        arguments.checkpoint,
        ranks,
        eval_resize=suite.eval_resize,
        batch=arguments.batch,
        cache=cache,
        precision=arguments.precision,
        ema=arguments.ema,
    )
    with progress() as report:
        results = run_suite(suite, encoder, report if ranks.is_first else None)
        if arguments.out:
            write_report(arguments.out / "report.html", arguments.checkpoint.name, results, encoder)
    sets, facts = to_json(results), encoder.dual.facts
    if ranks.is_first:
        table = markdown(arguments.checkpoint.name, sets, reported(facts.vision_width, facts.patch_size), facts)
        found = _document(arguments, encoder, sets)
        if arguments.json != STDOUT:
            print(table)
        if arguments.json:
            write_result(found, arguments.json)
        if arguments.out:
            write_json(arguments.out / "results.json", found)
            write_text(arguments.out / "results.md", table)
    if not any(result.scores for result in results):
        raise UserError(f"{arguments.suite or arguments.shards}: none of the sets could be scored; see the table above")
    return 0


def _document(arguments: argparse.Namespace, encoder: Any, sets: Mapping[str, Any]) -> dict[str, Any]:
    """Contents of results.json."""
    from mc2_hpc import __version__
    from mc2_hpc.evaluation.paper import columns_of

    return {
        "checkpoint": str(arguments.checkpoint),
        "model": dataclasses.asdict(encoder.dual.facts),
        "identity": encoder.identity,
        "precision": arguments.precision,
        "ema": arguments.ema,
        "eval_resize": encoder.dual.facts.resize,
        "version": __version__,
        "paper_columns": columns_of(sets),
        "sets": sets,
    }
