"""``mc2``: the only place that wires all layers together. Each command imports what it needs when it runs."""

import argparse
import dataclasses
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mc2_hpc import __version__
from mc2_hpc.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 1 failed, 2 bad input (one line on standard error)."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    # argparse gives up on key=value words that follow an option: take them here.
    overrides = [word for word in rest if "=" in word and not word.startswith("-")]
    if rest and (overrides != rest or not hasattr(arguments, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(word for word in rest if word not in overrides) or rest[0]}")
    if overrides:
        arguments.overrides += overrides
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname).1s %(message)s", datefmt="%H:%M:%S")
    _product_log().setLevel(logging.INFO)
    try:
        return arguments.command(arguments) or 0
    except UserError as error:
        if arguments.debug:
            raise
        print(f"mc2: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("mc2: interrupted", file=sys.stderr)
        return 130


def _product_log() -> logging.Logger:
    """The parent of all our loggers: other libraries stay at warnings."""
    return logging.getLogger("mc2_hpc")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mc2", description="Worldwide CLIP: metadata, curation, training, evaluation, conversion."
    )
    parser.add_argument("--version", action="version", version=f"mc2_hpc {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, summary, add_arguments, command in (
        ("quickstart", "the whole job on this machine, in minutes", _quickstart_arguments, _quickstart),
        ("metadata", "build the entries that captions are matched against", _metadata_arguments, _metadata),
        ("curate", "match captions, set thresholds, write training shards", _curate_arguments, _curate),
        ("train", "train a model from a config file", _train_arguments, _train),
        ("eval", "retrieval of a checkpoint on image-text shards", _eval_arguments, _eval),
        ("convert", "convert a checkpoint to open_clip or transformers, or back", _convert_arguments, _convert),
        ("bench", "run a benchmark against its named peer", _bench_arguments, _bench),
        ("doctor", "what is installed here, and does it work", _doctor_arguments, _doctor),
    ):
        sub = commands.add_parser(name, help=summary, description=summary)
        add_arguments(sub)
        # Also after the command, where one tends to type it.
        sub.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        sub.set_defaults(command=command)
    return parser


def _quickstart_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, default=Path("runs/quickstart"), help="folder of all results")
    parser.add_argument("--processes", type=int, help="training processes (default: the GPUs found, or 2)")


def _quickstart(arguments: argparse.Namespace) -> int:
    from mc2_hpc.quickstart.run import run_quickstart

    return run_quickstart(arguments.output, processes=arguments.processes)


def _metadata_arguments(parser: argparse.ArgumentParser) -> None:
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


def _metadata(arguments: argparse.Namespace) -> int:
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


def _curate_arguments(parser: argparse.ArgumentParser) -> None:
    from_pool = argparse.ArgumentParser(add_help=False)
    from_pool.add_argument("pool", type=Path, help="folder of <shard>.parquet and <shard>.tar, or of WebDataset tars")
    matching = argparse.ArgumentParser(add_help=False)
    matching.add_argument("--metadata", type=Path, required=True, help="folder of <lang>.json")
    matching.add_argument("--mode", choices=("fixed", "compat"), default="fixed", help="matching rules [fixed]")
    threshold = argparse.ArgumentParser(add_help=False)
    threshold.add_argument("--t-en", type=int, required=True, help="English threshold: 20000 (400M) to 170000 (2.5B)")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--out", type=Path, required=True, help="folder to write")
    common.add_argument("--workers", type=int, default=os.cpu_count(), help="processes [all cores]")
    actions = parser.add_subparsers(required=True, metavar="ACTION", dest="action")
    actions.add_parser("match", parents=[from_pool, matching, common], help="captions to the entries in them")
    balance = actions.add_parser("balance", parents=[threshold, common], help="counts, thresholds, probabilities")
    balance.add_argument("matched", type=Path, help="what match wrote")
    balance.add_argument("--metadata", type=Path, required=True, help="folder of <lang>.json")
    pack = actions.add_parser("pack", parents=[from_pool, common], help="training shards of what matched")
    pack.add_argument("--matched", type=Path, required=True, help="what match wrote")
    actions.add_parser("run", parents=[from_pool, matching, threshold, common], help="all three in turn")


def _curate(arguments: argparse.Namespace) -> int:
    from mc2_hpc.curation import pipeline
    from mc2_hpc.terminal import progress

    if arguments.workers < 1:
        raise UserError(f"--workers {arguments.workers}: must be at least 1")
    with progress() as report:
        parallel = {"workers": arguments.workers, "progress": report}
        if arguments.action == "match":
            result = pipeline.match(arguments.pool, arguments.metadata, arguments.out, arguments.mode, **parallel)
        elif arguments.action == "balance":
            result = pipeline.balance(
                arguments.matched, arguments.metadata, arguments.out, arguments.t_en, progress=report
            )
        elif arguments.action == "pack":
            result = pipeline.pack(arguments.pool, arguments.matched, arguments.out, **parallel)
        else:
            result = pipeline.run(
                arguments.pool,
                arguments.metadata,
                arguments.out,
                t_en=arguments.t_en,
                mode=arguments.mode,
                **parallel,
            )
    print(json.dumps(result, indent=2, ensure_ascii=False))
    return 0


