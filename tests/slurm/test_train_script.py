"""What `mc2 train --slurm` writes and rejects, and the decisions of rank.sh and the start limit, without a cluster."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from mc2_hpc.cli import main
from mc2_hpc.errors import UserError
from mc2_hpc.training import slurm

ROOT = Path(__file__).parents[2]


@pytest.fixture
def config(tmp_path) -> Path:
    path = tmp_path / "run.yaml"
    text = f"output: {tmp_path}/100% done\nglobal_batch: 384\ndata: {{lanes: 384, workers: 4}}\n"
    path.write_text(text, encoding="utf-8")
    return path


def script_of(capsys, *words: object) -> str:
    assert main(["train", *map(str, words), "--dry-run"]) == 0
    return capsys.readouterr().out


def header(script: str) -> dict[str, str]:
    """The script's #SBATCH options, parsed as sbatch does."""
    lines = re.findall(r"^#SBATCH (.*)$", script, flags=re.MULTILINE)
    return dict(shlex.split(line)[0].removeprefix("--").partition("=")[::2] for line in lines)


def test_dry_run_prints_the_filled_script(config, tmp_path, capsys):
    words = ["--slurm", "nodes=48", "gpus=8", "time=2-00:00:00", "partition=p", "account=a", "mem=0"]
    script = script_of(capsys, config, "optim.lr=1e-4", "output=a b", *words)
    assert header(script) == {
        "job-name": "a b",
        "nodes": "48",
        "ntasks-per-node": "8",
        "gpus-per-node": "8",
        "cpus-per-task": "6",  # four decode, one trains, one saves
        "time": "2-00:00:00",
        "output": "a b/slurm-%j.log",
        "open-mode": "append",
        "requeue": "",
        "signal": "USR1@120",
        "partition": "p",
        "account": "a",
        "mem": "0",
    }
    assert f"\nset -- {config} optim.lr=1e-4 'output=a b' --timeout=600\n" in script
    assert script.index("#SBATCH --mem=0") < script.index("\nset -- ") < script.index("\nsrun ")
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    assert not list(tmp_path.glob("100*")), "a dry run must not create a folder"


def test_what_is_not_given_is_as_shipped(config, capsys):
    shipped = header((ROOT / "slurm/train.sbatch").read_text(encoding="utf-8"))
    found = header(script_of(capsys, config, "--slurm", "nodes=2"))
    ours = {"nodes": "2", "job-name": "100% done", "cpus-per-task": "6"}
    assert found.pop("output").endswith("/100%% done/slurm-%j.log") and shipped.pop("output")
    assert found == shipped | ours


def test_cpu_ranks_ask_for_no_gpus(config, capsys):
    found = header(script_of(capsys, config, "--slurm", "gpus=0", "ranks=2"))
    assert found["ntasks-per-node"] == "2" and "gpus-per-node" not in found


@pytest.mark.parametrize(
    "words, gpus, gres, ranks",
    [
        (["gpus=a100:4"], "a100:4", None, "4"),
        (["gres=gpu:a100:4"], None, "gpu:a100:4", "4"),
        (["gres=gpu:2"], None, "gpu:2", "2"),
        (["gres=gpu"], None, "gpu", "1"),
        (["gres=gpu:a100:2(S:0-1),gpu:h100:2,nvme:1"], None, "gpu:a100:2(S:0-1),gpu:h100:2,nvme:1", "4"),
        (["gres=gpu:8", "ranks=2"], None, "gpu:8", "2"),
        (["gres=nvme:1"], "8", "nvme:1", "8"),
        (["gpus-per-node=h100:2"], "h100:2", None, "2"),
        (["gpus=0", "gres=gpu:2"], None, "gpu:2", "2"),
        (["gpus=4", "ntasks-per-node=2"], "4", None, "2"),
    ],
)
def test_gpus_are_asked_for_once(config, words, gpus, gres, ranks, capsys):
    found = header(script_of(capsys, config, "--slurm", "nodes=1", *words))
    assert (found.get("gpus-per-node"), found.get("gres"), found["ntasks-per-node"]) == (gpus, gres, ranks)


def test_words_commas_and_flags(config, capsys):
    found = header(script_of(capsys, config, "--slurm", "nodes=2,gpus=4,exclusive", "--slurm", "partition=a,b"))
    assert (found["nodes"], found["gpus-per-node"], found["partition"], found["exclusive"]) == ("2", "4", "a,b", "")


