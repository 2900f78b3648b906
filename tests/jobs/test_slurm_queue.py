"""Commands of Slurm that fail or do not answer, played by scripts."""

import pytest

from mc2_hpc.errors import UserError
from mc2_hpc.jobs import slurm_queue
from mc2_hpc.jobs.slurm_queue import cancel, queued_jobs


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Writes a command's script."""
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(slurm_queue, "POLL_S", 0.01)

    def write(name, text):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)

    return write


def test_a_queue_that_answers_later(slurm, tmp_path, caplog):
    slurm("squeue", f"test -e {tmp_path}/asked && echo 7 8 || {{ touch {tmp_path}/asked; echo down >&2; exit 1; }}")
    assert queued_jobs() == {"7", "8"}
    assert caplog.messages == ["squeue does not answer (down); retrying"]


def test_a_queue_that_does_not_answer(slurm, monkeypatch):
    monkeypatch.setattr(slurm_queue, "_COMMAND_S", 0.1)
    monkeypatch.setattr(slurm_queue, "_NO_ANSWER_S", 0)
    slurm("squeue", "exec sleep 60")
    with pytest.raises(UserError, match=r"squeue has not answered for 0 s \(nothing within 0.1 s\); jobs continue"):
        queued_jobs()


@pytest.mark.parametrize(
    ("text", "warning"),
    [
        ("test $# = 2", None),
        ("echo Invalid job id >&2; exit 1", "scancel 7 8: Invalid job id"),
        ("exec sleep 60", "Slurm jobs 7, 8 may still run: "),
    ],
)
def test_cancelling_never_fails(slurm, monkeypatch, caplog, text, warning):
    monkeypatch.setattr(slurm_queue, "_COMMAND_S", 5 if "sleep" not in text else 0.1)
    slurm("scancel", text)
    cancel(["7", "8"])
    if warning is None:
        assert not caplog.messages
    else:
        (message,) = caplog.messages
        assert message.startswith(warning)


def test_nothing_to_cancel(slurm, caplog):
    slurm("scancel", "exit 1")
    cancel([])
    assert not caplog.messages
