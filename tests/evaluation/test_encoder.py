"""Features: the same on any number of ranks, computed once, with images that cannot be decoded reported."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mc2_hpc.errors import UserError
from mc2_hpc.evaluation.encoder import Encoder
from mc2_hpc.evaluation.images import ImageFiles
from mc2_hpc.images import MAX_FILE_BYTES

_WORKER = """
import sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from mc2_hpc.distributed import process_group
from mc2_hpc.evaluation.encoder import Encoder
from mc2_hpc.evaluation.images import ImageFiles

checkpoint, folder, out = map(Path, sys.argv[1:])
with process_group(300) as ranks:
    encoder = Encoder.load(checkpoint, ranks, batch=2)
    found = encoder.images(ImageFiles(folder, sorted(p.name for p in folder.iterdir())))
    texts = encoder.texts(["a photo of a cat", "ein Foto", "a photo of a cat", "猫"])
    save_file({"features": found.features, "usable": found.usable, "texts": texts}, out / f"{ranks.rank}.safetensors")
"""


class CountingImages(ImageFiles):
    """Files that count how often they are read."""

    reads = 0

    def read(self, index: int) -> bytes:
        self.reads += 1
        return super().read(index)


def all_of(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("processes", [2, 3])
def test_any_number_of_ranks_finds_the_same_features(
    processes, tiny_checkpoint, encoder, image_folder, ranks_of, tmp_path
):
    (image_folder / "04.jpg").write_bytes(b"not an image")
    script = tmp_path / "worker.py"
    script.write_text(_WORKER)
    (tmp_path / "out").mkdir()
    ranks_of(processes, script, tiny_checkpoint, image_folder, tmp_path / "out")
    alone = encoder.images(ImageFiles(image_folder, all_of(image_folder)))
    texts = encoder.texts(["a photo of a cat", "ein Foto", "a photo of a cat", "猫"])
    for rank in range(processes):
        found = load_file(tmp_path / "out" / f"{rank}.safetensors")
        assert torch.equal(found["usable"], alone.usable)
        torch.testing.assert_close(found["features"], alone.features, atol=1e-6, rtol=0)
        torch.testing.assert_close(found["texts"], texts, atol=1e-6, rtol=0)


def test_a_broken_image_has_no_feature_and_is_counted(encoder, image_folder):
    (image_folder / "03.jpg").write_bytes((image_folder / "03.jpg").read_bytes()[:50])
    found = encoder.images(ImageFiles(image_folder, all_of(image_folder)))
    assert found.usable.tolist() == [number != 3 for number in range(10)]
    assert found.skipped() == {"image_truncated": 1}
    lengths = found.features.norm(dim=1)
    assert float(lengths[3]) == 0 and torch.allclose(lengths[found.usable], torch.ones(9))


def test_a_file_that_is_too_large_or_went_away_is_counted(encoder, image_folder):
    images = ImageFiles(image_folder, all_of(image_folder))
    os.truncate(image_folder / "03.jpg", MAX_FILE_BYTES + 1)  # a hole, which takes no space
    (image_folder / "05.jpg").unlink()
    os.mkfifo(image_folder / "05.jpg")
    found = encoder.images(images)
    assert found.usable.tolist() == [number not in (3, 5) for number in range(10)]
    assert found.skipped() == {"too_large": 1, "read_error": 1}


def test_no_image_at_all_is_an_error(encoder, tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"x")
    with pytest.raises(UserError, match=r"none of 1 images can be decoded, such as a\.jpg"):
        encoder.images(ImageFiles(tmp_path, ["a.jpg"]))


def test_features_are_computed_once(tiny_checkpoint, ranks, image_folder, tmp_path, noise):
    encoder = Encoder.load(tiny_checkpoint, ranks, cache=tmp_path / "cache")
    images = CountingImages(image_folder, all_of(image_folder))
    first = encoder.images(images)
    again = encoder.images(images)
    assert images.reads == 10 and torch.equal(first.features, again.features)

    (image_folder / "00.jpg").write_bytes(noise(99))  # a replaced image makes another set
    assert not torch.equal(encoder.images(images).features, first.features)
    assert images.reads == 20


@pytest.mark.parametrize("damage", ["truncated", "of another set", "one bit"])
def test_damaged_features_are_computed_again(damage, tiny_checkpoint, ranks, image_folder, tmp_path):
    encoder = Encoder.load(tiny_checkpoint, ranks, cache=tmp_path / "cache")
    images = CountingImages(image_folder, all_of(image_folder))
    first = encoder.images(images)
    (file,) = (tmp_path / "cache").glob("*.safetensors")
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-9])
    elif damage == "one bit":
        data = bytearray(file.read_bytes())
        data[-40] ^= 1  # in the data after the header
        file.write_bytes(data)
    else:
        save_file({"features": first.features[:3], "usable": first.usable[:3]}, file)
    assert torch.equal(encoder.images(images).features, first.features) and images.reads == 20


def test_another_checkpoint_has_another_identity(tiny_checkpoint, ranks, tmp_path):
    import shutil

    shutil.copytree(tiny_checkpoint, tmp_path / "other")
    weights = load_file(tmp_path / "other" / "model.00000-of-00001.safetensors")
    weights["logit_scale"] = weights["logit_scale"] + 1
    save_file(weights, tmp_path / "other" / "model.00000-of-00001.safetensors", metadata={"format": "pt"})
    same = [Encoder.load(tiny_checkpoint, ranks).identity for _ in range(2)]
    half = Encoder.load(tiny_checkpoint, ranks, precision="bf16").identity
    assert same[0] == same[1] and len({same[0], half, Encoder.load(tmp_path / "other", ranks).identity}) == 3


def test_a_checkpoint_without_its_tokenizer_is_named(tiny_checkpoint, ranks, tmp_path):
    import shutil

    shutil.copytree(tiny_checkpoint, tmp_path / "bare")
    (tmp_path / "bare" / "tokenizer.model").unlink()
    with pytest.raises(UserError, match=r"no tokenizer\.model beside the weights"):
        Encoder.load(tmp_path / "bare", ranks)
