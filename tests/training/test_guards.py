"""What a run refuses to save, and what it does not accept silently."""

import shutil
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from mc2_hpc.errors import UserError
from mc2_hpc.training.progress import common_shards
from mc2_hpc.training.stop import SAVED
from tests.faults import matrix
from tests.faults.tiny_run import write_config, write_pool


@pytest.fixture
def config(tmp_path):
    values = {"steps": 8, "log_every": 1, "checkpoint": {"every": 4}}
    return write_config(tmp_path / "run.yaml", write_pool(tmp_path), **values)


def test_a_non_finite_scale_is_not_saved(config, starter, tmp_path):
    """The norm does not include its gradient, so only the scale itself shows it, even in the step of a save."""
    fault = {"at": "mid-step", "step": 4, "rank": 1, "do": ["poison scale"]}
    job = matrix.job(config, tmp_path / "job", faults=[fault])
    assert starter.run(job) == 1
    log = (tmp_path / "job" / "log").read_text()
    assert "logit_scale is nan at step 4; last good checkpoint: none yet" in log
    assert not list((tmp_path / "job" / "run").glob("checkpoints/step-*"))
    assert starter.run(job) == 0


@pytest.mark.parametrize("whom", ["", "launcher:"])
def test_ctrl_c_saves_and_the_same_command_continues(config, starter, tmp_path, whom):
    """Between two saves, sent to one of two ranks or to their launcher."""
    fault = {"at": "mid-step", "step": 3, "rank": 1, "do": [f"{whom}INT"]}
    job = matrix.job(config, tmp_path / "job", faults=[fault], step_seconds=0.1)
    assert starter.run(job) == SAVED
    log = (tmp_path / "job" / "log").read_text()
    assert "SIGINT: saved after step" in log or "a signal to another rank: saved after step" in log
    saved = max((tmp_path / "job" / "run" / "checkpoints").glob("step-*"))
    assert saved.name != "step-00000008"
    assert starter.run(job) == 0
    assert f"resuming {saved}" in (tmp_path / "job" / "log").read_text()


def test_missing_shards_are_reported_on_resume(config, starter, tmp_path):
    job = matrix.job(config, tmp_path / "job")
    assert starter.run({**job, "stop_after": 4}) == SAVED
    assert starter.run({**job, "stop_after": 6}) == SAVED
    assert "shards, now there are" not in (tmp_path / "job" / "log").read_text()
    shutil.move(tmp_path / "shards" / "00003.tar", tmp_path / "00003.tar")
    assert starter.run(job) == 0
    assert "was saved with 8 shards, now there are 7" in (tmp_path / "job" / "log").read_text()


def test_ranks_that_see_other_shards_end_at_the_start(monkeypatch):
    def gather(every, own):
        every[:] = [own | {"b": {"count": 3, "sha256": "0"}}, own]

    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_gather_object", gather)
    sources = [SimpleNamespace(name=name, label=f"source {name}", shard_names=["0.tar", "1.tar"]) for name in "ab"]
    with pytest.raises(UserError, match="^source b: rank 1 sees 2 shards, which are not the 3 of rank 0"):
        common_shards(sources)
