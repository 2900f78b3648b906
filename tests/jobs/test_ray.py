"""Plans on Ray, on a local cluster that Ray starts for the run."""

import pytest

from mc2_hpc import jobs
from mc2_hpc.errors import UserError
from mc2_hpc.jobs import Plan, Ray, Stage

pytest.importorskip("ray", reason="Ray is not installed (pip install 'mc2_hpc[ray]')")


def run(stage):
    return jobs.run(Plan((stage,), result=dict), Ray(workers=2))


def test_failures_are_named_and_the_others_done(tmp_path, work):
    stages = work.Touch(tmp_path)
    with pytest.raises(UserError, match="s: 1 of 3 shards failed, the others are done: a: not 1"):
        run(Stage("s", tmp_path, {"a": -1, "b": 1, "c": 1}, stages, ("{shard}",)))
    assert [(tmp_path / name).read_text() for name in "bc"] == ["x", "x"]
    run(Stage("s", tmp_path, {"b": 1, "c": 1, "d": 1}, stages, ("{shard}",)))
    assert [(tmp_path / name).read_text() for name in "bcd"] == ["x", "x", "x"]


def test_killed_worker_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr("mc2_hpc.jobs.executors.SILENCE_S", 15)
    code = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    with pytest.raises(UserError, match="s: a worker was killed at 'import os"):
        run(Stage("s", tmp_path, {code: {}, "pass": {}}, exec, ("never",)))
