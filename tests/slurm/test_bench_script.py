"""What `mc2 bench --slurm` writes and rejects, without a cluster."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from mc2_hpc.cli import main

SHIPPED = Path(__file__).parents[2] / "slurm" / "bench.sbatch"


def header(script):
    """The script's #SBATCH options, parsed as sbatch does."""
    lines = re.findall(r"^#SBATCH (.*)$", script, flags=re.MULTILINE)
    return dict(shlex.split(line)[0].removeprefix("--").partition("=")[::2] for line in lines)


def script_of(capsys, *words):
    assert main(["bench", "train", *words, "--dry-run"]) == 0
    return capsys.readouterr().out


def test_dry_run_prints_the_filled_script(capsys):
    script = script_of(capsys, "--quick", "--slurm", "nodes=4,gpus=a100:2", "time=20", "--slurm", "account=a b")
    shipped = header(SHIPPED.read_text(encoding="utf-8"))
    expected = {**shipped, "nodes": "4", "gpus-per-node": "a100:2", "time": "20", "account": "a b"}
    assert header(script) == expected
    assert script.index("#SBATCH --account") < script.index("\nset -- train --quick\n") < script.index("\nsrun ")
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


@pytest.mark.parametrize(
    "words, gpus, gres",
    [(["gpus=0"], None, None), (["gres=gpu:4"], None, "gpu:4"), (["gpus-per-node=2"], "2", None), ([], "8", None)],
)
def test_gpus_are_asked_for_once(words, gpus, gres, capsys):
    found = header(script_of(capsys, "--slurm", "nodes=2", *words))
    assert (found.get("gpus-per-node"), found.get("gres"), found["nodes"]) == (gpus, gres, "2")


@pytest.mark.parametrize(
    "words, message",
    [
        (["--slurm", "nods=2"], "--slurm nods=2: no such key"),
        (["--slurm", "nodes=0"], "--slurm nodes=0: must be a whole number of at least 1"),
        (["--slurm", "ranks=2"], "--slurm ranks=2: no such key"),
        (["--slurm", "gpus=2", "gres=gpu:2"], "request GPUs once"),
        (["--slurm", "gpus=four"], "--slurm gpus=four: must be a whole number per node"),
        (["--slurm", "env=nowhere.sh"], "nowhere.sh: no such file"),
        (["--slurm", "comment=a\n#SBATCH --nodes=9"], "has a line break"),
        (
            ["--json", "x", "--slurm", "nodes=2"],
            "--json x with --slurm: every node writes its own bench-JOB/train-NODE",
        ),
        ([], "--dry-run prints the batch script of a Slurm job: add --slurm"),
    ],
)
def test_bad_input_is_one_line(words, message, capsys):
    assert main(["bench", "train", "--dry-run", *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("mc2: ") and error.count("\n") == 1


def test_without_slurm_it_says_so(monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    assert main(["bench", "train", "--slurm", "nodes=1"]) == 2
    assert "no sbatch on PATH" in capsys.readouterr().err
