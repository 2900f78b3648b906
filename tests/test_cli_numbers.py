"""Bad or out-of-range numbers on the command line and in the environment: one line, exit code 2."""

import pytest

from mc2_hpc.cli import main
from mc2_hpc.cli.numbers import port, seconds, whole
from mc2_hpc.distributed import process_group
from mc2_hpc.errors import UserError


def test_valid_numbers():
    assert whole(0)("0") == 0 and whole(1, 5)("+5") == 5 and whole(-3)("-3") == -3
    assert seconds("0.5") == 0.5 and seconds("1e3") == 1000 and port("65535") == 65_535


@pytest.mark.parametrize(
    "words, message",
    [
        (["train", "x.yaml", "--timeout", "nan"], "--timeout nan: must be a number of seconds above 0"),
        (["train", "x.yaml", "--timeout", "inf"], "--timeout inf: must be a number of seconds above 0"),
        (["train", "x.yaml", "--timeout=-1"], "--timeout -1: must be a number of seconds above 0"),
        (["train", "x.yaml", "--timeout", "0"], "--timeout 0: must be a number of seconds above 0"),
        (["train", "x.yaml", "--timeout", "1e300"], "--timeout 1e300: must be a number of seconds above 0"),
        (["train", "x.yaml", "--timeout", "soon"], "--timeout soon: must be a number of seconds"),
        (["train", "x.yaml", "--processes", "0"], "--processes 0: must be at least 1"),
        (["train", "x.yaml", "--processes", "99999"], "--processes 99999: must be at most 4,096"),
        (["train", "x.yaml", "--restarts=-1", "--processes", "1"], "--restarts -1: must be at least 0"),
        (["eval", "x", "--suite", "y", "--batch", "0"], "--batch 0: must be at least 1"),
        (["eval", "x", "--suite", "y", "--batch", "9" * 5000], "--batch 9999"),
        (["search", "x", "q", "--images", "y", "--top", "1_0"], "--top 1_0: must be a whole number"),
        (["search", "x", "--images", "y", "--serve", "99999"], "--serve 99999: must be at most 65,535"),
        (["curate", "run", "x", "--metadata", "y", "--out", "z", "--t-en", "٣"], "--t-en ٣: must be a whole number"),
        (["curate", "deduplicate", "x", "--out", "z", "--shards", "0"], "--shards 0: must be at least 1"),
        (["metadata", "build", "x", "--out", "z", "--workers", "two"], "--workers two: must be a whole number"),
        (["ablate", "x.yaml", "--jobs", "\n"], r"--jobs \n: must be a whole number"),
        (["convert", "x", "--to", "onx", "--out", "y"], "--to: invalid choice: 'onx'"),
        (["convert", "x"], "the following arguments are required: --to, --out; see `mc2 convert --help`"),
        ([], "the following arguments are required: COMMAND; see `mc2 --help`"),
    ],
    ids=lambda value: repr(value)[:50],
)
def test_one_line(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"mc2: {message}") and error.count("\n") == 1 and len(error) < 400
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "values, message",
    [
        ({"RANK": "1", "WORLD_SIZE": "1"}, "RANK='1': must be a whole number from 0 to 0"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK='2': must be a whole number from 0 to 1"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK='-1': must be"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE='0': must be a whole number from 1 to 1048576"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two': must be"),
        ({"WORLD_SIZE": "9" * 5000}, "WORLD_SIZE='9999"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE='': must be"),
        ({"SLURM_STEP_NUM_TASKS": "nan"}, "SLURM_STEP_NUM_TASKS='nan': must be"),
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "7"}, "LOCAL_RANK='7': must be a whole number from 0 to 1"),
        (
            {"WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "99999"},
            "MASTER_PORT='99999': must be a whole number",
        ),
        ({"WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "http"}, "MASTER_PORT='http': must be a whole number"),
    ],
    ids=lambda value: repr(value)[:50],
)
def test_the_environment_too(values, message, monkeypatch):
    for name in (
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "MASTER_ADDR",
        "MASTER_PORT",
        "SLURM_STEP_NUM_TASKS",
        "SLURM_PROCID",
    ):
        monkeypatch.delenv(name, raising=False)
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"^environment variable {message}"), process_group():
        pass
