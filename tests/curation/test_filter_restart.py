"""``mc2 curate filter``: neither order nor workers, engines or kills change a byte."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from mc2_hpc.errors import UserError
from mc2_hpc.jobs import Local, Ray, Slurm
from mc2_hpc.jobs.named import Named
from tests.curation.filtered_pool import run_filter, write_shard
from tests.curation.image_server import encoded
from tests.holding import held
from tests.killing import kill_when

SIZE, LENGTH = "mc2_hpc.filters.Size", "mc2_hpc.filters.Length"
SMALL = Named(SIZE, {"least": 20})
SHARP = Named("image_filters.Sharpness", {"least": 57.5})


def many(folder: Path, shards: int, order: random.Random | None = None) -> Path:
    """Shards of 30 samples, whose rows and members are shuffled by ``order``."""
    for shard in range(shards):
        keys = [f"{shard}-{n:02d}" for n in range(30)]
        rows = [(key, f"{key} {text}", "en") for key in keys for text in ("a dog", "a cat", "it")]
        rows += [(keys[0], "the same", "de"), (keys[0], "the same", "en")]
        images = [(f"{key}.jpg", encoded(size=(32 + n, 16 + n), seed=n)) for n, key in enumerate(keys)]
        for values in (rows, images) if order else ():
            order.shuffle(values)
        write_shard(folder, f"{shard}", dict(images), rows)
    return folder


def test_order_workers_and_engines_change_nothing(tmp_path, outputs, examples):
    filters = SMALL, Named(LENGTH, {"min_characters": 9}), SHARP
    one = run_filter(many(tmp_path / "pool", 3), tmp_path / "one", *filters)
    shuffled = many(tmp_path / "shuffled", 3, random.Random(0))
    assert run_filter(shuffled, tmp_path / "two", *filters, engine=Local(2, 3)) == one
    whole = outputs(tmp_path / "one")
    assert outputs(tmp_path / "two") == whole and one["drops"]["too_short"] and one["drops"]["sharpness_low"]
    assert {"0.tar", "0.parquet", "judged/0.parquet", "stats/0.json", "filter.json"} <= set(whole)


def test_ray(tmp_path):
    pytest.importorskip("ray", reason="Ray is not installed (pip install 'mc2_hpc[ray]')")
    counters = run_filter(many(tmp_path / "pool", 2), tmp_path / "out", SMALL, engine=Ray(workers=2))
    assert counters["drops"] == {"caption_repeated": 2, "size_low": 2 * 4 * 3 + 2}


def test_slurm(slurm_cluster, tmp_path, examples, monkeypatch):
    for name in ("SLURM_CONF", "PATH"):
        monkeypatch.setenv(name, slurm_cluster.env[name])
    monkeypatch.setattr("mc2_hpc.jobs.slurm_queue.POLL_S", 0.5)
    engine = Slurm({"partition": slurm_cluster.partition, "time": "10"}, tasks=2, wait=True)
    sharp = Named("image_filters.Sharpness", {"most": 255})
    counters = run_filter(many(tmp_path / "pool", 2), tmp_path / "out", SMALL, sharp, engine=engine)
    assert counters["drops"] == {"caption_repeated": 2, "size_low": 2 * 4 * 3 + 2}


def test_a_killed_run_gives_the_same_bytes(tmp_path, outputs):
    """A shard that cannot be opened yet holds the command at a known place until it is killed."""
    pool = many(tmp_path / "pool", 3)
    run_filter(pool, tmp_path / "whole", SMALL)
    words = ["filter", str(pool), "--out", str(tmp_path / "out"), "--workers", "1", "--filter", SIZE, "least=20"]
    command = [sys.executable, "-m", "mc2_hpc.cli", "curate", *words]
    with held(pool / "1.tar"):
        kill_when(command, (tmp_path / "out" / "stats" / "0.json").is_file)
    finished = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("0.*")}
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    assert outputs(tmp_path / "out") == outputs(tmp_path / "whole")
    assert {path: path.stat().st_mtime_ns for path in finished} == finished and len(finished) == 2


@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_failure_at_any_file_of_a_shard_is_made_good(tmp_path, outputs, monkeypatch, step):
    """The disk is full when the tar, the captions or the table of verdicts is written."""
    pool = many(tmp_path / "pool", 1)
    run_filter(pool, tmp_path / "whole", SMALL)
    replace, left = os.replace, iter(range(step - 1, -1, -1))

    def fail(source, target):
        if "/out/" in str(target) and str(target).endswith((".tar", ".parquet")):
            if next(left) == 0:
                raise OSError(28, "No space left on device")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", fail)
        with pytest.raises(UserError, match="No space left"):
            run_filter(pool, tmp_path / "out", SMALL)
    assert not (tmp_path / "out" / "stats" / "0.json").exists()
    run_filter(pool, tmp_path / "out", SMALL)
    assert outputs(tmp_path / "out") == outputs(tmp_path / "whole")


def test_a_lost_file_is_written_again(tmp_path, outputs):
    pool = many(tmp_path / "pool", 1)
    run_filter(pool, tmp_path / "out", SMALL)
    whole = outputs(tmp_path / "out")
    for name in ("0.tar", "0.parquet", "judged/0.parquet", "stats/0.json"):
        (tmp_path / "out" / name).unlink()
        run_filter(pool, tmp_path / "out", SMALL)
        assert outputs(tmp_path / "out") == whole
