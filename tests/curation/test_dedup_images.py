"""De-duplication of images: copies go and originals stay, whatever the shards, and killed runs are continued."""

import csv
import io
import json
import os
import subprocess
import sys
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mc2_hpc import jobs
from mc2_hpc.curation import dedup_images
from mc2_hpc.curation.dedup_images import plan_dedup_images
from mc2_hpc.curation.filter import plan_filter
from mc2_hpc.curation.filtering.record import pool_filters
from mc2_hpc.curation.pool.captions import list_pool
from mc2_hpc.errors import UserError
from mc2_hpc.jobs import Local, Ray
from mc2_hpc.jobs.named import Named
from mc2_hpc.tar import write_tar
from tests.curation.planted import KINDS, copies_of, encoded, mirrored, small_images, web_images
from tests.holding import held
from tests.killing import WAIT_S, kill_when


def make_image(seed, size=(96, 64), quality=90):
    """An encoded smooth image, unlike that of any other seed."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    return encoded(Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC), quality)


def write_pool(folder, shards):
    """A pool as fetching writes it, from ``{shard: {key: bytes}}``, with two texts per key."""
    for name, images in shards.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_tar(folder / f"{name}.tar", [(f"{key}.jpg", images[key]) for key in images])
        keys = [key for key in images for _ in range(2)]
        table = pa.table({"key": keys, "text": [f"text {number}" for number in range(len(keys))]})
        pq.write_table(table, folder / f"{name}.parquet")
    return folder


def members(path):
    with tarfile.open(path) as tar:
        return tar.getnames()


def kept_keys(out):
    return {name.rpartition(".")[0] for path in out.glob("*.tar") for name in members(path)}


def report(out):
    """Where each removed key's copy stays."""
    rows = {}
    for path in (out / "removed").rglob("*.csv"):
        with open(path, newline="") as file:
            rows |= {row["key"]: row["kept"] for row in csv.DictReader(file)}
    return rows


def test_one_of_each_group_stays_with_its_rows_and_bytes(tmp_path):
    image = {seed: make_image(seed) for seed in range(6)}
    flipped = encoded(mirrored(Image.open(io.BytesIO(image[1]))))
    first = {"a": image[0], "b": make_image(1, quality=40), "c": image[2], "d": image[3]}
    second = {"e": flipped, "f": make_image(2, (192, 128)), "g": image[4], "h": image[3]}
    pool = write_pool(tmp_path / "pool", {"0": first, "1": second})
    result = jobs.run(plan_dedup_images(pool, tmp_path / "out"))
    assert result == {
        "images_read": 8,
        "images": 5,
        "texts": 10,
        "groups": 3,
        "largest_group": 2,
        "drops": {"duplicate_image": 3},
    }
    # Of each group: the largest file of one size, more pixels, and the first key of equal files.
    assert report(tmp_path / "out") == {"b": "e", "c": "f", "h": "d"}
    assert members(tmp_path / "out" / "0.tar") == ["a.jpg", "d.jpg"]
    rows = pq.read_table(tmp_path / "out" / "0.parquet")
    assert rows["key"].to_pylist() == ["a", "a", "d", "d"] and rows["text"].to_pylist()[2:] == ["text 6", "text 7"]
    with tarfile.open(tmp_path / "out" / "1.tar") as tar:
        assert tar.extractfile("f.jpg").read() == second["f"]
    settings = json.loads((tmp_path / "out" / "dedup_images.json").read_text())
    assert settings["encoder"] is None and settings["hashes"] == {
        "phash": {"name": "phash", "max_distance": 6, "max_check": 40}
    }


def test_planted_copies_among_real_images(shared_data, tmp_path):
    """Recall and precision of the default settings, over all kinds of copies."""
    originals = web_images(shared_data)
    planted = copies_of(originals)
    others = small_images(shared_data, 500)
    of_kind = {kind: {f"{key} {kind}": planted[key, kind] for key in originals} for kind in KINDS}
    pool = write_pool(tmp_path / "pool", {"originals": originals, "others": others, **of_kind})
    jobs.run(plan_dedup_images(pool, tmp_path / "out"))
    kept = kept_keys(tmp_path / "out")
    groups = {
        key: [f"{key} {kind}" for kind in KINDS if f"{key} {kind}" in kept] + [key] * (key in kept) for key in originals
    }
    assert all(groups.values()), "some image is gone with all its copies"
    missed = sum(len(copies) - 1 for copies in groups.values())
    removed = 32 * (1 + len(KINDS)) - sum(map(len, groups.values()))
    wrongly = len(others) - len(kept & others.keys())
    assert 1 - missed / (32 * len(KINDS)) >= 0.99, groups
    assert removed / (removed + wrongly) >= 0.99, sorted(others.keys() - kept)


