"""``mc2_hpc.load``: one entry point for every format, and the same features as in evaluation."""

import io
import os

import pytest
import torch
from PIL import Image

import mc2_hpc
from mc2_hpc.conversion.convert import convert
from mc2_hpc.errors import UserError
from mc2_hpc.evaluation.encoder import Encoder
from mc2_hpc.evaluation.images import ImageFiles
from mc2_hpc.evaluation.loading import Clip


@pytest.fixture(scope="module", params=["mc2", "open_clip", "hf"])
def model(request, tiny_checkpoint, tmp_path_factory):
    """The same weights in each format."""
    if request.param == "mc2":
        return tiny_checkpoint
    return convert(tiny_checkpoint, request.param, tmp_path_factory.mktemp("converted") / request.param)


def test_features_are_evaluations(model, ranks, image_folder):
    clip = mc2_hpc.load(model, device="cpu")
    assert isinstance(clip, Clip) and not clip.model.training
    encoder = Encoder.load(model, ranks)
    paths = sorted(image_folder.iterdir())
    expected = encoder.images(ImageFiles(image_folder, [path.name for path in paths])).features
    torch.testing.assert_close(clip.encode_image(paths, batch=3), expected, atol=1e-6, rtol=0)
    mixed = [str(paths[0]), paths[1].read_bytes(), Image.open(paths[2])]
    torch.testing.assert_close(clip.encode_image(mixed), expected[:3], atol=1e-6, rtol=0)
    torch.testing.assert_close(clip.encode_image(paths[4]), expected[4], atol=1e-6, rtol=0)
    texts = ["a photo of a cat", "猫", "a photo of a cat"]
    words = clip.encode_text(texts, batch=2)
    torch.testing.assert_close(words, encoder.texts(texts), atol=1e-6, rtol=0)
    torch.testing.assert_close(clip.encode_text("猫"), words[1], atol=1e-6, rtol=0)
    assert words.shape == (3, 16) and words.device.type == "cpu" and not words.requires_grad
    torch.testing.assert_close(words.norm(dim=1), torch.ones(3))


def test_model_tokenizer_and_transform_fit_each_other(model, image_folder):
    clip = mc2_hpc.load(model, device="cpu")
    image, text = clip.transform(Image.open(image_folder / "00.jpg")), clip.tokenize(["a cat"])
    with torch.no_grad():
        if clip.facts.format == "hf":
            image = {name: tensor[None] for name, tensor in image.items()}
            features = clip.model.get_image_features(**image).pooler_output, clip.model.get_text_features(**text)
            features = features[0], features[1].pooler_output
        else:
            assert image.shape == (3, 32, 32) and image.dtype == torch.float32
            features = clip.model.encode_image(image[None]), clip.model.encode_text(text)
    expected = clip.encode_image(image_folder / "00.jpg"), clip.encode_text("a cat")
    for found, unit in zip(features, expected, strict=True):
        torch.testing.assert_close(torch.nn.functional.normalize(found[0], dim=0), unit, atol=1e-5, rtol=0)
    assert clip.tokenizer is not None


def test_a_run_folder_will_do(tiny_checkpoint, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step-3").symlink_to(tiny_checkpoint)
    (tmp_path / "checkpoints" / "latest").write_text("step-3\n")
    assert mc2_hpc.load(tmp_path).encode_text("a cat").shape == (16,)


def test_a_16_bit_and_a_palette_image(tiny_checkpoint):
    """An image opened by Pillow is treated like one from a file."""
    clip = mc2_hpc.load(tiny_checkpoint)
    for mode in ("L", "P", "RGBA", "CMYK"):
        image = Image.effect_noise((50, 40), 90).convert(mode)
        data = io.BytesIO()
        image.save(data, "TIFF" if mode == "CMYK" else "PNG")
        if mode != "CMYK":
            torch.testing.assert_close(clip.encode_image(image), clip.encode_image(data.getvalue()), atol=1e-6, rtol=0)
        assert clip.encode_image(image).shape == (16,)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda clip, folder: clip.encode_image(folder / "nowhere.jpg"), r"nowhere\.jpg: no such file"),
        (lambda clip, folder: clip.encode_image(folder / "pipe.jpg"), r"pipe\.jpg: is a named pipe"),
        (lambda clip, folder: clip.encode_image([folder / "bad.jpg"]), r"bad\.jpg: cannot be decoded"),
        (lambda clip, folder: clip.encode_image([]), "no images to encode"),
        (lambda clip, folder: clip.encode_text([]), "no texts to encode"),
        (lambda clip, folder: clip.encode_text(["a"], batch=0), "batch=0: must be at least 1"),
        (lambda clip, folder: mc2_hpc.load(folder), "no model there"),
        (lambda clip, folder: mc2_hpc.load(folder, device="abacus"), "device='abacus'"),
    ],
)
def test_bad_input_is_one_line(call, message, tiny_checkpoint, image_folder):
    (image_folder / "bad.jpg").write_bytes(b"not an image")
    os.mkfifo(image_folder / "pipe.jpg")
    with pytest.raises(UserError, match=message) as error:
        call(mc2_hpc.load(tiny_checkpoint), image_folder)
    assert "\n" not in str(error.value)


def test_an_unknown_name_is_an_ordinary_error():
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        _ = mc2_hpc.lode
