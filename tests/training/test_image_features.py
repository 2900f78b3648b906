"""Features computed once: training from them equals training from the images, and what does not fit is refused."""

import errno
import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file

from mc2_hpc.cli import main
from mc2_hpc.config import load_config
from mc2_hpc.data.features import StoredFeatures
from mc2_hpc.data.loader import TrainLoader
from mc2_hpc.data.locations import LocalShards
from mc2_hpc.data.packing import pack_pairs
from mc2_hpc.data.remote import CannotReach
from mc2_hpc.data.shards import PlainShard
from mc2_hpc.distributed import process_group
from mc2_hpc.drops import Drop, Dropped
from mc2_hpc.errors import UserError
from mc2_hpc.models.clip import build_clip
from mc2_hpc.models.presets import resolve
from mc2_hpc.models.tensor_files import TensorFiles
from mc2_hpc.models.weights import resolve_checkpoint, write_tensors
from mc2_hpc.training.image_features import check_features
from mc2_hpc.training.initial import tokenizer
from tests.faults.diary import rows
from tests.faults.tiny_run import PER_SHARD, draw_pairs, write_config, write_pool
from tests.training.stored_features import check_refused

NUM_SAMPLES, NUM_BAD, STEPS = 256, 2, 7
"""One epoch is nearly eight steps."""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A frozen image tower, and a pool with images that are no images in two of its shards."""
    folder = tmp_path_factory.mktemp("pool")
    pool = write_pool(folder)
    shutil.rmtree(pool.shards)
    pairs = list(draw_pairs(NUM_SAMPLES))
    for number in (70, 130):
        pairs[number] = pairs[number]._replace(image=b"no image")
    pack_pairs(pairs, pool.shards, pairs_per_shard=PER_SHARD)
    values = {"steps": STEPS, "log_every": 1, "freeze": {"vision": "all"}, "seed": 3}
    return write_config(folder / "run.yaml", pool, **values)


@pytest.fixture(scope="module")
def mc2(ranks_of, config):
    """``mc2(ranks, command, *overrides)`` on the config."""

    def run(ranks, command, *overrides, **options):
        return ranks_of(ranks, "-m", "mc2_hpc.cli", command, config, *overrides, **options)

    return run


@pytest.fixture(scope="module")
def features(mc2, tmp_path_factory):
    folder = tmp_path_factory.mktemp("features") / "here"
    assert f"{folder}: 4 shards computed" in mc2(2, "features", f"data.features={folder}", "--batch=24").stdout
    return folder


def test_training_equals_the_online_run(mc2, features, tmp_path):
    """An epoch: the same samples and skips, and the same losses and weights up to the order of sums."""
    online, stored = tmp_path / "online", tmp_path / "stored"
    mc2(2, "train", f"output={online}")
    # On other numbers of ranks, in micro-batches, and resumed.
    settings = f"output={stored}", f"data.features={features}", "checkpoint.every=3"
    mc2(3, "train", *settings, "data.workers=1", "micro_batch=5")
    shutil.rmtree(stored / "checkpoints" / f"step-{STEPS:08d}")
    mc2(1, "train", *settings)
    assert rows(stored).keys() == rows(online).keys() == set(range(1, STEPS + 1))
    for step, expected in rows(online).items():
        found = rows(stored)[step]
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5), step
        assert found["skipped"] == expected["skipped"]
    assert sum(expected["skipped"].values()) == NUM_BAD
    folders = [resolve_checkpoint(run) for run in (online, stored)]
    expected, found = (TensorFiles(folder, "model") for folder in folders)
    assert expected.names() == found.names()
    for name in expected.names():
        if name.startswith("vision."):
            assert torch.equal(found.get(name), expected.get(name))
        elif not name.endswith("qkv.bias"):  # the keys' gradient is rounding noise
            torch.testing.assert_close(found.get(name), expected.get(name), rtol=0, atol=1e-4)
    positions = [json.loads((folder / "trainer.json").read_text())["position"] for folder in folders]
    assert positions[0] == positions[1]


def test_a_second_start_computes_only_what_is_missing(mc2, features, tmp_path):
    folder = shutil.copytree(features, tmp_path / "features")
    files = sorted(folder.glob("*.safetensors"))
    before = [path.read_bytes() for path in files]
    files[1].unlink()
    (folder / f".{files[2].name}.partial").write_bytes(b"of a killed start")
    assert f"{folder}: 1 shards computed" in mc2(1, "features", f"data.features={folder}", "--batch=24").stdout
    assert [path.read_bytes() for path in files] == before


def without_an_image(folder):
    path = sorted(folder.glob("*.safetensors"))[0]
    tensors = load_file(path)
    write_tensors(path, {**tensors, "hashes": tensors["hashes"][1:], "features": tensors["features"][1:]})


def other_types(folder):
    path = sorted(folder.glob("*.safetensors"))[0]
    tensors = load_file(path)
    write_tensors(path, {**tensors, "features": tensors["features"].half()})


def other_reasons(folder):
    path = sorted(folder.glob("*.safetensors"))[0]
    reasons = torch.frombuffer(bytearray(b'{"0": "no reason"}'), dtype=torch.uint8)
    write_tensors(path, {**load_file(path), "reasons": reasons})


def cut_off(folder):
    path = sorted(folder.glob("*.safetensors"))[0]
    path.write_bytes(path.read_bytes()[:100])


REFUSED = {
    "other weights": (["seed=4"], None, "features with image_tower .*, but this run has .*in another folder"),
    "other crops": (
        ["data.crop_scale=[0.5,1]"],
        None,
        r"features with crop_scale \(0.9, .* has \(0.5",
    ),
    "other data seed": (["data.seed=1"], None, "features with seed 0, but this run has 1"),
    "trained tower": (["freeze.vision=1"], None, "features of images cannot change; set freeze.vision=all"),
    "no features": ([], shutil.rmtree, "no image features there; compute them with mc2 features"),
    "no features of a shard": (
        [],
        lambda folder: sorted(folder.glob("*.safetensors"))[0].unlink(),
        "no features of 1 shards, such as .*run mc2 features again",
    ),
    "image without features": ([], without_an_image, "has an image without features, so it has changed since; run mc2"),
    "other types": ([], other_types, "damaged features .*; run mc2 features again"),
    "unknown reason": ([], other_reasons, "damaged features .*; run mc2 features again"),
    "cut off": ([], cut_off, "damaged features .*cut off.*; run mc2 features again"),
}


@pytest.mark.parametrize("overrides, change, words", REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused(config, features, tmp_path, overrides, change, words):
    check_refused(lambda folder: read_all(config, folder, tmp_path, *overrides), features, tmp_path, change, words)


def read_all(config, folder, tmp_path, *overrides):
    """As training does it."""
    run = load_config(config, [f"output={tmp_path / 'run'}", f"data.features={folder}", *overrides])
    with process_group() as ranks:
        arch = resolve(run.model)
        tokens = tokenizer(run, None, arch, ranks)
        clip = build_clip(arch, seed=run.seed)
        check = {"global_batch": 32, "image_size": 32, "tokenizer": tokens, "rank": 0, "world_size": 1}
        loader = TrainLoader(run.data, **check)
        check_features(clip, run, ranks)
        for _ in range(STEPS):
            next(loader)


def test_another_data_set_with_the_same_names_is_refused(config, features, tmp_path):
    """The same shards with the same keys, but other images."""
    pairs = [pair._replace(image=pair.image + bytes(500)) for pair in draw_pairs(NUM_SAMPLES)]
    pack_pairs(pairs, tmp_path / "shards", pairs_per_shard=PER_SHARD)
    words = "tar: its features are those of other images; name a folder of its own"
    with pytest.raises(UserError, match=words):
        read_all(config, features, tmp_path, f"data.train={tmp_path / 'shards'}")


def test_shards_of_one_name_are_refused(config, features, tmp_path):
    """Their features would be in one file."""
    train = config.parent / "shards"
    other = shutil.copytree(train, tmp_path / "other")
    with pytest.raises(UserError, match="features are stored by the shards' file names; rename one"):
        read_all(config, features, tmp_path, f"data.train={json.dumps([str(train), str(other)])}")


def test_a_folder_that_cannot_be_listed_is_one_line(config, features, tmp_path, monkeypatch):
    def fails(folder):
        raise PermissionError(errno.EACCES, "Permission denied", str(folder))

    monkeypatch.setattr(os, "listdir", fails)
    with pytest.raises(UserError, match=r"here: cannot be listed \(Permission denied\)"):
        StoredFeatures(features, [])


def cut_tar(shards, patch):
    path = shards / "00002.tar"
    path.write_bytes(path.read_bytes()[:5000])


def fail_to_read(shards, patch):
    read_image = PlainShard.read_image

    def read(shard, index):
        if index == 5 and shard.name.endswith("00002.tar"):
            raise Dropped(Drop.READ_ERROR, "Input/output error")
        return read_image(shard, index)

    patch.setattr(PlainShard, "read_image", read)


@pytest.mark.parametrize("damage, words", [(cut_tar, "cut off"), (fail_to_read, "image 5: Input/output error")])
def test_a_shard_that_cannot_be_read_now_has_no_features(damage, words, config, tmp_path, capsys):
    """The others have, and the same command computes what is missing once it can be read."""
    train, folder = config.parent / "shards", tmp_path / "features"
    shards = shutil.copytree(train, tmp_path / "shards")
    command = ["features", str(config), f"data.features={folder}", f"data.train={shards}"]
    with pytest.MonkeyPatch.context() as patch:
        damage(shards, patch)
        assert main(command) == 2
    error = capsys.readouterr().err
    assert f"1 shards could not be read, such as {shards / '00002.tar'}: " in error and words in error
    assert sorted(path.name for path in folder.glob("*.tar.*")) == [f"0000{n}.tar.safetensors" for n in (0, 1, 3)]
    shutil.copy(train / "00002.tar", shards)
    assert main(command) == 0
    assert capsys.readouterr().out == f"{folder}: 1 shards computed\n"


def test_storage_that_does_not_answer_is_one_line(config, tmp_path, monkeypatch, capsys):
    def fails(shards, number):
        raise CannotReach("s3://bucket/0.tar: could not be read for 60 s: time-out")

    monkeypatch.setattr(LocalShards, "open", fails)
    assert main(["features", str(config), f"data.features={tmp_path}"]) == 2
    assert "mc2: s3://bucket/0.tar: could not be read for 60 s: time-out\n" in capsys.readouterr().err


def test_what_cannot_be_computed_is_one_line(config, tmp_path, capsys):
    (tmp_path / "file").write_bytes(b"")
    cases = {
        "file: cannot be written (File exists); name a folder": [f"data.features={tmp_path / 'file'}"],
        "data.features is not set": [],
        "data.features and data.decode=dali: features are of images decoded on the CPU; set turbo": [
            f"data.features={tmp_path}",
            "data.decode=dali",
        ],
    }
    for words, overrides in cases.items():
        assert main(["features", str(config), *overrides]) == 2
        assert words in capsys.readouterr().err