def test_result_is_a_function_of_the_set_of_images(tmp_path):
    """Other shards, names, orders, numbers of workers keep the same images."""
    images = {f"{seed}-{quality}": make_image(seed, quality=quality) for seed in range(8) for quality in (90, 60, 30)}
    keys = sorted(images)
    kept = []
    for number, order in enumerate((keys, keys[::-1], np.random.default_rng(0).permutation(keys).tolist())):
        cut = 1 + number * 9
        parts = {"x": {key: images[key] for key in order[:cut]}, "y": {key: images[key] for key in order[cut:]}}
        pool = write_pool(tmp_path / f"pool{number}", parts)
        jobs.run(plan_dedup_images(pool, tmp_path / f"out{number}"), Local(2 if number == 1 else 1))
        kept.append(kept_keys(tmp_path / f"out{number}"))
    assert kept[0] == kept[1] == kept[2] == {f"{seed}-90" for seed in range(8)}


def test_a_search_in_slices_finds_the_same(tmp_path, monkeypatch, outputs):
    images = {f"{seed}-{quality}": make_image(seed, quality=quality) for seed in range(4) for quality in (90, 30)}
    pool = write_pool(tmp_path / "pool", {"0": images})
    jobs.run(plan_dedup_images(pool, tmp_path / "whole"))
    monkeypatch.setattr(dedup_images, "CODES_PER_GB", 25)
    jobs.run(plan_dedup_images(pool, tmp_path / "sliced"))
    whole, sliced = (outputs(tmp_path / name) for name in ("whole", "sliced"))
    assert {name: data for name, data in whole.items() if not name.startswith("search/")} == {
        name: data for name, data in sliced.items() if not name.startswith("search/")
    }


def test_ray_gives_the_same_bytes(tmp_path, outputs):
    pytest.importorskip("ray", reason="Ray is not installed (pip install 'mc2_hpc[ray]')")
    images = {f"{seed}-{quality}": make_image(seed, quality=quality) for seed in range(4) for quality in (90, 30)}
    keys = sorted(images)
    parts = {"x": {key: images[key] for key in keys[:3]}, "y": {key: images[key] for key in keys[3:]}}
    pool = write_pool(tmp_path / "pool", parts)
    counters = [
        jobs.run(plan_dedup_images(pool, tmp_path / name), engine)
        for name, engine in (("local", Local(1)), ("ray", Ray(workers=2, tasks=2)))
    ]
    assert counters[0] == counters[1] and counters[0]["groups"] == 4
    assert outputs(tmp_path / "local") == outputs(tmp_path / "ray")


def test_plain_tars_and_undecodable_images(tmp_path):
    """Captions go with their image; what cannot be decoded is dropped by reason; a shard without images vanishes."""
    (tmp_path / "pool" / "deep").mkdir(parents=True)
    files = [("./a.jpg", make_image(1)), ("./a.txt", b"one"), ("b.png", b"text"), ("b.txt", b"two")]
    write_tar(tmp_path / "pool" / "deep" / "s.tar", [*files, ("c.jpg", make_image(2)[:400]), ("c.json", b"{}")])
    write_tar(tmp_path / "pool" / "deep" / "t.tar", [("d.img.jpg", make_image(1, quality=50)), ("d.txt", b"three")])
    result = jobs.run(plan_dedup_images(tmp_path / "pool", tmp_path / "out"))
    drops = {"duplicate_image": 1, "image_truncated": 1, "image_undecodable": 1}
    assert result == {"images_read": 4, "images": 1, "texts": 0, "groups": 1, "largest_group": 2, "drops": drops}
    assert members(tmp_path / "out" / "s.tar") == ["./a.jpg", "./a.txt"]
    assert not (tmp_path / "out" / "t.tar").exists()


