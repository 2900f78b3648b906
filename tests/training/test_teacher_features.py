"""A teacher's features computed once: training from them equals training with the teacher, on the same views of images;
what does not fit is refused, and the command computes again what has changed."""

import json
import os
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file

from mc2_hpc.cli import main
from mc2_hpc.config import load_config
from mc2_hpc.data.decode import decode_pil
from mc2_hpc.data.features import hash_texts
from mc2_hpc.data.loader import TrainLoader
from mc2_hpc.data.packing import write_shard
from mc2_hpc.distributed import process_group
from mc2_hpc.draws import hash_keys
from mc2_hpc.errors import UserError
from mc2_hpc.evaluation.dual_encoders import open_dual_encoder
from mc2_hpc.models.presets import resolve
from mc2_hpc.models.tensor_files import TensorFiles
from mc2_hpc.models.weights import resolve_checkpoint, write_tensors
from mc2_hpc.training.distillation import DistillationTeacher, StoredTeacher
from mc2_hpc.training.initial import tokenizer
from tests.faults.diary import rows
from tests.faults.tiny_run import draw_pairs, write_config
from tests.training.stored_features import check_refused
from tests.training.test_distillation import write_teacher

NUM, PER_SHARD, STEPS = 128, 32, 8
"""Two epochs of four steps; later steps train a sample with another of its captions."""


def write_shards(folder, *, word="more", images=b""):
    """Samples with a ``.txt`` and two captions in a record; one of the images is none."""
    pairs = list(draw_pairs(NUM))
    for first in range(0, NUM, PER_SHARD):
        files = []
        for number, pair in enumerate(pairs[first : first + PER_SHARD], first):
            record = json.dumps({"more": [f"{word} {number}", f"{word} of {pair.text[-8:]}"]})
            image = b"no image" if number == 70 else bytes(pair.image) + images
            files.append((pair.key, {"jpg": image, "txt": pair.text.encode(), "json": record.encode()}))
        write_shard(folder / f"{first // PER_SHARD:05d}.tar", files)
    return folder


def of_mix(shards, **more):
    """``data.train`` as a mix of one source, which draws from several caption fields."""
    return json.dumps([{"name": "squares", "path": str(shards), "captions": {"txt": 0.5, "json.more": 0.5}, **more}])


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """Of 48 px, with a tokenizer of its own."""
    texts = [pair.text.upper() for pair in draw_pairs(64)]
    return write_teacher(tmp_path_factory.mktemp("teacher") / "model", texts=texts, vocab_size=50)


@pytest.fixture(scope="module")
def config(tiny_pool, tmp_path_factory):
    """Crops that are the whole image in every epoch."""
    folder = tmp_path_factory.mktemp("config")
    path = write_config(folder / "run.yaml", tiny_pool, steps=STEPS, log_every=1, checkpoint={"every": 3})
    shards = write_shards(folder / "shards")
    with open(path, "a", encoding="utf-8") as stream:
        stream.write("distill: {scale: 50.0, weight: 0.8, features: here}\n")
    text = path.read_text(encoding="utf-8").replace(f"train: {tiny_pool.shards}", f"train: {of_mix(shards)}")
    path.write_text(text.replace("data:\n", "data:\n  crop_scale: [1.0, 1.0]\n"), encoding="utf-8")
    return path


def compute(config, teacher, folder, *overrides):
    """The exit code of the command in this process."""
    return main(["features", str(config), "--teacher", str(teacher), f"distill.features={folder}", *overrides])


@pytest.fixture(scope="module")
def features(ranks_of, config, teacher, tmp_path_factory):
    folder = tmp_path_factory.mktemp("features") / "here"
    command = "features", config, "--teacher", teacher, f"distill.features={folder}", "--batch=24"
    assert f"{folder}: 4 shards computed" in ranks_of(2, "-m", "mc2_hpc.cli", *command).stdout
    return folder


@pytest.fixture(scope="module")
def train(ranks_of, config):
    def run(ranks, output, *overrides):
        return ranks_of(ranks, "-m", "mc2_hpc.cli", "train", config, f"output={output}", *overrides).stderr

    return run


def online(teacher):
    return "distill.features=null", f"distill.teacher={teacher}"


