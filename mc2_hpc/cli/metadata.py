"""``mc2 metadata``."""

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from mc2_hpc.cli.numbers import whole
from mc2_hpc.errors import UserError

SUMMARY = "build the entries that captions are matched against"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    build = actions.add_parser("build", help="write <lang>.json for every language in a folder of sources")
    build.add_argument("sources", type=Path, help="folder with the layout of docs/metadata.md")
    build.add_argument("--out", type=Path, required=True, help="folder to write")
    build.add_argument("--languages", metavar="A,B", help="build only these")
    build.add_argument("--workers", type=whole(1, 4096), default=1, help="processes (default: 1)")
    build.add_argument("--number-names", action="store_true", help="add the names of 0-99 (needs num2words)")
    build.add_argument(
        "--segmenter",
        action="append",
        default=[],
        metavar="LANG=NAME",
        help="split a language's text with this segmenter; `characters` needs no package",
    )
    build.add_argument("--hourly-views", type=whole(1), help="views per hour for a title to count (default: 50)")
    build.add_argument(
        "--merge-unknown", action="store_true", help="put languages that lid.176 does not know into other.json"
    )
    build.add_argument(
        "--cap",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="change a cap of the recipe: unigrams, unigram_share, unigram_min_count, bigrams, bigram_share, "
        "bigram_min_pmi, titles, title_share, title_min_views",
    )
    build.set_defaults(action=_build)
    fetch = actions.add_parser("fetch", help="download dumps and page views, resuming broken downloads")
    fetch.add_argument(
        "--wiki", action="append", default=[], metavar="CODE", help="a Wikipedia, such as sw; repeatable"
    )
    fetch.add_argument("--date", metavar="YYYYMMDD", help="date of the dumps")
    fetch.add_argument(
        "--pageviews", action="append", default=[], metavar="YYYYMMDD[-HH]", help="an hour (UTC) or a day; repeatable"
    )
    fetch.add_argument("--out", type=Path, required=True, help="folder to write, in the layout that `build` reads")
    fetch.add_argument("--mirror", help="another server with the layout of dumps.wikimedia.org")
    fetch.set_defaults(action=_fetch)


def run(arguments: argparse.Namespace) -> int:
    return arguments.action(arguments)


def _build(arguments: argparse.Namespace) -> int:
    from mc2_hpc.metadata.build import Caps, build_folder
    from mc2_hpc.metadata.pageviews import MIN_HOURLY_VIEWS
    from mc2_hpc.metadata.shortfalls import shortfalls
    from mc2_hpc.metadata.sources import choose_languages, find_sources, group_by_curation
    from mc2_hpc.terminal import progress

    defaults = {entry.name: entry.default for entry in dataclasses.fields(Caps)}
    known: dict[str, Any] = {name: float if value is None else type(value) for name, value in defaults.items()}
    caps: dict[str, Any] = {}
    for word in arguments.cap:
        name, _, value = word.partition("=")
        if name not in known:
            raise UserError(f"--cap {word}: choose one of {', '.join(known)}")
        try:
            caps[name] = known[name](value)
        except ValueError:
            raise UserError(f"--cap {word}: {value!r} is not a number") from None
    segmenters = {}
    for word in arguments.segmenter:
        lang, equals, name = word.partition("=")
        if not equals:
            raise UserError(f"--segmenter {word}: write LANG=NAME")
        segmenters[lang] = name
    hourly_views = MIN_HOURLY_VIEWS if arguments.hourly_views is None else arguments.hourly_views
    sources = find_sources(arguments.sources, number_names=arguments.number_names)
    if arguments.languages is not None:
        sources = choose_languages(sources, arguments.languages.split(","))
    with progress() as report:
        card = build_folder(
            sources,
            arguments.out,
            Caps(**caps),
            segmenters=segmenters,
            min_hourly_views=hourly_views,
            merge_unknown=arguments.merge_unknown,
            workers=arguments.workers,
            progress=report,
        )
    for line in shortfalls(card, group_by_curation(sources, merge_unknown=arguments.merge_unknown)):
        print(line, file=sys.stderr)
    print(json.dumps(card, indent=2, ensure_ascii=False))
    return 0


def _fetch(arguments: argparse.Namespace) -> int:
    from mc2_hpc.metadata.download import MIRROR, fetch_dump, fetch_pageviews, pageview_names
    from mc2_hpc.terminal import progress

    if not arguments.wiki and not arguments.pageviews:
        raise UserError("nothing to fetch: name a --wiki with its --date, or --pageviews")
    if arguments.wiki and not arguments.date:
        raise UserError("--wiki needs --date YYYYMMDD, the day on which the dump was started")
    mirror = arguments.mirror or MIRROR
    names = [name for spec in arguments.pageviews for name in pageview_names(spec)]
    with progress() as report:

        def bytes_of(name: str) -> Any:
            return lambda here, total: report(name, here, total, "")

        for code in arguments.wiki:
            print(fetch_dump(code, arguments.date, arguments.out, mirror=mirror, report=bytes_of(code)))
        for name in names:
            print(fetch_pageviews(name, arguments.out, mirror=mirror, report=bytes_of(name)))
    return 0
