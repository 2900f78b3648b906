"""Gradient cosines: the training loss's gradient for a language's own pairs, without side effects of measuring."""

import dataclasses

import pytest
import torch

from mc2_hpc.data.normalise import normalise
from mc2_hpc.errors import UserError
from mc2_hpc.evaluation.gradients import cosines, first_pairs, gradient_cosines, loss_gradient
from mc2_hpc.evaluation.images import ImageFiles
from mc2_hpc.evaluation.tasks import Captions, Retrieval
from mc2_hpc.kernels.contrastive import contrastive_loss


@pytest.fixture
def task(image_folder):
    """Ten images; German repeats the English captions, Russian has different ones, Japanese too few."""
    images = ImageFiles(image_folder, sorted(path.name for path in image_folder.iterdir()))
    english = [f"a photo of a cat {number}" for number in range(len(images))]
    return Retrieval(
        images=images,
        languages={
            "en": Captions(texts=english, images=range(10)),
            "de": Captions(texts=english, images=range(10)),
            "ru": Captions(texts=[f"фотография {9 - number}" for number in range(10)], images=range(10)),
            "ja": Captions(texts=["猫の写真"], images=[0]),
        },
    )


def test_a_language_pulls_its_own_way(task, encoder):
    found = gradient_cosines(task, encoder.images(task.images), encoder, pairs=6)
    assert set(found) == {"de", "ru"}  # the reference is not compared with itself, Japanese has fewer than six pairs
    assert found["de"]["gradient_cosine_both"] == pytest.approx(1, abs=1e-9)
    for part in ("vision", "text", "both"):
        assert -1 <= found["ru"][f"gradient_cosine_{part}"] < 0.99


def test_the_gradient_is_the_training_loss_s(task, encoder):
    images = torch.stack(encoder.preprocess(task.images, range(6)))
    tokens = encoder.dual.tokenize(task.languages["ru"].texts[:6])
    found = loss_gradient(encoder, images, tokens)
    model = encoder.dual.model
    assert len(images) == 6 and all(parameter.grad is None for parameter in model.parameters())
    image, text = model.encode_image(normalise(images), normalize=True), model.encode_text(tokens, normalize=True)
    contrastive_loss(image, text, model.logit_scale, backend="reference").backward()
    for name, parameter in model.named_parameters():
        if name != "logit_scale":
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-6)
    model.zero_grad()


def test_cosines_of_known_vectors():
    one = {"vision.a": torch.tensor([1.0, 0.0]), "text.b": torch.tensor([[3.0]])}
    other = {"vision.a": torch.tensor([1.0, 1.0]), "text.b": torch.tensor([[-1.0]])}
    assert cosines(one, other) == pytest.approx(
        {
            "gradient_cosine_vision": 2**-0.5,
            "gradient_cosine_text": -1.0,
            "gradient_cosine_both": (1 - 3) / (10 * 3) ** 0.5,
        }
    )


def test_pairs_are_the_first_captions_of_usable_images():
    captions = Captions(texts=list("abcdef"), images=[2, 0, 2, 1, 3, 0])
    usable = torch.tensor([True, False, True, True])
    assert first_pairs(captions, usable, 3) == [1, 0, 4]
    assert first_pairs(captions, usable, 4) is None


def test_no_reference_is_said_in_one_line(task, encoder):
    images = encoder.images(task.images)
    with pytest.raises(UserError, match="no language 'en'"):
        lacking = dataclasses.replace(task, languages={"ru": task.languages["ru"]})
        gradient_cosines(lacking, images, encoder, pairs=4)
    with pytest.raises(UserError, match="fewer than 11 pairs in 'en'"):
        gradient_cosines(task, images, encoder, pairs=11)
