"""What the loader makes for a teacher: the same crops in its size, and the same captions in its token ids."""

import io
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from PIL import Image

from mc2_hpc.config import DataConfig
from mc2_hpc.data.decode import CPU_BACKENDS, TrainTransform
from mc2_hpc.data.loader import TrainLoader
from mc2_hpc.data.packing import pack_pairs
from mc2_hpc.data.shards import Pair
from mc2_hpc.data.teacher import TeacherInputs, TeacherNeeds, TwoSizes, joined_inputs
from mc2_hpc.data.tokenizer import Tokenizer, train_tokenizer
from mc2_hpc.errors import UserError

KEY = np.uint64(12345)


@dataclass(frozen=True)
class Letters:
    """Code points, and a mask of them."""

    pads: tuple[int, ...] = (7, 0)

    def __call__(self, texts):
        width = max(map(len, texts))
        ids = torch.full((len(texts), 2, width), 7)
        ids[:, 1] = 0
        for row, text in zip(ids, texts, strict=True):
            row[0, : len(text)] = torch.tensor([ord(letter) for letter in text])
            row[1, : len(text)] = 1
        return ids


def photo(number: int = 0, size: tuple[int, int] = (300, 240)) -> bytes:
    rng = np.random.default_rng(number)
    small = rng.integers(0, 256, (size[1] // 20, size[0] // 20, 3), dtype=np.uint8)
    data = io.BytesIO()
    Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).save(data, "JPEG", quality=90)
    return data.getvalue()


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("student, teacher", [(64, 32), (32, 64), (64, 96)])
def test_both_sizes_show_the_same_crop(backend, student, teacher):
    both = TrainTransform(student, (0.3, 0.9), 5, backend, teacher_size=teacher)(photo(), KEY, 1)
    assert isinstance(both, TwoSizes)
    alone = {size: TrainTransform(size, (0.3, 0.9), 5, backend)(photo(), KEY, 1) for size in (student, teacher)}
    for found, size in zip(both, (student, teacher), strict=True):
        assert found.shape == (3, size, size) and found.dtype == torch.uint8
        if size == max(student, teacher) or backend != "turbo":
            assert torch.equal(found, alone[size])
        else:  # decoded at the scale that the larger size needs
            other = TrainTransform(size, (0.3, 0.9), 5, backend)(photo(), KEY, 2)
            near, far = ((found.float() - image.float()).abs().mean() for image in (alone[size], other))
            assert near < far / 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    words = ["one", "two", "three", "four", "five"]
    pairs = [Pair(key=f"{n:03d}", image=photo(n), text=f"{words[n % 5]} {n}", lang="en") for n in range(48)]
    pack_pairs(pairs, folder, pairs_per_shard=12)
    train_tokenizer([pair.text for pair in pairs], folder / "sp.model", vocab_size=60, style="xlmv")
    return folder


def batches(folder, teacher, **changes):
    config = DataConfig(train=str(folder / "*.tar"), lanes=4, **{"workers": 0, **changes})
    tokenizer = Tokenizer(folder / "sp.model", "xlmv")
    loader = TrainLoader(
        config, global_batch=8, image_size=32, tokenizer=tokenizer, rank=0, world_size=1, teacher=teacher
    )
    try:
        return [next(loader) for _ in range(3)]
    finally:
        loader.close()


def test_batches_have_what_the_teacher_needs_whatever_the_workers(folder):
    """And what the student sees does not change."""
    alone = batches(folder, None, decode="turbo_exact")
    teacher = TeacherNeeds(image_size=48, captions=Letters())
    for workers in (0, 3):
        found = batches(folder, teacher, workers=workers, decode="turbo_exact")
        for batch, plain in zip(found, alone, strict=True):
            assert plain.teacher is None and batch.keys == plain.keys
            assert torch.equal(batch.images, plain.images) and torch.equal(batch.tokens, plain.tokens)
            assert batch.teacher.pixels.shape == (8, 3, 48, 48)
            for image, key in zip(batch.teacher.pixels, batch.keys, strict=True):
                small = torch.nn.functional.interpolate(image[None].float(), size=32, mode="bicubic", antialias=True)
                assert (small[0] - batch.images[batch.keys.index(key)].float()).abs().mean() < 8
            ids, mask = batch.teacher.tokens.unbind(1)
            texts = ["".join(map(chr, row[kept.bool()])) for row, kept in zip(ids, mask, strict=True)]
            assert [int(text.split()[1]) for text in texts] == [int(key) for key in batch.keys]
            assert (ids[mask == 0] == 7).all()


def test_what_student_and_teacher_share_is_not_sent_twice(folder):
    for batch in batches(folder, TeacherNeeds()):
        assert batch.teacher.pixels is None and batch.teacher.tokens is None


def test_rows_of_other_widths_are_filled_with_each_inputs_own_value():
    parts = [TeacherInputs(pixels=None, tokens=Letters()([text]), pads=(7, 0)) for text in ("a", "abc")]
    tokens = joined_inputs(parts, pin=False).tokens
    assert tokens.tolist() == [[[97, 7, 7], [1, 0, 0]], [[97, 98, 99], [1, 1, 1]]]


def test_dali_resizes_to_one_size():
    TeacherNeeds(captions=Letters()).check("dali")
    with pytest.raises(UserError, match="distill.teacher takes images of 48 pixels: choose turbo"):
        TeacherNeeds(image_size=48).check("dali")
