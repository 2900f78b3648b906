"""``mc2 convert``."""

import argparse
from pathlib import Path

SUMMARY = "convert a checkpoint to open_clip or transformers, or back"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, help="our checkpoint or run folder, an open_clip or a transformers folder")
    parser.add_argument("--to", choices=("open_clip", "hf", "mc2"), required=True, help="format to write")
    parser.add_argument("--out", type=Path, required=True, help="new folder to write")
    parser.add_argument("--image-size", type=int, help="images of another side in pixels: interpolates the positions")


def run(arguments: argparse.Namespace) -> int:
    from mc2_hpc.conversion.convert import convert

    convert(arguments.source, arguments.to, arguments.out, image_size=arguments.image_size)
    print(arguments.out)
    return 0
