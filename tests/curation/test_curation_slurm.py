"""Curation on a real Slurm: a chain of array jobs, a failure that stops it, and the same command that goes on."""

from pathlib import Path

import pytest

from mc2_hpc.curation.pipeline import run
from mc2_hpc.errors import UserError
from mc2_hpc.jobs.engines import Slurm
from mc2_hpc.jobs.stages import Stage, run_stages


@pytest.fixture
def pool(make_pool) -> Path:
    return make_pool(4)


def queue(cluster) -> list[str]:
    return cluster.command("squeue", "--noheader", "--format", "%j").split()


def test_chain_of_array_jobs(slurm_cluster, pool, tmp_path, monkeypatch, caplog, outputs):
    caplog.set_level("INFO", logger="mc2_hpc")
    for name in ("SLURM_CONF", "PATH"):
        monkeypatch.setenv(name, slurm_cluster.env[name])
    monkeypatch.setattr("mc2_hpc.jobs.slurm._POLL_S", 0.5)
    # Arrays of one task: the two of a stage are two jobs.
    out, options = tmp_path / "out", {"partition": slurm_cluster.partition, "time": "10", "max_array_size": "1"}

    def curate(wait: bool):
        engine = Slurm(options, tasks=2, wait=wait)
        return run(pool, pool.parent / "metadata", out, t_en=30, engine=engine)

    good = (pool / "2.parquet").read_bytes()
    (pool / "2.parquet").write_bytes(b"broken")
    with pytest.raises(
        UserError, match="match: 1 of 4 shards failed, the others are done: .*2.parquet: cannot be read"
    ):
        curate(wait=True)
    slurm_cluster.wait_until("the jobs after the failed one are dropped", lambda: not queue(slurm_cluster))
    assert not (out / "balance").exists() or not (out / "balance" / "balance.json").exists()
    finished = (out / "matched" / "1.parquet").stat().st_mtime_ns

    (pool / "2.parquet").write_bytes(good)
    assert curate(wait=False) is None
    submitted = queue(slurm_cluster)
    assert "mc2-pack" in submitted and "mc2-thresholds" in submitted
    assert curate(wait=False) is None  # looks, and submits nothing a second time
    assert "failed before at '2'" in caplog.text and "match: 3/4 shards done, Slurm job" in caplog.text
    assert set(queue(slurm_cluster)) <= set(submitted)
    report = curate(wait=True)
    assert (out / "matched" / "1.parquet").stat().st_mtime_ns == finished

    here = run(pool, pool.parent / "metadata", tmp_path / "here", t_en=30)
    assert report == here and outputs(out) == outputs(tmp_path / "here")
    assert curate(wait=True) == here and not queue(slurm_cluster)  # all is done: no job

    (out / "matched" / "stats" / "0.json").unlink()
    monkeypatch.setitem(options, "partition", "none")
    with pytest.raises(UserError, match="match: sbatch refused the job"):
        curate(wait=True)


def test_killed_task_names_its_shard(slurm_cluster, tmp_path, monkeypatch):
    for name in ("SLURM_CONF", "PATH"):
        monkeypatch.setenv(name, slurm_cluster.env[name])
    monkeypatch.setattr("mc2_hpc.jobs.slurm._POLL_S", 0.5)
    engine = Slurm({"partition": slurm_cluster.partition, "time": "10"}, wait=True)
    shards = {"import os; os.kill(os.getpid(), 9)": {}, "pass": {}}
    with pytest.raises(UserError, match="s: a worker was killed at 'import os"):
        run_stages([Stage("s", tmp_path, shards, exec, lambda name: False)], engine)


def test_what_comes_after_a_change_looks_again(slurm_cluster, tmp_path, monkeypatch):
    """The second stage is done when it is submitted, and no more so when the first has run."""
    for name in ("SLURM_CONF", "PATH"):
        monkeypatch.setenv(name, slurm_cluster.env[name])
    monkeypatch.setattr("mc2_hpc.jobs.slurm._POLL_S", 0.5)
    engine = Slurm({"partition": slurm_cluster.partition, "time": "10"}, wait=True)
    place = {"folder": str(tmp_path)}
    one, other = tmp_path / "a", tmp_path / "b"
    one.write_text("old")
    other.write_text("old")
    write = Stage("write", tmp_path, {"open(folder + '/a', 'w').write('new')": place}, exec, lambda name: False)
    copy_code = "import shutil; shutil.copy(folder + '/a', folder + '/b')"
    copy = Stage("copy", tmp_path, {copy_code: place}, exec, lambda name: one.read_text() == other.read_text())
    assert copy.undone() == []
    with pytest.raises(UserError, match="write: its Slurm job has ended and 1 of 1 shards are not done"):
        run_stages([write, copy], engine)  # by its own word the first is never done
    slurm_cluster.wait_until("the end of the chain", lambda: not queue(slurm_cluster))
    assert other.read_text() == "new"
