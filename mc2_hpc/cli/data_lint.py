"""``mc2 data lint``."""

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from mc2_hpc.cli.json_result import STDOUT, add_json_flag, write_result
from mc2_hpc.cli.numbers import whole

if TYPE_CHECKING:
    from mc2_hpc.inspection.lint import Lint

SUMMARY = "report what a run would skip and why, with languages, image sizes and caption lengths"

_LANGUAGES_SHOWN = 12


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", help="shards as in data.train: a folder, file, pattern or address")
    parser.add_argument(
        "--tokenizer", type=Path, metavar="FILE", help="sentencepiece model; adds caption lengths in tokens"
    )
    parser.add_argument(
        "--style", choices=("xlmv", "mt5", "gemma"), default="xlmv", help="layout of the tokenizer's token IDs [xlmv]"
    )
    parser.add_argument("--context-length", type=whole(3, 1 << 16), default=77, help="tokens per caption [77]")
    parser.add_argument(
        "--image-size", type=whole(1, 1 << 14), default=224, help="side of training images, in pixels [224]"
    )
    parser.add_argument(
        "--seed",
        type=whole(0),
        default=0,
        help="data.seed of the run, which decides the captions that an epoch draws [0]",
    )
    parser.add_argument("--page", type=Path, metavar="FILE", help="write an HTML page with pictures")
    parser.add_argument("--workers", type=whole(1, 4096), metavar="N", help="worker processes [all cores]")
    add_json_flag(parser)


def run(arguments: argparse.Namespace) -> int:
    from mc2_hpc.inspection.lint import lint
    from mc2_hpc.inspection.shard import LintOptions
    from mc2_hpc.terminal import progress

    options = LintOptions(
        seed=arguments.seed,
        image_size=arguments.image_size,
        tokenizer=arguments.tokenizer,
        tokenizer_style=arguments.style,
        context_length=arguments.context_length,
    )
    with progress() as report:
        found = lint(
            arguments.data,
            options,
            workers=arguments.workers or os.cpu_count() or 1,
            with_pictures=arguments.page is not None,
            progress=lambda done, total, name: report("shards", done, total, name),
        )
    if arguments.json:
        write_result(found.to_dict(), arguments.json)
    if arguments.json != STDOUT:
        _show(found)
    if arguments.page is not None:
        from mc2_hpc.inspection.page import write_lint_page

        print(f"page: {write_lint_page(arguments.page, arguments.data, found)}", file=sys.stderr)
    if found.findings.kept == 0:
        print(f"mc2: {arguments.data}: a run would keep nothing", file=sys.stderr)
        return 1
    return 0


def _show(found: "Lint") -> None:
    from mc2_hpc.drops import MEANINGS, Drop
    from mc2_hpc.inspection.lint import quantile
    from mc2_hpc.reading.files import shown

    data = found.findings
    print(f"shards      {data.shards:,}, {len(data.unreadable):,} of them unreadable")
    print(f"images      {data.kept:,} of {data.images:,} can be used")
    for reason, count in sorted(data.skipped.items(), key=lambda item: (-item[1], item[0])):
        if count:
            print(f"skipped     {reason} {count:,}: {MEANINGS[Drop(reason)]}")
    total = data.captions.total()
    shares = [
        f"{shown(lang) or '(none)'} {count / total:.1%}" for lang, count in data.captions.most_common(_LANGUAGES_SHOWN)
    ]
    more = len(data.captions) - len(shares)
    print(f"captions    {total:,}: {', '.join(shares)}{f' and {more} more languages' if more > 0 else ''}")
    for reason, count in data.bad_captions.most_common():
        print(f"            unusable in {count:,} images: {reason}")
    low, middle, high = (quantile(data.short_sides, share) for share in (0.05, 0.5, 0.95))
    size = found.options.image_size
    small = sum(count for side, count in data.short_sides.items() if side < size)
    print(f"sizes       shorter side {low} (5 %), {middle} (median), {high} (95 %); {small:,} below {size}")
    print(f"formats     {', '.join(f'{name} {count:,}' for name, count in data.formats.most_common()) or 'none'}")
    if data.turned:
        print(
            f"            {data.turned:,} images have an orientation tag, which training ignores: "
            "`mc2 data pack --resize` stores them upright"
        )
    for lang, lengths in sorted(data.tokens.items(), key=lambda item: -item[1].total())[:_LANGUAGES_SHOWN]:
        print(
            f"tokens      {shown(lang) or '(none)'}: median {quantile(lengths, 0.5)}, longest {max(lengths)}, "
            f"{found.truncated(lang):.1%} of {lengths.total():,} captions have more than {found.room}"
        )
    if found.num_repeated:
        print(f"repeated    keys in more than one shard: {found.num_repeated:,}")
        for one in found.repeated[:3]:
            print(f"            {shown(one.key)} in {', '.join(map(shown, one.shards[:3]))}")