@pytest.mark.parametrize(
    "words, message",
    [
        (["--slurm", "nods=2"], "--slurm nods=2: no such key"),
        (
            ["--slurm", "nodes=2", "optim.lr=1"],
            "--slurm optim.lr=1: no such key; other arguments of the command come before",
        ),
        (["--slurm", "nodes"], "--slurm nodes: write it as --slurm key=value key=value"),
        (["--slurm", "nodes=two"], "--slurm nodes=two: must be a whole number of at least 1"),
        (["--slurm", "nodes=0"], "--slurm nodes=0: must be a whole number of at least 1"),
        (["--slurm", "gpus=-1"], "--slurm gpus=-1: must be a whole number"),
        (["--slurm", "time="], "--slurm time=: the value is empty"),
        (["--slurm", "comment=a\n#SBATCH --nodes=9"], "SBATCH --nodes=9' has a line break"),
        (["--slurm", "gpus=0"], "--slurm gpus=0: how many ranks per node? add ranks=N"),
        (["--slurm", "gpus=four"], "--slurm gpus=four: must be a whole number per node, with or without a type"),
        (["--slurm", "gpus=a100:"], "--slurm gpus=a100:: must be a whole number per node"),
        (["--slurm", "gpus=2", "gres=gpu:a100:2"], "--slurm gpus=2 gres=gpu:a100:2: request GPUs once"),
        (["--slurm", "gpus-per-task=1"], "--slurm gpus-per-task=1: request GPUs once, with gpus=N (per node) or gres"),
        (["--slurm", "nodes=" + "9" * 5000], "must be a whole number of at least 1"),
        (["--slurm", "gpus=" + "9" * 5000], "must be a whole number per node"),
        (["--slurm", "gpus=a100:0"], "--slurm gpus=0: how many ranks per node? add ranks=N"),
        (["--slurm", "output=/tmp/x"], "--slurm output=/tmp/x: no such key"),
        (["--slurm", "nodes=49"], "--slurm: 392 ranks but data.lanes=384"),
        (["--slurm", "env=nowhere.sh"], "nowhere.sh: no such file"),
        (["checkpoint.resume=false", "--slurm", "nodes=1"], "checkpoint.resume=false"),
        (["optim.lear=1", "--slurm", "nodes=1"], "unknown key 'optim.lear'"),
        (["--processes", "2", "--slurm", "nodes=1"], "--processes and --restarts"),
        ([], "--dry-run prints the batch script of a Slurm job: add --slurm"),
    ],
)
def test_bad_input_is_one_line(config, words, message, capsys):
    assert main(["train", str(config), "--dry-run", *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("mc2: ") and error.count("\n") == 1


def test_without_slurm_it_says_so(config, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    assert main(["train", str(config), "--slurm", "nodes=1"]) == 2
    assert "no sbatch on PATH" in capsys.readouterr().err


def test_what_slurm_refuses_is_one_line(slurm_cluster, config, monkeypatch, capsys):
    for name in ("SLURM_CONF", "PATH"):
        monkeypatch.setenv(name, slurm_cluster.env[name])
    assert main(["train", str(config), "--slurm", "nodes=1", "gpus=1", "partition=nowhere"]) == 2
    error = capsys.readouterr().err
    assert "invalid partition specified: nowhere" in error and error.count("\n") == 1


def test_starts_without_a_new_checkpoint_are_bounded(tmp_path):
    latest = tmp_path / "checkpoints" / "latest"
    latest.parent.mkdir()
    assert [slurm.count_start(tmp_path, "7", max_starts=2) for _ in range(2)] == [1, 2]
    with pytest.raises(UserError, match=r"giving up after 2 starts of job 7 without a new checkpoint \(newest: none\)"):
        slurm.count_start(tmp_path, "7", max_starts=2)
    with pytest.raises(UserError):
        slurm.count_start(tmp_path, "7", max_starts=2)
    assert slurm.count_start(tmp_path, "8", max_starts=2) == 1, "another job counts from the start"
    assert slurm.count_start(tmp_path, "8", max_starts=2) == 2
    latest.write_text("step-00000020\n")
    assert [slurm.count_start(tmp_path, "8", max_starts=2) for _ in range(2)] == [1, 2]
    with pytest.raises(UserError, match="newest: step-00000020"):
        slurm.count_start(tmp_path, "8", max_starts=2)


@pytest.mark.parametrize("value", ["0", "many", "-1"])
def test_limit_of_starts_is_checked(config, value, monkeypatch, capsys):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("MC2_MAX_STARTS", value)
    assert slurm.main([str(config), "seed=1", "--timeout=600"]) == 2
    assert f"MC2_MAX_STARTS='{value}'" in capsys.readouterr().err


def test_first_start_is_let_through(config, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert slurm.main([str(config), "seed=1", "--timeout", "600"]) == 0


@pytest.mark.parametrize(
    "rank, command, code",
    [
        (0, "exit 0", 0),
        (1, "exit 1", 201),
        (1, "exit 2", 202),
        (1, "exit 69", 69),
        (1, "exit 75", 0),
        (0, "exit 75", 75),
        (1, "exit 127", 255),
        (1, "kill -9 $$", 137),
        # The shell gets the signal too; it must wait for the trainer's exit code.
        (0, "trap 'exit 69' USR1; kill -USR1 $PPID; kill -USR1 $$; sleep 1; exit 3", 69),
    ],
)
def test_codes_of_ranks_are_in_order(rank, command, code):
    result = subprocess.run(
        ["bash", ROOT / "slurm/rank.sh", "bash", "-c", command], env={**os.environ, "SLURM_PROCID": str(rank)}
    )
    assert result.returncode == code
