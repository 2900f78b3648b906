"""``mc2 merge``."""

import argparse
import re
from argparse import ArgumentTypeError
from pathlib import Path
from typing import Any

from mc2_hpc.cli.numbers import whole
from mc2_hpc.errors import UserError

SUMMARY = "average the weights of models, and score the line between two"

_MOST_ALPHAS = 1000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "models", nargs="+", type=Path, help="checkpoints or runs, or folders of open_clip or transformers"
    )
    how = parser.add_mutually_exclusive_group()
    how.add_argument(
        "--alpha",
        type=alphas,
        metavar="SHARE",
        help="share of the first of two models, from 0 to 1; with --suite also several, or START:STOP:STEP",
    )
    how.add_argument("--shares", type=numbers, metavar="S,S,...", help="share of each model [equal shares]")
    parser.add_argument(
        "--suite", type=Path, metavar="FILE", help="score every alpha on this suite instead of writing a model"
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="new folder for the model, or with --suite for the results"
    )
    parser.add_argument("--batch", type=whole(1, 1 << 20), default=64, help="images encoded at a time [64]")
    parser.add_argument(
        "--precision", choices=("fp32", "bf16"), default="fp32", help="precision of the encoders [fp32]"
    )


def alphas(text: str) -> list[float]:
    """``0.3``, ``0,0.3,1`` or ``0:1:0.1`` (both ends included) as numbers from 0 to 1."""
    if text.count(":") != 2:
        found = numbers(text)
    else:
        start, stop, step = (number for part in text.split(":") for number in numbers(part))
        count = round((stop - start) / step) + 1 if step > 0 else 0
        if not 0 < count <= _MOST_ALPHAS or abs(start + (count - 1) * step - stop) > 1e-9:
            raise ArgumentTypeError(f"{text}: STEP must divide STOP - START, in at most {_MOST_ALPHAS} parts")
        found = [round(start + place * step, 9) for place in range(count)]
    if min(found) < 0 or max(found) > 1:
        raise ArgumentTypeError(f"{text}: must be between 0 and 1")
    return found


def numbers(text: str) -> list[float]:
    """Decimal numbers with commas between them."""
    parts = text.split(",")
    for part in parts:
        if not re.fullmatch(r"-?([0-9]{1,18}(\.[0-9]{0,18})?|\.[0-9]{1,18})", part.strip(), flags=re.ASCII):
            raise ArgumentTypeError(f"{part[:40]!r}: must be a decimal number")
    return [float(part) for part in parts]


def run(arguments: argparse.Namespace) -> int:
    if arguments.alpha is not None and len(arguments.models) != 2:
        raise UserError(f"--alpha: is for two models, not {len(arguments.models)}; use --shares")
    return _write(arguments) if arguments.suite is None else _sweep(arguments)


def _write(arguments: argparse.Namespace) -> int:
    from mc2_hpc.conversion.merge import check_shares, open_sources, uniform, write_merged

    if arguments.alpha is not None and len(arguments.alpha) > 1:
        raise UserError("--alpha: several values write nothing; add --suite to score them, or give one")
    count = len(arguments.models)
    shares = arguments.shares or uniform(count)
    if arguments.alpha is not None:
        shares = [arguments.alpha[0], 1 - arguments.alpha[0]]
    check_shares(shares, count)
    with open_sources(arguments.models, arguments.out.absolute().parent) as sources:
        write_merged(sources, shares, arguments.out)
    print(arguments.out)
    return 0


def _sweep(arguments: argparse.Namespace) -> int:
    from mc2_hpc.distributed import process_group
    from mc2_hpc.evaluation.suite import load_suite
    from mc2_hpc.pages.plots import require_plotting

    if arguments.alpha is None:
        raise UserError("--suite: scores the line between two models; give --alpha, such as 0:1:0.1")
    require_plotting("the plot of a sweep needs", "curation")
    suite = load_suite(arguments.suite)
    with process_group() as ranks:
        return _score(arguments, suite, ranks)


def _score(arguments: argparse.Namespace, suite: Any, ranks: Any) -> int:
    from mc2_hpc.conversion.merge import open_sources
    from mc2_hpc.evaluation.sweep import markdown, run_sweep
    from mc2_hpc.models.weights import is_checkpoint
    from mc2_hpc.terminal import progress

    foreign = [model for model in arguments.models if not is_checkpoint(model)]
    if foreign and ranks.world_size > 1:
        raise UserError(f"{foreign[0]}: every rank would convert it; run `mc2 convert {foreign[0]} --to mc2` first")
    with open_sources(arguments.models, arguments.out) as sources, progress() as report:
        found = run_sweep(
            sources,
            arguments.alpha,
            suite,
            ranks,
            arguments.out,
            batch=arguments.batch,
            precision=arguments.precision,
            progress=report if ranks.is_first else None,
        )
    if ranks.is_first:
        print(markdown(found))
    return 0
