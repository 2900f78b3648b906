"""The planned peak beside the measured one in a run's log. The measurement, which a CPU does not have, is injected."""

import dataclasses
import logging
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from mc2_hpc.config import config_from_dict
from mc2_hpc.distributed import Ranks
from mc2_hpc.planning import planned_peak as module
from mc2_hpc.planning.planned_peak import planned_peak
from tests.faults.tiny_run import write_config, write_pool
from tests.killing import started, wait_until

CPU = Ranks(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
TRAIN = """
import sys
from mc2_hpc.cli import main
from mc2_hpc.planning import planned_peak
from mc2_hpc.training import throughput

throughput.peak_memory = planned_peak.peak_memory = lambda device: 1 << 30
say = planned_peak._Line.__call__
def wait_and_say(line, row):
    line._process.wait(400)  # this run is shorter than its plan
    say(line, row)
planned_peak._Line.__call__ = wait_and_say
sys.exit(main(["train", *sys.argv[1:]]))
"""
START = """
import sys, time
from pathlib import Path
import torch
from mc2_hpc.config import config_from_dict
from mc2_hpc.distributed import Ranks
from mc2_hpc.planning import planned_peak

planned_peak.peak_memory = lambda device: 1 << 30
ranks = Ranks(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
with planned_peak.planned_peak(config_from_dict({}), ranks) as after_row:
    path = Path(sys.argv[1])
    path.with_suffix(".new").write_text(str(after_row._process.pid))
    path.with_suffix(".new").rename(path)
    time.sleep(600)
"""


def script(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def is_running(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def test_a_run_logs_it_once(tmp_path):
    config = write_config(tmp_path / "run.yaml", write_pool(tmp_path), steps=4, log_every=2)
    command = [sys.executable, "-c", TRAIN, str(config), f"output={tmp_path / 'run'}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "planned" in line]
    found = re.search(r"peak memory up to step 2: 1\.00 GiB measured, 0\.(\d\d) GiB planned \((-9\d\.\d)%\)$", line)
    assert found, line
    assert int(found[1]) / 100 - 1 == pytest.approx(float(found[2]) / 100, abs=0.006)


@pytest.fixture
def measured(monkeypatch, caplog):
    """As on a device that counts its memory; has the log's lines."""
    monkeypatch.setattr(module, "peak_memory", lambda device: 1 << 30)
    caplog.set_level(logging.INFO, logger=module.__name__)
    return caplog


def say(config):
    with planned_peak(config, CPU) as after_row:
        after_row._process.wait(400)
        for step in (1, 2):
            after_row({"step": step, "peak_memory_bytes": 1 << 30})


def test_a_refused_plan_is_one_line_with_the_reason(measured):
    say(config_from_dict({"distill": {"teacher": "/t"}}))
    (line,) = measured.messages
    assert line.startswith("no planned peak of memory: distill.teacher=/t: no run or checkpoint is there")


def staged(output, checkpoint=None):
    if checkpoint is not None:
        folder = output / "checkpoints" / checkpoint
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text("{}")
    stages = [{"steps": 1}, {"steps": 9, "global_batch": 37_632, "precision": "fp8"}]
    return config_from_dict({"output": str(output), "stages": stages})


@pytest.mark.parametrize(
    ("checkpoint", "batch", "end"), [(None, 75_264, 1), ("step-00000001", 37_632, 10), ("step-00000010", 37_632, 10)]
)
def test_the_stage_that_is_due_is_planned(measured, monkeypatch, tmp_path, checkpoint, batch, end):
    started = []
    monkeypatch.setattr(module, "_start", lambda config, *_: started.append(config) or subprocess.Popen(["true"]))
    with planned_peak(staged(tmp_path, checkpoint), CPU) as after_row:
        assert after_row._last_step == end
    (config,) = started
    assert config.global_batch == batch and not config.stages


def test_a_plan_that_comes_after_its_stage_is_not_compared(measured, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "executable", str(script(tmp_path / "plan", "echo '{\"bytes\": 5}'")))
    with planned_peak(staged(tmp_path / "run"), CPU) as after_row:
        after_row._process.wait(400)
        after_row({"step": 2, "peak_memory_bytes": 1 << 30})
    assert measured.messages == ["no planned peak of memory: the stage ended at step 1, before its plan"]


def test_a_plan_that_dies_is_one_line(measured, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    say(config_from_dict({}))
    assert measured.messages == ["no planned peak of memory: exit code 1"]


@pytest.mark.parametrize("answer", ["5", "[]", '{"bytes": "many"}', '{"bytes": 0}', '{"bytes": NaN}', ""])
def test_an_answer_that_is_none_is_one_line(measured, monkeypatch, tmp_path, answer):
    plan = script(tmp_path / "plan", f"echo '{answer}'")
    monkeypatch.setattr(sys, "executable", str(plan))
    say(config_from_dict({}))
    assert measured.messages == ["no planned peak of memory: exit code 0"]


def test_a_run_does_not_wait_for_what_a_plan_leaves_running(measured, monkeypatch, tmp_path):
    left = tmp_path / "left"
    plan = script(tmp_path / "plan", f"sleep 300 & echo $! > {left}; exit 3")
    monkeypatch.setattr(sys, "executable", str(plan))
    say(config_from_dict({}))
    assert measured.messages == ["no planned peak of memory: exit code 3"]
    os.kill(int(left.read_text()), signal.SIGKILL)  # it was still running


def test_a_run_that_is_killed_leaves_no_plan(tmp_path):
    """Not even if it is killed before the plan can ask the kernel to end it too."""
    with started([sys.executable, "-c", START, str(tmp_path / "plan")]) as run:
        wait_until((tmp_path / "plan").exists, run)
    pid = int((tmp_path / "plan").read_text())
    deadline = time.monotonic() + 120
    while is_running(pid):
        assert time.monotonic() < deadline, "the plan outlives its run"
        time.sleep(0.1)


def test_a_plan_that_cannot_start_is_one_line(measured, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    with planned_peak(config_from_dict({}), CPU) as after_row:
        assert after_row is None
    (line,) = measured.messages
    assert "/no/such/python" in line


def test_a_run_does_not_wait_for_it(measured):
    with planned_peak(config_from_dict({}), CPU) as after_row:
        after_row({"step": 1, "peak_memory_bytes": 1 << 30})
    assert not measured.messages and after_row._process.returncode is not None


def test_who_plans(measured, monkeypatch):
    """Nobody who was told not to, no other rank, and no device whose memory is not counted."""
    off = config_from_dict({"log": {"planned_peak": False}})
    second = dataclasses.replace(CPU, rank=1, world_size=2, local_rank=1)
    for config, ranks in ((off, CPU), (config_from_dict({}), second)):
        with planned_peak(config, ranks) as after_row:
            assert after_row is None
    monkeypatch.undo()
    with planned_peak(config_from_dict({}), CPU) as after_row:
        assert after_row is None
