"""``mc2 metadata``."""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from mc2_hpc.errors import UserError

SUMMARY = "build the entries that captions are matched against"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    build = actions.add_parser("build", help="write <lang>.json for every language of a folder of sources")
    build.add_argument("sources", type=Path, help="folder of <lang>/{wordnet.txt,corpus*.txt[.gz],titles.txt}")
    build.add_argument("--out", type=Path, required=True, help="folder to write")
    build.add_argument("--number-names", action="store_true", help="add the names of 0-99 (needs num2words)")
    build.add_argument(
        "--cap",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="change a cap of the recipe: unigrams, unigram_share, bigrams, bigram_share, titles, title_share ...",
    )


def run(arguments: argparse.Namespace) -> int:
    from mc2_hpc.metadata.build import Caps, build_folder, find_sources
    from mc2_hpc.terminal import progress

    known: dict[str, Any] = {entry.name: type(entry.default) for entry in dataclasses.fields(Caps)}
    caps: dict[str, Any] = {}
    for word in arguments.cap:
        name, _, value = word.partition("=")
        if name not in known:
            raise UserError(f"--cap {word}: choose one of {', '.join(known)}")
        try:
            caps[name] = known[name](value)
        except ValueError:
            raise UserError(f"--cap {word}: {value!r} is not a number") from None
    sources = find_sources(arguments.sources, number_names=arguments.number_names)
    with progress() as report:
        card = build_folder(sources, arguments.out, Caps(**caps), progress=report)
    print(json.dumps(card, indent=2, ensure_ascii=False))
    return 0