def test_rows_go_with_an_image_whose_name_is_too_long(tmp_path):
    name = "k" * 100 + "/" + "k" * 97
    images = {"a": make_image(0), name: make_image(1)}
    (tmp_path / "pool").mkdir()
    with tarfile.open(tmp_path / "pool" / "0.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        for key, data in images.items():
            for file, content in ((f"{key}.jpeg", data), (f"{key}.x", b"more")):
                info = tarfile.TarInfo(file)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    pq.write_table(pa.table({"key": ["a", name], "text": ["one", "two"]}), tmp_path / "pool" / "0.parquet")
    result = jobs.run(plan_dedup_images(tmp_path / "pool", tmp_path / "out"))
    assert result["drops"] == {"name_too_long": 1} and result["images"] == result["texts"] == 1
    assert members(tmp_path / "out" / "0.tar") == ["a.jpeg", "a.x"]
    assert pq.read_table(tmp_path / "out" / "0.parquet")["key"].to_pylist() == ["a"]


def test_added_and_removed_shards_change_the_groups(tmp_path):
    """Links number the images of all shards, so those of another set of shards may not be used."""
    shards = {name: {f"{name}{seed}": make_image(seed) for seed in range(4)} for name in "bc"}
    pool = write_pool(tmp_path / "pool", shards)
    jobs.run(plan_dedup_images(pool, tmp_path / "out"))
    assert kept_keys(tmp_path / "out") == {f"b{seed}" for seed in range(4)}
    write_pool(pool, {"a": {f"a{seed}": make_image(seed) for seed in range(2)}})
    jobs.run(plan_dedup_images(pool, tmp_path / "out"))
    assert kept_keys(tmp_path / "out") == {"a0", "a1", "b2", "b3"}
    write_pool(pool, {"A": {f"A{seed}": make_image(seed) for seed in range(4)}})
    jobs.run(plan_dedup_images(pool, tmp_path / "out"))
    assert kept_keys(tmp_path / "out") == {f"A{seed}" for seed in range(4)}
    assert sorted(path.name for path in (tmp_path / "out").glob("*.*") if path.is_file()) == [
        ".lock",
        "A.parquet",
        "A.tar",
        "dedup_images.json",
    ]
    for path in [pool / "A.tar", pool / "A.parquet", *(tmp_path / "out").rglob("A.*")]:
        path.unlink()
    for path in [pool / "a.tar", pool / "a.parquet", *(tmp_path / "out").rglob("a.*")]:
        path.unlink()
    result = jobs.run(plan_dedup_images(pool, tmp_path / "out"))
    assert kept_keys(tmp_path / "out") == {f"b{seed}" for seed in range(4)} and result["groups"] == 4


def test_limits_are_in_the_record_of_what_follows(tmp_path):
    """A filtered pool's filters, and the removal of copies, are known to matching and to a second removal."""
    pool = write_pool(tmp_path / "pool", {"0": {f"k{seed}": make_image(seed) for seed in range(3)}})
    jobs.run(plan_filter(pool, tmp_path / "filtered", filters=[Named("mc2_hpc.filters.Size", {"least": 5})]))
    jobs.run(plan_dedup_images(tmp_path / "filtered", tmp_path / "one", max_distance=5))
    encoder = Named("tests.curation.test_image_features.Colours", {})
    jobs.run(plan_dedup_images(tmp_path / "one", tmp_path / "two", features=encoder, feature_distance=0))
    size, first, second = pool_filters(list_pool(tmp_path / "two"))
    assert size["name"] == "mc2_hpc.filters.Size" and size["arguments"]["least"] == 5
    pair = {"phash_max_distance": 5, "phash_max_check": 40}
    assert first == {"name": "dedup-images", "arguments": pair, "sources": {}}
    assert second["arguments"]["features_max_distance"] == 0
    assert second["arguments"]["encoder"] == {"name": encoder.name, "arguments": {}}


def test_every_file_is_restored(tmp_path, outputs):
    """Every file is removed in turn, as a kill may leave it: the same command gives the same bytes."""
    shards = {name: {f"{name}{seed}": make_image(seed) for seed in range(3)} for name in "ab"}
    pool = write_pool(tmp_path / "pool", shards)

    def again():
        jobs.run(plan_dedup_images(pool, tmp_path / "out"))

    again()
    whole = outputs(tmp_path / "out")
    for name in whole:
        if not name.startswith("search/") or name.endswith("/000.npy"):
            (tmp_path / "out" / name).unlink()
            if name.startswith("removed/"):  # made together with this marker, which a kill leaves out
                next((tmp_path / "out" / "search").glob("*/groups.json")).unlink()
            again()
            assert outputs(tmp_path / "out") == whole, name


def test_killed_run_is_continued(tmp_path, outputs):
    """A shard that cannot be opened yet holds a worker at a known place until everything is killed."""
    shards = {str(name): {f"{name}-{seed}": make_image(seed + name) for seed in range(3)} for name in range(4)}
    pool = write_pool(tmp_path / "pool", shards)
    jobs.run(plan_dedup_images(pool, tmp_path / "whole"))
    command = [sys.executable, "-m", "mc2_hpc.cli", "curate", "dedup-images", str(pool), "--workers", "2"]
    command += ["--out", str(tmp_path / "out")]
    hashed = tmp_path / "out" / "hashes" / "stats"
    with held(pool / "3.tar"):
        kill_when(command, lambda: len(list(hashed.glob("[0-9].json"))) == 3)
    before = {path: path.stat().st_mtime_ns for path in hashed.glob("[0-9].json")}
    subprocess.run(command, check=True, capture_output=True, timeout=WAIT_S)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert outputs(tmp_path / "out") == outputs(tmp_path / "whole")


def test_a_tar_that_was_written_again_is_hashed_again(tmp_path):
    """The same keys with other images: nothing of the old ones decides what goes."""
    pool = write_pool(tmp_path / "pool", {"0": {"a": make_image(0), "b": make_image(0, quality=50)}})
    assert jobs.run(plan_dedup_images(pool, tmp_path / "out"))["images"] == 1
    write_pool(pool, {"0": {"a": make_image(1), "b": make_image(2)}})
    result = jobs.run(plan_dedup_images(pool, tmp_path / "out"))
    assert result["images"] == 2 and result["groups"] == 0 and kept_keys(tmp_path / "out") == {"a", "b"}


@pytest.mark.parametrize("keep_time", [True, False])
def test_a_tar_that_changes_while_it_is_compared_is_an_error(tmp_path, keep_time):
    """By size and time of the tar, or by the sizes of its images if both are as they were."""
    images = {"a": make_image(0), "b": make_image(1, quality=30)}
    pool = write_pool(tmp_path / "pool", {"0": images})
    jobs.run(plan_dedup_images(pool, tmp_path / "out"))
    times = (pool / "0.tar").stat()
    write_tar(pool / "0.tar", [("a.jpg", images["b"]), ("b.jpg", images["a"])])
    if keep_time:
        os.utime(pool / "0.tar", ns=(times.st_atime_ns, times.st_mtime_ns))
        assert (pool / "0.tar").stat().st_size == times.st_size
    (shard,) = list_pool(pool)
    with pytest.raises(UserError, match=r"0.tar: has changed since it was hashed; run the same command again"):
        dedup_images.WriteShard(tmp_path / "out")("0", shard)


def test_a_large_jpeg_ranks_by_all_its_pixels(tmp_path, monkeypatch):
    """Training decodes it at a smaller scale, but it is still the larger copy."""
    pool = write_pool(tmp_path / "pool", {"0": {"a": make_image(0, (192, 128)), "b": make_image(0, (288, 192))}})
    monkeypatch.setattr("mc2_hpc.images.open_image.__kwdefaults__", {"max_pixels": 200 * 150})
    monkeypatch.setattr("mc2_hpc.images.image_size.__kwdefaults__", {"max_pixels": 200 * 150})
    jobs.run(plan_dedup_images(pool, tmp_path / "out"))
    assert report(tmp_path / "out") == {"a": "b"}


def test_bad_input_is_named(tmp_path):
    pool = write_pool(tmp_path / "pool", {"a": {"k": make_image(1)}})
    with pytest.raises(UserError, match="phash: max_distance=17 must be 0 to 16 of 64 bits"):
        plan_dedup_images(pool, tmp_path / "out", max_distance=17)
    with pytest.raises(UserError, match="phash: max_check=193 must be 0 to 192 bits"):
        plan_dedup_images(pool, tmp_path / "out", max_check=193)
    jobs.run(plan_dedup_images(pool, tmp_path / "out"))
    with pytest.raises(UserError, match="made with another hashes"):
        plan_dedup_images(pool, tmp_path / "out", max_distance=3)
    for same in (pool, tmp_path / "out" / ".." / "pool"):
        with pytest.raises(UserError, match="pool: holds the shards that are read; name another folder"):
            plan_dedup_images(pool, same)
    (tmp_path / "out" / "hashes" / "images" / "a.arrow").write_bytes(b"damaged")
    (tmp_path / "out" / "stats" / "a.json").unlink()
    with pytest.raises(UserError, match="a.arrow: not readable .*; delete it and run the same command again"):
        jobs.run(plan_dedup_images(pool, tmp_path / "out"))
    (pool / "a.tar").unlink()
    with pytest.raises(UserError, match="a.parquet: there is no a.tar with its images"):
        plan_dedup_images(pool, tmp_path / "out2")
    write_tar(tmp_path / "b.tar", [("x.jpg", b"no"), ("y.jpg", b"no")])
    with pytest.raises(UserError, match=r"nothing was kept \(images 0\): image_undecodable 2"):
        jobs.run(plan_dedup_images(tmp_path / "b.tar", tmp_path / "out3"))