def _train_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="values that differ from the file's")
    parser.add_argument("--processes", type=int, help="start this many processes on this machine (one a GPU)")
    parser.add_argument("--timeout", type=float, default=600, help="seconds a rank waits for the others [600]")


def _train(arguments: argparse.Namespace) -> int:
    from mc2_hpc.config import load_config

    # Bad input shows here, once, before any process is started.
    config = load_config(arguments.config, arguments.overrides)
    if arguments.processes is not None:
        _launch(arguments)
    import warnings

    from mc2_hpc.distributed import process_group
    from mc2_hpc.training.trainer import NonFiniteError, Trainer, exclusive_run

    # DeepSpeed calls collectives by names that torch is about to retire; nothing a user can do about it.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    with process_group(arguments.timeout) as ranks:
        _product_log().setLevel(logging.INFO if ranks.is_first else logging.WARNING)
        try:
            with exclusive_run(config, ranks):
                Trainer(config, ranks).train()
        except NonFiniteError as error:
            print(f"mc2: {error}", file=sys.stderr)
            return 1
    return 0


def _launch(arguments: argparse.Namespace) -> None:
    """Replace this process by torchrun with the wanted number of processes."""
    if arguments.processes < 1:
        raise UserError(f"--processes {arguments.processes}: must be at least 1")
    if "WORLD_SIZE" in os.environ:
        raise UserError("--processes inside a launched job (WORLD_SIZE is set): leave it out")
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(arguments.processes)]
    command = ["-m", "mc2_hpc.cli", *(["--debug"] if arguments.debug else []), "train"]
    command += ["--timeout", str(arguments.timeout), str(arguments.config), *arguments.overrides]
    os.execv(sys.executable, [sys.executable, "-m", *launcher, *command])


def _eval_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, help="checkpoint or run folder")
    parser.add_argument("--shards", type=Path, required=True, help="folder of curated or WebDataset shards")
    parser.add_argument("--batch", type=int, default=64, help="pictures encoded at a time [64]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers here")


def _eval(arguments: argparse.Namespace) -> int:
    from mc2_hpc.evaluation.shards import evaluate_shards
    from mc2_hpc.storage import write_json
    from mc2_hpc.terminal import progress

    if arguments.batch < 1:
        raise UserError(f"--batch {arguments.batch}: must be at least 1")
    with progress() as report:
        result = evaluate_shards(
            arguments.checkpoint,
            arguments.shards,
            batch=arguments.batch,
            progress=lambda done: report("pictures", done, 0, ""),
        )
    if arguments.json:
        write_json(arguments.json, result)
    for name, row in result["retrieval"].items():
        forward, back = row["text_to_image"]["R@1"], row["image_to_text"]["R@1"]
        print(f"{name:>5}  {row['texts']:>7} texts  text-to-image R@1 {forward:6.1%}  image-to-text R@1 {back:6.1%}")
    if result["skipped"]:
        print("skipped:", ", ".join(f"{reason} {count}" for reason, count in result["skipped"].items()))
    return 0


def _convert_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, help="our checkpoint or run folder, an open_clip or a transformers folder")
    parser.add_argument("--to", choices=("open_clip", "hf", "mc2"), required=True, help="format to write")
    parser.add_argument("--out", type=Path, required=True, help="new folder to write")


def _convert(arguments: argparse.Namespace) -> int:
    from mc2_hpc.conversion.convert import convert

    convert(arguments.source, arguments.to, arguments.out)
    print(arguments.out)
    return 0


def _bench_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", help="benchmark: the <name> of benchmarks/bench_<name>.py")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write rows and ratios here")
    parser.add_argument("--quick", action="store_true", help="under a minute, for a smoke test: not for quoting")


def _bench(arguments: argparse.Namespace) -> int:
    import importlib.util
    import subprocess

    # Benchmarks live beside the package in the repository, not in the wheel.
    folder = Path(importlib.util.find_spec("mc2_hpc").origin).parents[1] / "benchmarks"  # type: ignore[union-attr,arg-type]
    script = folder / f"bench_{arguments.name}.py"
    if not script.is_file():
        known = sorted(path.stem.removeprefix("bench_") for path in folder.glob("bench_*.py"))
        there = f"choose one of {', '.join(known)}" if known else f"no benchmarks in {folder}: use a source checkout"
        raise UserError(f"bench {arguments.name!r}: no such benchmark; {there}")
    command = [sys.executable, str(script), *(["--quick"] if arguments.quick else [])]
    if arguments.json:
        command += ["--json", str(arguments.json)]
    return subprocess.run(command).returncode


def _doctor_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="machine-readable output")


def _doctor(arguments: argparse.Namespace) -> int:
    from mc2_hpc.doctor import examine, to_json

    findings = examine()
    if arguments.json:
        print(json.dumps(to_json(findings), indent=2))
        return 0
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("component", "status", "version", "self-check, or what to do")
    colour = {"ok": "green", "missing": "yellow", "broken": "red"}
    for finding in findings:
        status = f"[{colour[finding.status]}]{finding.status}[/]"
        table.add_row(finding.component, status, finding.version, escape(finding.detail))
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
