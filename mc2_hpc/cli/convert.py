"""``mc2 convert``."""

import argparse
from pathlib import Path

SUMMARY = "convert a checkpoint to open_clip, transformers or ONNX, or back"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, help="a checkpoint or run, or a folder of open_clip or transformers")
    parser.add_argument("--to", choices=("open_clip", "hf", "mc2", "onnx"), required=True, help="format to write")
    parser.add_argument("--out", type=Path, required=True, help="new folder to write")
    parser.add_argument(
        "--image-size",
        type=int,
        metavar="PIXELS",
        help="side of the images that the new model takes; its position embeddings are interpolated [the source's]",
    )
    parser.add_argument(
        "--dtype", choices=("fp32", "bf16", "fp16"), help="type of the weights, with --to open_clip or hf [fp32]"
    )
    parser.add_argument("--int8", action="store_true", help="quantise the weights to 8 bits, with --to onnx")
    parser.add_argument(
        "--results",
        type=Path,
        metavar="FILE",
        help="show this results.json of `mc2 eval` in the model card [the run's own]",
    )
    parser.add_argument("--ema", action="store_true", help="convert the moving average of a checkpoint's weights")


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
