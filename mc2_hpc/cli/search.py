"""``mc2 search``."""

import argparse
import os
import sys
from pathlib import Path

from mc2_hpc.cli.numbers import port, whole
from mc2_hpc.errors import UserError

SUMMARY = "search a folder of images with words in any language"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint", type=Path, help="checkpoint or run folder; or an open_clip or transformers folder"
    )
    parser.add_argument("query", nargs="?", help="what to look for, in any language")
    parser.add_argument("--images", type=Path, required=True, metavar="DIR", help="folder of images")
    parser.add_argument("--top", type=whole(1), default=10, help="images to show [10]")
    parser.add_argument(
        "--serve", nargs="?", type=port, const=8000, metavar="PORT", help="serve a page for the browser [8000]"
    )
    parser.add_argument("--cache", type=Path, metavar="DIR", help="cache features here [~/.cache/mc2_hpc/features]")
    parser.add_argument("--batch", type=whole(1, 1 << 20), default=64, help="images encoded at a time [64]")


def run(arguments: argparse.Namespace) -> int:
    if (arguments.query is None) == (arguments.serve is None):
        raise UserError("search: give either words to look for, or --serve")
    from mc2_hpc.distributed import process_group
    from mc2_hpc.evaluation.encoder import Encoder
    from mc2_hpc.evaluation.search import ImageIndex
    from mc2_hpc.terminal import progress

    cache = arguments.cache or Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "mc2_hpc" / "features"
    with process_group() as ranks:
        if ranks.world_size > 1:
            raise UserError(f"search: runs in one process, not {ranks.world_size}")
        encoder = Encoder.load(arguments.checkpoint, ranks, batch=arguments.batch, cache=cache)
        with progress() as report:
            index = ImageIndex(encoder, arguments.images, lambda done, total: report("images", done, total, ""))
        for reason, count in index.skipped.items():
            print(f"mc2: skipped: {reason} {count}", file=sys.stderr)
        if arguments.serve is not None:
            return _serve(index, arguments.serve)
        for hit in index.search(arguments.query, arguments.top):
            print(f"{hit.score:.3f}  {arguments.images / hit.name}")
    return 0


def _serve(index: object, port: int) -> int:
    from mc2_hpc.evaluation.search import HOST, ImageIndex, make_server

    assert isinstance(index, ImageIndex)
    try:
        server = make_server(index, port)
    except OSError as error:
        raise UserError(f"--serve {port}: {error}; choose another port") from None
    print(f"{len(index)} images: http://{HOST}:{server.server_address[1]}/ (Ctrl-C to stop)", flush=True)
    with server:
        server.serve_forever()
    return 0
