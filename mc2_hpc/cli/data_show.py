"""``mc2 data show``."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from mc2_hpc.cli.numbers import whole

if TYPE_CHECKING:
    from mc2_hpc.inspection.show import ShownSample

SUMMARY = "show samples of shards: images, captions, and why a run would skip them"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", help="shards as in data.train: a folder, file, pattern or address")
    parser.add_argument("--key", help="show the sample with this key")
    parser.add_argument("--n", type=whole(1, 10_000), default=5, help="number of samples to draw [5]")
    parser.add_argument("--seed", type=whole(0), default=0, help="seed of the draw [0]")
    parser.add_argument("--page", type=Path, metavar="FILE", help="write an HTML page with the images")


def run(arguments: argparse.Namespace) -> int:
    from mc2_hpc.inspection.show import draw_samples, find_samples

    if arguments.key is not None:
        samples = find_samples(arguments.data, arguments.key)
    else:
        samples = list(draw_samples(arguments.data, arguments.n, seed=arguments.seed))
    for sample in samples:
        _show(sample)
    if arguments.page is not None:
        from mc2_hpc.inspection.page import write_samples_page

        print(f"page: {write_samples_page(arguments.page, arguments.data, samples)}", file=sys.stderr)
    return 0


def _show(sample: "ShownSample") -> None:
    from mc2_hpc.reading.files import shown

    print(f"{shown(sample.key)}  ({shown(sample.shard)})")
    if sample.format:
        print(f"  {sample.format} {sample.width} x {sample.height}, {sample.size:,} bytes")
    for text, lang in sample.captions:
        print(f"  {shown(lang) or '-':<5} {shown(text)}")
    for problem in sample.problems:
        print(f"  skipped: {shown(problem)}")