def assert_equal_runs(found, expected, steps, *, tolerance=1e-6):
    assert rows(found).keys() == rows(expected).keys() == set(range(1, steps + 1))
    for step, row in rows(expected).items():
        for name in ("loss", "divergence"):
            assert rows(found)[step][name] == pytest.approx(row[name], rel=tolerance), (step, name)
        assert rows(found)[step]["skipped"] == row["skipped"]
    one, other = (TensorFiles(resolve_checkpoint(run), "model") for run in (found, expected))
    assert one.names() == other.names()
    for name in one.names():
        if not name.endswith("qkv.bias"):  # the keys' gradient is rounding noise
            torch.testing.assert_close(one.get(name), other.get(name), rtol=0, atol=tolerance)


def test_training_equals_the_run_with_the_teacher(train, features, teacher, tmp_path):
    """Two epochs, which draw different captions; resumed, with a worker process."""
    stored = tmp_path / "stored"
    train(1, tmp_path / "online", *online(teacher))
    log = train(1, stored, f"distill.features={features}")
    assert "features of the teacher with SHA-256" in log
    assert_equal_runs(stored, tmp_path / "online", STEPS)
    assert sum(rows(stored)[STEPS]["skipped"].values()) >= 1
    before = TensorFiles(resolve_checkpoint(stored), "model")
    before = {name: before.get(name).clone() for name in before.names()}
    trainer = json.loads((resolve_checkpoint(stored) / "trainer.json").read_text())
    assert trainer["teacher"] == open_dual_encoder(teacher, torch.device("cpu")).identity
    shutil.rmtree(stored / f"checkpoints/step-{STEPS:08d}")
    log = train(1, stored, f"distill.features={features}", "data.workers=1")
    assert "step-00000006 after step 6" in log and "not as in" not in log
    again = TensorFiles(resolve_checkpoint(stored), "model")
    assert all(torch.equal(again.get(name), tensor) for name, tensor in before.items())


def test_ranks_and_micro_batches_equal_the_run_with_the_teacher(train, features, teacher, tmp_path):
    settings = "micro_batch=5", "steps=4"
    train(2, tmp_path / "online", *settings, *online(teacher))
    train(2, tmp_path / "stored", *settings, f"distill.features={features}")
    assert_equal_runs(tmp_path / "stored", tmp_path / "online", 4)


def taught(config, tmp_path, *overrides, steps):
    """A teacher's features of the first batches, as they enter the loss."""
    run = load_config(config, [f"output={tmp_path / 'run'}", *overrides])
    with process_group() as ranks:
        arch = resolve(run.model)
        tokens = tokenizer(run, None, arch, ranks)
        stored = run.distill.features is not None
        teacher = StoredTeacher(run, ranks) if stored else DistillationTeacher(run, arch, tokens, ranks)
        sizes = {"global_batch": 32, "image_size": 32, "rank": 0, "world_size": 1}
        loader = TrainLoader(run.data, **sizes, tokenizer=tokens, teacher=teacher.needs)
        return [teacher.features(batch, batch.images) for batch in (next(loader) for _ in range(steps))]


def test_random_crops_equal_the_teachers_in_the_first_epoch(config, teacher, tmp_path):
    """Later the teacher's view stays that of the first. Crops of an image of one colour are all the same."""
    crop = "data.crop_scale=[0.3, 1.0]"
    assert compute(config, teacher, tmp_path / "features", crop) == 0
    found = taught(config, tmp_path, crop, f"distill.features={tmp_path / 'features'}", steps=8)
    expected = taught(config, tmp_path, crop, *online(teacher), steps=8)
    for step, (one, other) in enumerate(zip(found, expected, strict=True)):
        torch.testing.assert_close(one.text_features, other.text_features, rtol=0, atol=1e-6)
        differences = (one.image_features - other.image_features).abs().amax(1)
        assert step == 3 or (differences.max() < 1e-6 if step < 3 else differences.median() > 1e-4), step
        assert (one.scale, one.weight) == (other.scale, other.weight) == (50.0, 0.8)


def test_features_in_bf16_are_those_that_enter_the_loss(config, teacher, tmp_path):
    assert compute(config, teacher, tmp_path / "features", "precision=bf16") == 0
    tensors = load_file(tmp_path / "features/squares/00000.tar.safetensors")
    assert tensors["features"].dtype == tensors["text_features"].dtype == torch.bfloat16
    found = taught(config, tmp_path, "precision=bf16", f"distill.features={tmp_path / 'features'}", steps=2)
    expected = taught(config, tmp_path, "precision=bf16", *online(teacher), steps=2)
    for one, other in zip(found, expected, strict=True):
        for name in ("image_features", "text_features"):
            pair = getattr(one, name), getattr(other, name)
            assert pair[0].dtype == pair[1].dtype == torch.bfloat16
            # Batches of another size may be summed in another order, which moves a sum by a rounding.
            torch.testing.assert_close(*pair, rtol=2**-7, atol=2**-10)


