"""``mc2 convert``."""

import argparse
from pathlib import Path

SUMMARY = "convert a checkpoint to open_clip, transformers or ONNX, or back"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, help="our checkpoint or run folder, an open_clip or a transformers folder")
    parser.add_argument("--to", choices=("open_clip", "hf", "mc2", "onnx"), required=True, help="format to write")
    parser.add_argument("--out", type=Path, required=True, help="new folder to write")
    parser.add_argument("--image-size", type=int, help="images of another side in pixels: interpolates the positions")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="of open_clip and hf weights [fp32]")
    parser.add_argument("--int8", action="store_true", help="with --to onnx: quantise the weights to 8 bits")
    parser.add_argument(
        "--results", type=Path, metavar="FILE", help="results.json of `mc2 eval`, for the model card [the run's own]"
    )
    parser.add_argument("--ema", action="store_true", help="the moving average of a checkpoint's weights")


def run(arguments: argparse.Namespace) -> int:
    from mc2_hpc.conversion.convert import convert

    convert(
        arguments.source,
        arguments.to,
        arguments.out,
        image_size=arguments.image_size,
        dtype=arguments.dtype,
        int8=arguments.int8,
        results=arguments.results,
        ema=arguments.ema,
    )
    print(arguments.out)
    return 0
