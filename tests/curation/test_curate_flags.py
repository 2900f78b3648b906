"""The flags of ``mc2 curate`` are the same for every action that runs on an engine."""

import argparse

import pytest

from mc2_hpc.cli import curate, main
from mc2_hpc.cli.curate_engine import engine_of
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
