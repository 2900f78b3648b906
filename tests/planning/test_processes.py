"""Traces in processes of their own: results in order, errors at once, nothing left behind in this process."""

import multiprocessing
import os
import struct
import sys
import time

import pytest

from mc2_hpc.errors import UserError
from mc2_hpc.planning import processes
from mc2_hpc.planning.processes import TraceError, answers, in_processes


def work(number, kind="square"):
    if kind == "die":
        os.kill(os.getpid(), 9)
    if kind == "break off":
        connection = sys._getframe(1).f_locals["connection"]
        os.write(connection.fileno(), struct.pack("!i", 100) + b"less than 100 bytes")
        os._exit(3)
    if kind == "refuse":
        raise UserError("no such size")
    if kind == "fail":
        raise ZeroDivisionError("a bug")
    if kind == "sleep":
        time.sleep(300)
    if kind == "look":
        return [os.environ.get(name) for name in ("DS_ACCELERATOR", "CUDA_VISIBLE_DEVICES")]
    return number * number


def test_results_are_in_order():
    assert in_processes(work, [{"number": number} for number in range(5)]) == [0, 1, 4, 9, 16]


@pytest.mark.parametrize(
    ("kind", "kind_of_error", "message"),
    [
        ("die", TraceError, "a trace has no result: process [0-9]+ died \\(killed by SIGKILL; out of memory\\?\\)"),
        ("break off", TraceError, "^a trace has no result: process [0-9]+ died \\(exit code 3\\)$"),
        ("refuse", UserError, "^no such size$"),
        ("fail", TraceError, "^a trace failed: ZeroDivisionError: a bug$"),
    ],
)
def test_the_first_error_ends_the_others_at_once(kind, kind_of_error, message):
    with pytest.raises(kind_of_error, match=message):
        in_processes(work, [{"number": 1, "kind": kind}, {"number": 2, "kind": "sleep"}])
    assert not multiprocessing.active_children()


def test_each_call_has_its_own_answer():
    found = dict(answers(work, [{"number": 1, "kind": "die"}, {"number": 2}, {"number": 3, "kind": "refuse"}]))
    assert isinstance(found[0], TraceError) and found[1] == 4 and isinstance(found[2], UserError)


def test_a_trace_that_takes_too_long(monkeypatch):
    monkeypatch.setattr(processes, "SECONDS", 0.5)
    with pytest.raises(TraceError, match="longer than"):
        in_processes(work, [{"number": 1, "kind": "sleep"}])
    assert not multiprocessing.active_children()


def test_only_the_processes_are_set_up(monkeypatch):
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    assert in_processes(work, [{"number": 1, "kind": "look"}]) == [["cpu", ""]]
    assert "DS_ACCELERATOR" not in os.environ and processes.CHILD not in sys.modules
