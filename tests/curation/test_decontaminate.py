"""Decontamination: copies of benchmark images are removed, other images stay, and every removal is reported."""

import csv
import io
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from mc2_hpc import jobs
from mc2_hpc.curation.decontaminate import MAX_DISTANCE, plan_decontaminate
from mc2_hpc.curation.matched import write_matched
from mc2_hpc.curation.pool import perceptual_hash
from mc2_hpc.curation.pool.perceptual_hash import image_hashes, nearest
from mc2_hpc.drops import Dropped
from mc2_hpc.errors import UserError
from mc2_hpc.jobs import Local
from mc2_hpc.tar import write_tar

pytest.importorskip("imagehash", reason="imagehash is not installed")


def make_image(seed, size=(96, 64), form="JPEG", **options):
    """An encoded smooth image, unlike that of any other seed."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).save(file, form, **options)
    return file.getvalue()


def write_shard(folder, name, images, texts=2):
    """A training shard as packing writes it, from ``{key: bytes}``."""
    folder.mkdir(exist_ok=True)
    write_tar(folder / f"{name}.tar", [(f"{key}.jpg", images[key]) for key in sorted(images)])
    keys = [key for key in sorted(images) for _ in range(texts)]
    write_matched(
        folder / f"{name}.parquet",
        pa.table(
            {
                "key": keys,
                "text": [f"text {index}" for index in range(len(keys))],
                "lang": ["en"] * len(keys),
                "entries": pa.array([[1, 2]] * len(keys), pa.list_(pa.field("element", pa.uint32()))),
            }
        ),
    )
    return folder


def benchmark_folder(folder, seeds):
    (folder / "class").mkdir(parents=True)
    for seed in seeds:
        (folder / "class" / f"{seed}.png").write_bytes(make_image(seed, (224, 224), "PNG"))
    (folder / "labels.txt").write_text("not an image")
    return folder


def members(path):
    with tarfile.open(path) as tar:
        return tar.getnames()


def report(out):
    with open(out / "removed.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_benchmark_images_are_removed_from_tar_and_rows(tmp_path):
    shards = write_shard(tmp_path / "shards", "a", {f"k{seed}": make_image(seed) for seed in range(8)})
    write_shard(shards, "b", {"k9": make_image(9), "k2": make_image(2, quality=30)})
    against = benchmark_folder(tmp_path / "benchmark", [2, 5, 77])
    result = jobs.run(plan_decontaminate(shards, against, tmp_path / "out"))
    assert members(tmp_path / "out" / "a.tar") == [f"k{seed}.jpg" for seed in (0, 1, 3, 4, 6, 7)]
    rows = pq.read_table(tmp_path / "out" / "a.parquet")
    assert rows["key"].to_pylist() == [f"k{seed}" for seed in (0, 1, 3, 4, 6, 7) for _ in range(2)]
    assert members(tmp_path / "out" / "b.tar") == ["k9.jpg"]
    assert result == {"images_read": 10, "images": 7, "removed": 3, "drops": {}}
    removed = [(row["key"], row["benchmark"], row["shard"]) for row in report(tmp_path / "out")]
    names = {seed: str(against / "class" / f"{seed}.png") for seed in (2, 5)}
    assert removed == [("k2", names[2], "a"), ("k5", names[5], "a"), ("k2", names[2], "b")]
    assert all(int(row["distance"]) <= MAX_DISTANCE for row in report(tmp_path / "out"))


def test_shards_that_lose_nothing_keep_their_bytes_and_empty_ones_vanish(tmp_path):
    shards = write_shard(tmp_path / "shards", "clean", {f"k{seed}": make_image(seed) for seed in range(3)})
    write_shard(shards, "dirty", {"k5": make_image(5)})
    jobs.run(plan_decontaminate(shards, benchmark_folder(tmp_path / "benchmark", [5]), tmp_path / "out"))
    for name in ("clean.tar", "clean.parquet"):
        assert (tmp_path / "out" / name).read_bytes() == (shards / name).read_bytes()
    assert not list((tmp_path / "out").glob("dirty.*"))


def test_plain_shards_and_benchmark_tars(tmp_path):
    """WebDataset tars on both sides; texts are removed with their image, and not only JPEG images are compared."""
    for folder in ("shards", "benchmark"):
        (tmp_path / folder).mkdir()
    files = [("a.jpg", make_image(1)), ("a.txt", b"one"), ("b.png", make_image(2, form="PNG")), ("b.txt", b"two")]
    write_tar(tmp_path / "shards" / "s.tar", files)
    write_tar(tmp_path / "benchmark" / "test.tar", [("x/2.webp", make_image(2, form="WEBP")), ("x/2.cls", b"4")])
    for against in (tmp_path / "benchmark", tmp_path / "benchmark" / "test.tar"):
        out = tmp_path / against.name / "out"
        assert jobs.run(plan_decontaminate(tmp_path / "shards", against, out))["removed"] == 1
        assert members(out / "s.tar") == ["a.jpg", "a.txt"]
        assert report(out)[0]["benchmark"] == f"{tmp_path}/benchmark/test.tar/x/2.webp"


def test_images_that_cannot_be_decoded_are_dropped_and_counted(tmp_path):
    images = {"good": make_image(1), "cut": make_image(2)[:400], "none": b"", "text": b"hello"}
    shards = write_shard(tmp_path / "shards", "a", images)
    result = jobs.run(plan_decontaminate(shards, benchmark_folder(tmp_path / "benchmark", [5]), tmp_path / "out"))
    assert members(tmp_path / "out" / "a.tar") == ["good.jpg"]
    assert set(pq.read_table(tmp_path / "out" / "a.parquet")["key"].to_pylist()) == {"good"}
    assert result == {"images_read": 4, "images": 1, "removed": 0, "drops": {"image_undecodable": 3}}


def test_huge_images_are_not_decoded_in_full():
    for form in ("JPEG", "PNG"):
        with pytest.raises(Dropped, match="image_too_large: 96x64"):
            image_hashes(make_image(1, form=form), max_pixels=96 * 64 // 9)
    reduced, whole = (image_hashes(make_image(1), max_pixels=most)[0] for most in (96 * 64 - 1, 96 * 64))
    assert np.bitwise_count(reduced ^ whole) <= MAX_DISTANCE


def test_cmyk_and_grey_images_are_decoded():
    image = Image.open(io.BytesIO(make_image(1)))
    for mode in ("CMYK", "L"):
        file = io.BytesIO()
        image.convert(mode).save(file, "JPEG")
        assert np.bitwise_count(image_hashes(file.getvalue())[0] ^ image_hashes(make_image(1))[0]) <= MAX_DISTANCE


@settings(deadline=None, max_examples=50)
@given(
    hnp.arrays(np.uint64, st.integers(0, 20)), hnp.arrays(np.uint64, st.integers(1, 20)), st.sampled_from([1, 30, 1000])
)
def test_nearest_equals_a_naive_search(hashes, against, pairs_at_once):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(perceptual_hash, "_PAIRS_AT_ONCE", pairs_at_once)
        index, distance = nearest(hashes, against)
    for value, i, bits in zip(hashes.tolist(), index, distance, strict=True):
        naive = [(value ^ other).bit_count() for other in against.tolist()]
        assert (bits, i) == (min(naive), naive.index(min(naive)))


def test_workers_change_nothing_and_finished_shards_are_skipped(tmp_path, monkeypatch):
    shards = write_shard(tmp_path / "shards", "a", {f"k{seed}": make_image(seed) for seed in range(4)})
    write_shard(shards, "b", {f"k{seed}": make_image(seed) for seed in range(4, 8)})
    against = benchmark_folder(tmp_path / "benchmark", [2, 5])
    results = [
        jobs.run(plan_decontaminate(shards, against, tmp_path / f"out{number}"), engine)
        for number, engine in enumerate((Local(), Local(2)))
    ]
    assert results[0] == results[1]
    for name in ("a.tar", "a.parquet", "b.tar", "b.parquet", "removed.csv"):
        assert (tmp_path / "out0" / name).read_bytes() == (tmp_path / "out1" / name).read_bytes()
    (tmp_path / "out1" / "b.tar").unlink()
    monkeypatch.setattr("mc2_hpc.curation.decontaminate.HashUnit.__call__", None)
    assert jobs.run(plan_decontaminate(shards, against, tmp_path / "out1")) == results[0]
    assert (tmp_path / "out0" / "b.tar").read_bytes() == (tmp_path / "out1" / "b.tar").read_bytes()


def test_bad_input_is_named(tmp_path):
    shards = write_shard(tmp_path / "shards", "a", {"k1": make_image(1)})
    against = benchmark_folder(tmp_path / "benchmark", [2])
    with pytest.raises(UserError, match="max_distance=32: must be 0 to 31"):
        jobs.run(plan_decontaminate(shards, against, tmp_path / "out", max_distance=32))
    with pytest.raises(UserError, match="nowhere: no such file or folder of benchmark images"):
        jobs.run(plan_decontaminate(shards, tmp_path / "nowhere", tmp_path / "out"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: no images"):
        jobs.run(plan_decontaminate(shards, tmp_path / "empty", tmp_path / "out"))
    jobs.run(plan_decontaminate(shards, against, tmp_path / "out"))
    with pytest.raises(UserError, match="made with another max_distance"):
        jobs.run(plan_decontaminate(shards, against, tmp_path / "out", max_distance=3))
    (against / "broken.jpg").write_bytes(b"\xff\xd8 broken")
    with pytest.raises(UserError, match="made with another against"):
        jobs.run(plan_decontaminate(shards, against, tmp_path / "out"))
    with pytest.raises(
        UserError, match="broken.jpg: .*cannot be decoded .* fix or remove it, then delete .*out2 and rerun"
    ):
        jobs.run(plan_decontaminate(shards, against, tmp_path / "out2"))
    (against / "broken.jpg").unlink()
    write_tar(tmp_path / "no-images.tar", [("a.txt", b"")])
    with pytest.raises(UserError, match="no-images.tar: holds no benchmark images"):
        jobs.run(plan_decontaminate(shards, tmp_path / "no-images.tar", tmp_path / "out5"))
    (shards / "c.tar").write_bytes(b"broken")
    with pytest.raises(UserError, match="1 of 2 .* failed.*c.tar: not a complete tar"):
        jobs.run(plan_decontaminate(shards, against, tmp_path / "out3"))
    assert members(tmp_path / "out3" / "a.tar") == ["k1.jpg"]
    (shards / "c.tar").unlink()
    (shards / "d.parquet").touch()
    with pytest.raises(UserError, match="d.parquet: there is no d.tar with its images"):
        jobs.run(plan_decontaminate(shards, against, tmp_path / "out4"))


def edited(image, edit):
    """An encoded copy of an image."""
    width, height = image.size
    quality = 90
    if edit == "re-encoded":
        quality = 30
    elif edit == "half":
        image = image.resize((width // 2, height // 2), Image.Resampling.BICUBIC)
    elif edit == "square":
        image = image.resize((224, 224), Image.Resampling.BICUBIC)
    elif edit == "grey":
        image = image.convert("L")
    elif edit.startswith("cropped"):
        cut = int(edit.split()[1]) / 100
        image = image.crop(
            tuple(round(side) for side in (width * cut, height * cut, width * (1 - cut), height * (1 - cut)))
        )
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return file.getvalue()


@pytest.mark.parametrize("edit", ["re-encoded", "half", "square", "grey", "cropped 1", "cropped 3", "cropped 5"])
def test_edited_copies_of_web_images_are_found(shared_data, tmp_path, edit):
    """Every copy is removed and its original named; images that are not in the benchmark stay."""
    with tarfile.open(shared_data / "cc12m-32.tar") as tar:
        raw = {member.name: tar.extractfile(member).read() for member in tar if member.name.endswith(".jpg")}
    keys = sorted(raw)
    write_tar(tmp_path / "benchmark.tar", [(name, raw[name]) for name in keys[:20]])
    copies = {name[:-4]: edited(Image.open(io.BytesIO(raw[name])).convert("RGB"), edit) for name in keys}
    shards = write_shard(tmp_path / "shards", "a", copies)
    jobs.run(plan_decontaminate(shards, tmp_path / "benchmark.tar", tmp_path / "out"))
    found = {row["key"]: row["benchmark"].rpartition("/")[2] for row in report(tmp_path / "out")}
    assert found == {name[:-4]: name for name in keys[:20]}
    assert members(tmp_path / "out" / "a.tar") == keys[20:]


def test_copies_and_false_alarms_among_small_images(shared_data):
    """CIFAR-10 at the default distance: re-encoded copies are found, different images hardly ever."""
    tables = [pq.read_table(shared_data / f"cifar10-{part}.parquet").slice(0, 2000) for part in ("train", "test")]
    train, test = ([bytes(data) for data in table["jpg"].to_pylist()] for table in tables)
    benchmark = np.array([image_hashes(data)[0] for data in test])
    copies = [edited(Image.open(io.BytesIO(data)).convert("RGB"), "re-encoded") for data in test[:500]]
    _, distance = nearest(np.array([image_hashes(data)[0] for data in copies]), benchmark)
    assert (distance <= MAX_DISTANCE).mean() > 0.97
    _, distance = nearest(np.array([image_hashes(data)[0] for data in train]), benchmark)
    # The two sets share a few images, which are found correctly.
    assert (distance <= MAX_DISTANCE).mean() < 0.005


def test_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("mc2_hpc.curation.decontaminate.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install imagehash"):
        jobs.run(plan_decontaminate(tmp_path, tmp_path, tmp_path / "out"))


def test_a_name_in_a_benchmark_tar_is_one_line(tmp_path):
    shards = write_shard(tmp_path / "shards", "a", {"k": make_image(1)})
    write_tar(tmp_path / "b.tar", [("x\n\x1b[31m.jpg", b"no image")])
    with pytest.raises(UserError, match=r"b.tar/x\\n\\x1b\[31m.jpg: this benchmark image cannot be decoded") as error:
        jobs.run(plan_decontaminate(shards, tmp_path / "b.tar", tmp_path / "out"))
    assert str(error.value).isprintable()
