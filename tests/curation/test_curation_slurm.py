"""Curation on a real Slurm: a chain of array jobs, a failure that stops it, and a rerun that continues."""

from pathlib import Path

import pytest

from mc2_hpc import jobs
from mc2_hpc.curation.dedup_images import plan_dedup_images
from mc2_hpc.curation.run import plan_run
from mc2_hpc.errors import UserError
from mc2_hpc.jobs import Slurm
from mc2_hpc.jobs.named import Named
from tests.curation.test_dedup_images import make_image, write_pool


@pytest.fixture
def pool(make_pool) -> Path:
    return make_pool(4)


def queue(cluster) -> list[str]:
    return cluster.command("squeue", "--noheader", "--format", "%j").split()


def test_chain_of_array_jobs(slurm_cluster, pool, tmp_path, monkeypatch, caplog, outputs):
    caplog.set_level("INFO", logger="mc2_hpc")
    for name in ("SLURM_CONF", "PATH"):
        monkeypatch.setenv(name, slurm_cluster.env[name])
    monkeypatch.setattr("mc2_hpc.jobs.slurm_queue.POLL_S", 0.5)
    # Arrays of one task: the two tasks of a stage are two jobs.
    out, options = tmp_path / "out", {"partition": slurm_cluster.partition, "time": "10", "max_array_size": "1"}

    def curate(wait: bool):
        engine = Slurm(options, tasks=2, wait=wait)
        return jobs.run(plan_run(pool, pool.parent / "metadata", out, t_en=30), engine)

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
    assert curate(wait=False) is None  # only checks, and submits nothing again
    assert "failed before at '2'" in caplog.text and "match: 3/4 shards done, Slurm job" in caplog.text
    assert set(queue(slurm_cluster)) <= set(submitted)
    report = curate(wait=True)
    assert (out / "matched" / "1.parquet").stat().st_mtime_ns == finished

    here = jobs.run(plan_run(pool, pool.parent / "metadata", tmp_path / "here", t_en=30))
    assert report == here and outputs(out) == outputs(tmp_path / "here")
    assert curate(wait=True) == here and not queue(slurm_cluster)  # all finished: no job

    (out / "matched" / "stats" / "0.json").unlink()
    monkeypatch.setitem(options, "partition", "none")
    with pytest.raises(UserError, match="match: sbatch refused the job"):
        curate(wait=True)


@pytest.mark.slow
def test_images_are_deduplicated_on_slurm(slurm_cluster, tmp_path, monkeypatch, outputs):
    """Every stage is one array of the same chain; an added shard makes the search and the groups anew."""
    for name in ("SLURM_CONF", "PATH"):
        monkeypatch.setenv(name, slurm_cluster.env[name])
    monkeypatch.setattr("mc2_hpc.jobs.slurm_queue.POLL_S", 0.5)
    engine = Slurm({"partition": slurm_cluster.partition, "time": "10"}, tasks=2, wait=True)
    encoder = Named("tests.curation.test_image_features.Colours", {})
    shards = {name: {f"{name}{seed}": make_image(seed) for seed in range(3)} for name in "bca"}
    pool = write_pool(tmp_path / "pool", {name: shards[name] for name in "bc"})
    for added in ({}, {"a": shards["a"]}):
        write_pool(pool, added)
        result = jobs.run(plan_dedup_images(pool, tmp_path / "out", features=encoder), engine)
        here = tmp_path / f"here{len(added)}"
        assert result == jobs.run(plan_dedup_images(pool, here, features=encoder))
        assert outputs(tmp_path / "out") == outputs(here)