def test_features_are_the_models_of_whole_images_and_of_every_caption(config, teacher, tmp_path):
    """Of squares, resized by Pillow."""
    assert compute(config, teacher, tmp_path / "features", "data.decode=pil") == 0
    tensors = load_file(tmp_path / "features/squares/00001.tar.safetensors")
    model = open_dual_encoder(teacher, torch.device("cpu"))
    for number, pair in enumerate(list(draw_pairs(2 * PER_SHARD))[PER_SHARD:], PER_SHARD):
        images, hashes = tensors["features"], tensors["hashes"]
        found = images[(hashes == torch.tensor(hash_keys([pair.key]).view("int64"))).nonzero().item()]
        pixels = model.transform(decode_pil(pair.image).resize((48, 48), resample=3))
        expected = model.model.encode_image(pixels[None], normalize=True)[0]
        # Products of one image sum in another order than those of a batch; how much that is depends on the CPU.
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        for text in (pair.text, f"more {number}", f"more of {pair.text[-8:]}"):
            place = (tensors["text_hashes"] == torch.tensor(hash_texts([text]).view("int64"))).nonzero().item()
            expected = model.encode_texts([text])[0]
            torch.testing.assert_close(tensors["text_features"][place], expected, rtol=0, atol=1e-6)
    assert len(tensors["hashes"]) == PER_SHARD


def test_a_frozen_image_tower_and_a_teacher_both_stored(train, config, features, tmp_path):
    """Neither is run, and images are not decoded."""
    frozen = "freeze.vision=all", f"data.features={tmp_path / 'tower'}", f"data.train={config.parent / 'shards'}"
    plain = tmp_path / "plain"
    shutil.copytree(features / "squares", plain)
    shutil.copy(features / "features.json", plain)
    assert main(["features", str(config), *frozen]) == 0
    train(1, tmp_path / "stored", *frozen, f"distill.features={plain}", "steps=3")
    train(1, tmp_path / "images", frozen[0], frozen[2], f"distill.features={plain}", "steps=3")
    assert_equal_runs(tmp_path / "stored", tmp_path / "images", 3, tolerance=1e-5)


def rewritten(change):
    """A change of one shard's file that replaces tensors."""

    def rewrite(folder):
        path = folder / "squares/00002.tar.safetensors"
        tensors = load_file(path)
        write_tensors(path, {**tensors, **change(tensors)})

    return rewrite


def cut_off(folder):
    path = folder / "squares/00002.tar.safetensors"
    path.write_bytes(path.read_bytes()[:200])


def of_a_tower(folder):
    facts = json.loads((folder / "features.json").read_text())
    (folder / "features.json").write_text(json.dumps({**facts, "teacher": None, "image_tower": "a" * 64}))


AGAIN = "; run mc2 features again, which computes what is missing or has changed"
DAMAGE = {
    "cut off": cut_off,
    "other type": rewritten(lambda tensors: {"features": tensors["features"].half()}),
    "other width": rewritten(lambda tensors: {"text_features": tensors["text_features"][:, 1:]}),
    "one caption less": rewritten(lambda tensors: {"text_hashes": tensors["text_hashes"][1:]}),
    "no reasons": rewritten(lambda tensors: {"reasons": torch.zeros(3, dtype=torch.uint8)}),
}
REFUSED = {
    **{
        name: (change, [], rf"00002.tar.safetensors: damaged features \(.*\){AGAIN}$")
        for name, change in DAMAGE.items()
    },
    "nothing there": (shutil.rmtree, [], "distill.features=.*: no features of a teacher there; compute them with mc2"),
    "of an image tower": (of_a_tower, [], "distill.features=.*: no features of a teacher there"),
    "a shard without": (
        lambda folder: (folder / "squares/00001.tar.safetensors").unlink(),
        [],
        "of 1 shards, .*" + AGAIN,
    ),
    "other crops": (None, ["data.crop_scale=[0.5, 1.0]"], r"features with crop_scale \(1.0, 1.0\), but this run has"),
    "other draws": (None, ["data.seed=1"], "features with seed 0, but this run has 1"),
    "other precision": (None, ["precision=bf16"], "features with precision fp32, but this run has bf16"),
    "other decoder": (None, ["data.decode=pil"], "features with decode turbo, but this run has pil"),
}


