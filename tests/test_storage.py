"""Atomic writes, completion markers and folder locks."""

import errno
import fcntl
import json
import multiprocessing
import stat

import pytest

from mc2_hpc.errors import UserError
from mc2_hpc.storage import (
    atomic_path,
    exclusive_folder,
    is_complete,
    mark_complete,
    write_json,
)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "value.json"
    write_json(path, {"b": 1, "a": "ä"})
    with pytest.raises(RuntimeError), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert json.loads(path.read_text()) == {"a": "ä", "b": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["value.json"]
    assert path.read_text() == '{\n  "a": "ä",\n  "b": 1\n}\n'
    assert path.stat().st_mode & stat.S_IRUSR


def test_a_folder_in_place_of_the_file_is_left_alone(tmp_path):
    (tmp_path / "value.json" / "x").mkdir(parents=True)
    with pytest.raises(UserError, match="value.json: is a folder"):
        write_json(tmp_path / "value.json", 1)
    assert [p.name for p in tmp_path.iterdir()] == ["value.json"]


def test_completion_marker(tmp_path):
    assert not is_complete(tmp_path)
    mark_complete(tmp_path)
    assert is_complete(tmp_path)


def _hold(folder, ready, release):
    with exclusive_folder(folder):
        ready.set()
        release.wait(60)


def test_a_folder_has_one_holder_at_a_time(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready, release = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(tmp_path, ready, release))
    other.start()
    assert ready.wait(60)
    with (
        pytest.raises(UserError, match=f"process {other.pid} .*still using it"),
        exclusive_folder(tmp_path, wait_s=0.3),
    ):
        pass
    other.kill()  # a killed process no longer holds the lock
    other.join(30)
    with exclusive_folder(tmp_path, wait_s=10):
        pass


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_file_system_without_locks_is_said_and_used(tmp_path, monkeypatch, caplog, number):
    def flock(descriptor, operation):
        raise OSError(number, "no such thing here")

    monkeypatch.setattr(fcntl, "flock", flock)
    with exclusive_folder(tmp_path):
        assert f"{tmp_path}: its file system has no locks (no such thing here)" in caplog.text


def test_another_fault_of_locking_is_an_error(tmp_path, monkeypatch):
    def flock(descriptor, operation):
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(OSError, match="broken"), exclusive_folder(tmp_path):
        pass
