"""Programs that load exported folders through transformers: its pipeline, and sentence-transformers."""

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

import mc2_hpc
from mc2_hpc.conversion.convert import convert
from tests.conversion import colours

LONG = " ".join(colours.NAMES * 5)


@pytest.fixture(scope="module")
def folder(trained_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(trained_checkpoint, "hf", tmp_path_factory.mktemp("exported") / "hf")


def test_the_pipeline(folder: Path, trained_checkpoint: Path, transformers: ModuleType) -> None:
    """``pipeline("zero-shot-image-classification")`` finds model, tokenizer and image processor by itself."""
    classify = transformers.pipeline("zero-shot-image-classification", model=str(folder))
    clip = mc2_hpc.load(trained_checkpoint, device="cpu")
    scale, _ = clip.dual.logits()
    pixels, labels = colours.draw(40, 5)
    num_right = 0
    for image, label in zip(map(colours.picture, pixels), labels.tolist(), strict=True):
        found = classify(image, candidate_labels=colours.NAMES, hypothesis_template="{}")
        shares = (scale * clip.encode_text(colours.NAMES) @ clip.encode_image(image)).softmax(0)
        expected = dict(zip(colours.NAMES, shares.tolist(), strict=True))
        assert {entry["label"]: entry["score"] for entry in found} == pytest.approx(expected, abs=1e-4)
        num_right += found[0]["label"] == colours.NAMES[label]
    assert num_right > 0.8 * len(labels)


def test_sentence_transformers(folder: Path, trained_checkpoint: Path, transformers: ModuleType) -> None:
    """It finds out by itself that this is a model of images and texts; long texts are cut."""
    library = pytest.importorskip("sentence_transformers", reason="sentence-transformers is in the extra dev")
    model = library.SentenceTransformer(str(folder), device="cpu")
    clip = mc2_hpc.load(trained_checkpoint, device="cpu")
    images = [colours.picture(pixels) for pixels in colours.draw(5, 6)[0]]
    texts = [*colours.NAMES, LONG]
    found = [torch.from_numpy(np.asarray(model.encode(items, normalize_embeddings=True))) for items in (images, texts)]
    for features, expected in zip(found, (clip.encode_image(images), clip.encode_text(texts)), strict=True):
        torch.testing.assert_close(features, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(model.similarity(*found), found[0] @ found[1].T)
