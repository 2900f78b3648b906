"""The flags of ``mc2 curate`` are the same for every action that runs on an engine."""

import argparse
import inspect
import re
from dataclasses import fields
from importlib import import_module

import pytest

from mc2_hpc import __version__
from mc2_hpc.cli import curate, data, main
from mc2_hpc.cli.curate_engine import engine_of
from mc2_hpc.curation.explain import explain
from mc2_hpc.curation.fetching.options import FetchOptions
from mc2_hpc.ingestion.columns import Columns
from mc2_hpc.ingestion.pack import plan_pack as plan_data_pack
from mc2_hpc.ingestion.samples import PackOptions
from mc2_hpc.inspection.shard import LintOptions
from mc2_hpc.inspection.show import draw_samples
from mc2_hpc.jobs import Local, Ray, Slurm

ACTIONS = {
    "extract": ["a"],
    "deduplicate": ["pool"],
    "fetch": ["pool"],
    "filter": ["pool", "--filter", "a.B", "c=d"],
    "dedup-images": ["pool"],
    "decontaminate": ["shards", "--against", "b"],
    "match": ["pool", "--metadata", "m"],
    "balance": ["matched", "--metadata", "m", "--t-en", "9"],
    "sample": ["matched", "--balance", "b"],
    "pack": ["pool", "--matched", "m"],
    "run": ["pool", "--metadata", "m", "--t-en", "9"],
}


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    curate.add_arguments(parser)
    return parser.parse_args(words)


@pytest.mark.parametrize("action", ACTIONS)
def test_every_action_runs_on_every_engine(action):
    words = [action, *ACTIONS[action], "--out", "out"]
    assert engine_of(parse(*words, "--workers", "3", "--tasks", "9")) == Local(3, 9)
    assert engine_of(parse(*words, "--executor", "ray", "--tasks", "9")) == Ray(tasks=9)
    options = {"partition": "p", "time": "1:00", "mem-per-cpu-gb": "4"}
    for flags in (["partition=p", "time=1:00", "mem_per_cpu_gb=4"], ["partition=p,time=1:00,mem-per-cpu-gb=4"]):
        engine = engine_of(parse(*words, "--wait", "--workers", "2", "--slurm", *flags))
        assert engine == Slurm(options, workers=2, wait=True)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--wait"], "--slurm and --wait go with --executor slurm, not local"),
        (["--executor", "ray", "--slurm", "partition=p"], "--slurm and --wait go with --executor slurm, not ray"),
        (["--executor", "slurm"], "no partition; give --slurm partition=NAME time=HH:MM:SS"),
        (["--slurm", "partition=p"], "no time; give --slurm partition=NAME time=HH:MM:SS"),
        (["--slurm", "partition=p", "time=1", "gpus=4"], "--slurm gpus=4: no such key"),
        (["--slurm", "partition=p", "time=1", "max_array_size=none"], "max-array-size=none: must be a whole number"),
        (["--workers", "0"], "--workers 0: must be at least 1"),
        (["--workers", "9" * 5000], f"--workers {'9' * 40}: must be a whole number"),
        (["--workers", "99999"], "--workers: must be at most 4,096"),
        (["--tasks", "-1"], "--tasks -1: must be at least 1"),
    ],
)
def test_flags_that_do_not_go_together_are_one_line(tmp_path, flags, message, capsys):
    assert main(["curate", "pack", "pool", "--matched", "m", "--out", str(tmp_path), *flags]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def same(flag: object, default: object) -> bool:
    """Whether a flag that is not given means the function's default; sequences may be of another kind."""
    return list(flag) == list(default) if isinstance(flag, list | tuple) else flag == default


@pytest.mark.parametrize("action", ACTIONS)
def test_defaults_are_those_of_the_function(action):
    """What a program gets from ``plan_*`` is what the command does."""
    name = action.replace("-", "_")
    plan = getattr(import_module(f"mc2_hpc.curation.{name}"), f"plan_{name}")
    arguments = parse(action, *ACTIONS[action], *(["--filter", "a.B"] if action == "filter" else []), "--out", "out")
    if action == "fetch":  # its flags are None, or override a field of FetchOptions
        assert all(getattr(arguments, one.name) is None for one in fields(FetchOptions))
        return
    compared = {
        key: (getattr(arguments, key), one.default)
        for key, one in inspect.signature(plan).parameters.items()
        if one.default is not inspect.Parameter.empty and hasattr(arguments, key)
    }
    assert all(same(*pair) for pair in compared.values()), compared


def test_defaults_of_explain_and_data():
    arguments = parse("explain", "a cat", "--metadata", "m")
    for name, one in inspect.signature(explain).parameters.items():
        if one.default is not inspect.Parameter.empty and hasattr(arguments, name):
            assert same(getattr(arguments, name), one.default), name
    parser = argparse.ArgumentParser()
    data.add_arguments(parser)
    lint = parser.parse_args(["lint", "x"])
    options = LintOptions()
    assert (lint.seed, lint.image_size, lint.context_length) == (
        options.seed,
        options.image_size,
        options.context_length,
    )
    assert (lint.tokenizer, lint.style) == (options.tokenizer, options.tokenizer_style)
    assert parser.parse_args(["show", "x"]).seed == inspect.signature(draw_samples).parameters["seed"].default
    pack = parser.parse_args(["pack", "x", "--out", "y"])
    columns = Columns(pack.image_column, tuple(pack.caption_columns), pack.lang_column, pack.key_column)
    assert columns == Columns() and (pack.lang, pack.resize) == (PackOptions().lang, PackOptions().resize)
    for name in ("images", "images_per_shard", "allow_outside"):
        assert getattr(pack, name) == inspect.signature(plan_data_pack).parameters[name].default


def flags_of(parser: argparse.ArgumentParser, words: tuple[str, ...] = ()):
    """Every flag of the parser and of its actions, with the words that lead there."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, one in action.choices.items():
                yield from flags_of(one, (*words, name))
        elif action.option_strings:
            yield (*words, action.option_strings[0]), action


@pytest.mark.parametrize("command", [curate, data])
def test_help_names_the_default(command):
    """A number or word in brackets at the end of a help text is the default."""
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    of_fetch = {one.name: one.default for one in fields(FetchOptions)}
    checked = 0
    for words, flag in flags_of(parser):
        told = re.search(r"\[([^\s\[\]]+)\]$", flag.help or "")
        default = of_fetch.get(flag.dest) if words[0] == "fetch" else flag.default
        if told and isinstance(default, int | float | str) and not isinstance(default, bool) and default != "":
            written = f"{default:g}" if isinstance(default, float) else str(default)
            assert told[1].replace("VERSION", __version__) == written, words
            checked += 1
    assert checked >= 5
