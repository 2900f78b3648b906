"""The fuzz lane: what counts as a fault, that damage is repeatable, and a short run."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz import lane

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "code, err, outcome",
    [
        (0, "12:00:00 I saved\n", "done"),
        (2, "mc2: x: no such file\n", "one line"),
        (2, "match: 1/2\nmatch: 2/2, 12.7/s, ETA 0 s\n12:00:00 W slow\nmc2: x: no such file\n", "one line"),
        (1, "mc2: loss is nan at step 3\n", "one line"),
        (2, "", "several lines"),
        (2, "mc2: x\nmc2: y\n", "several lines"),
        (2, "mc2: x\nand y\n", "several lines"),
        (2, "mc2: " + "x" * 2000, "several lines"),
        (1, "Traceback (most recent call last):\nKeyError: 'x'\n", "traceback"),
        (0, "Traceback (most recent call last):\nin a thread\n", "traceback"),
        (70, "", "exit code 70"),
        (-11, "", "signal 11"),
        (-999, "", "too long"),
    ],
)
def test_what_is_a_fault(code, err, outcome):
    assert lane._verdict(code, err, 0, 1.0)[0] == outcome


def test_so_is_memory():
    assert lane._verdict(0, "", 1 << 50, 1.0)[0] == "memory"


def test_every_kind_of_file_can_be_damaged():
    kinds = {kind for command in lane.COMMANDS.values() for kind in command.files.values()}
    assert kinds <= set(lane.mutations.BY_KIND)


@pytest.mark.parametrize("name", ["json", "yaml", "text"])
def test_damage_repeats_itself(tmp_path, name):
    content = {"json": '{"a": [1, {"b": "c"}], "d": null}', "yaml": "a: 1\nb: [x, y]\n", "text": "one\ntwo\n"}[name]
    for change in sorted(set(lane.mutations.BY_KIND[name]) - {lane.mutations.replace_file}, key=lambda f: f.__name__):
        outcomes = []
        for _ in range(2):
            path = tmp_path / f"file.{name}"
            path.write_text(content)
            what = change(path, random.Random(f"{name} 1"))
            outcomes.append((what, path.read_bytes()))
        assert outcomes[0] == outcomes[1]


def test_the_table_of_the_docs_is_the_committed_result():
    (path,) = (ROOT / "benchmarks" / "results").glob("*_fuzz.json")
    result = json.loads(path.read_text(encoding="utf-8"))
    docs = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8")
    assert result["config"]["inputs"] == 2000 and result["faults"] == []
    assert lane.table(result["rows"]) in docs and f"{result['seconds']} s on two cores" in docs


@pytest.mark.fuzz
def test_a_short_run(tmp_path):
    command = [
        sys.executable,
        "-m",
        "tests.fuzz.lane",
        "--inputs",
        "60",
        "--seed",
        "1",
        "--jobs",
        "1",
        "--json",
        str(tmp_path / "f"),
    ]
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=1800, env={**os.environ, "TMPDIR": str(tmp_path)}
    )
    found = json.loads((tmp_path / "f").read_text(encoding="utf-8")) if (tmp_path / "f").is_file() else None
    shutil.rmtree(tmp_path, ignore_errors=True)
    assert found is not None, result.stderr[-3000:]
    assert found["config"]["inputs"] == 60 and not found["faults"], json.dumps(found["faults"], indent=1)