def read_all(config, folder, tmp_path, *overrides):
    """As training does it, for two epochs."""
    taught(config, tmp_path, f"distill.features={folder}", *overrides, steps=8)


@pytest.mark.parametrize("change, overrides, words", REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused(config, features, tmp_path, change, overrides, words):
    check_refused(lambda folder: read_all(config, folder, tmp_path, *overrides), features, tmp_path, change, words)


def test_a_source_that_was_added_has_no_features_yet(config, features, tmp_path):
    mix = json.loads(of_mix(config.parent / "shards"))
    mix.append({**mix[0], "name": "more"})
    with pytest.raises(UserError, match=f"more: no features of 4 shards, such as .*{AGAIN}"):
        read_all(config, features, tmp_path, f"data.train={json.dumps(mix)}")


OTHER_DATA = {
    "captions": ({"word": "less"}, "has a caption without features: it has changed since, or .* other fields" + AGAIN),
    "images": ({"images": bytes(500)}, "its features are those of other images; name a folder of its own"),
}


@pytest.mark.parametrize("changes, words", OTHER_DATA.values(), ids=OTHER_DATA)
def test_changed_shards_are_refused_until_they_are_computed_again(
    changes, words, config, teacher, features, tmp_path, capsys
):
    """Captions of the same lengths leave a tar of the same size."""
    folder = shutil.copytree(features, tmp_path / "features")
    shards = shutil.copytree(config.parent / "shards", tmp_path / "shards")
    train = f"data.train={of_mix(shards)}"
    sizes = [path.stat().st_size for path in sorted(shards.glob("*.tar"))]
    write_shards(tmp_path / "other", **changes)
    shutil.copy(tmp_path / "other/00003.tar", shards)
    assert ([path.stat().st_size for path in sorted(shards.glob("*.tar"))] == sizes) == ("word" in changes)
    with pytest.raises(UserError, match=words) as error:
        read_all(config, folder, tmp_path, train)
    assert "\n" not in str(error.value)
    assert compute(config, teacher, folder, train) == 0
    assert f"{folder}: 1 shards computed" in capsys.readouterr().out


def test_more_caption_fields_are_computed_and_fewer_are_there(config, teacher, tmp_path, capsys):
    folder, shards = tmp_path / "features", config.parent / "shards"
    for captions, computed in (({"txt": 1.0}, 4), ({"txt": 0.9, "json.more": 0.1}, 4), ({"json.more": 1.0}, 0)):
        train = f"data.train={of_mix(shards, captions=captions)}"
        if not computed:
            read_all(config, folder, tmp_path, train)
        assert compute(config, teacher, folder, train) == 0
        assert f"{folder}: {computed} shards computed" in capsys.readouterr().out


def test_a_second_start_computes_what_is_missing_or_damaged(config, teacher, features, tmp_path, capsys):
    folder = shutil.copytree(features, tmp_path / "features")
    shards = shutil.copytree(config.parent / "shards", tmp_path / "shards")
    train = f"data.train={of_mix(shards)}"
    files = sorted(folder.glob("squares/*.safetensors"))
    before = [{name: tensor.clone() for name, tensor in load_file(path).items()} for path in files]
    cut_off(folder)
    files[0].unlink()
    os.utime(shards / "00001.tar")  # the same content
    assert compute(config, teacher, folder, train) == 0
    assert f"{folder}: 2 shards computed" in capsys.readouterr().out
    for path, expected in zip(files, before, strict=True):
        found = load_file(path)
        assert found.keys() == expected.keys()
        for name in found:
            torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-6)
    assert compute(config, teacher, folder, train) == 0
    assert f"{folder}: 0 shards computed" in capsys.readouterr().out


def test_what_cannot_be_computed_is_one_line(config, teacher, features, tmp_path, capsys):
    other = write_teacher(tmp_path / "other", texts=[pair.text for pair in draw_pairs(64)], vocab_size=50)
    cases = [
        (other, features, [], "features with teacher .*, but this run has .*, in another folder"),
        (tmp_path, tmp_path / "new", [], str(tmp_path)),
        (teacher, "", ["distill=null"], "distill.features is not set: name a folder for the teacher's features"),
    ]
    for model, folder, overrides, words in cases:
        assert compute(config, model, folder, *overrides) == 2
        (line,) = capsys.readouterr().err.splitlines()[-1:]
        assert line.startswith("mc2: ") and re.search(words, line)
