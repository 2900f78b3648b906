"""Stages on Ray, on a cluster of this machine that Ray starts for the run."""

import pytest

from mc2_hpc.errors import UserError
from mc2_hpc.jobs.engines import Ray
from mc2_hpc.jobs.stages import Stage, run_stages

pytest.importorskip("ray", reason="Ray is not installed (pip install 'mc2_hpc[ray]')")

TOUCHES = "open(folder + '/{}', 'a').write('x')"


def test_failures_are_named_and_the_others_done(tmp_path):
    fails = "from mc2_hpc.errors import UserError; raise UserError('a.parquet: broken')"
    folder = {"folder": str(tmp_path)}
    shards = {fails: {}, TOUCHES.format("b"): folder, TOUCHES.format("c"): folder}

    def is_done(name: str) -> bool:
        from pathlib import Path

        return "UserError" not in name and Path(folder["folder"], name.split("'")[1][1:]).exists()

    with pytest.raises(UserError, match="s: 1 of 3 shards failed, the others are done: a.parquet: broken"):
        run_stages([Stage("s", tmp_path, shards, exec, is_done)], Ray(workers=2))
    assert [(tmp_path / name).read_text() for name in "bc"] == ["x", "x"]
    del shards[fails]
    shards[TOUCHES.format("d")] = folder
    run_stages([Stage("s", tmp_path, shards, exec, is_done)], Ray(workers=2))
    assert [(tmp_path / name).read_text() for name in "bcd"] == ["x", "x", "x"]


def test_killed_worker_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr("mc2_hpc.jobs.executors.SILENCE_S", 15)
    code = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    stage = Stage("s", tmp_path, {code: {}, "pass": {}}, exec, lambda name: False)
    with pytest.raises(UserError, match="s: a worker was killed at 'import os"):
        run_stages([stage], Ray(workers=2))
