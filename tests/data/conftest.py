"""Images, captions and shards shared by the data tests."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mc2_hpc.data.tokenizer import train_tokenizer

CAPTIONS = {
    "en": "a photo of the number {}, written by hand",
    "de": "ein handgeschriebenes Bild der Zahl {}",
    "fr": "une image manuscrite du nombre {}",
    "ru": "написанное от руки число {}",
    "ja": "手書きの数字{}です",
    "th": "ภาพถ่ายของตัวเลข{}",
    "ar": "صورة للرقم {} مكتوب بخط اليد",
    "ko": "손으로 쓴 숫자 {}",
    "bn": "হাতে লেখা সংখ্যা {}",
    "tr": "el yazısıyla yazılmış {} sayısı",
}


@pytest.fixture(scope="session")
def captions() -> list[tuple[str, str]]:
    """600 captions in ten languages over seven scripts: (lang, text)."""
    return [(lang, form.format(number)) for number in range(60) for lang, form in CAPTIONS.items()]


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory, captions: list[tuple[str, str]]) -> Path:
    """A small sentencepiece model in XLM-V's layout."""
    path = tmp_path_factory.mktemp("tokenizer") / "xlmv.model"
    train_tokenizer([text for _, text in captions], path, vocab_size=600, style="xlmv")
    return path


@pytest.fixture(scope="session")
def make_jpeg() -> Callable[..., bytes]:
    """Maps (height, width, seed) to a JPEG with a spectrum like a photograph's."""

    def make(height: int = 48, width: int = 64, seed: int = 0, mode: str = "RGB", **save: object) -> bytes:
        return encode(photo(height, width, seed).convert(mode), "JPEG", **{"quality": 92, **save})

    return make


def photo(height: int, width: int, seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    total = np.zeros((height, width, 3))
    for octave in range(1, 8):
        coarse = rng.normal(size=(2**octave + 1, 2**octave + 1, 3)) * 64 / octave**1.5
        channels = [
            np.asarray(Image.fromarray(coarse[..., c].astype(np.float32)).resize((width, height), Image.BICUBIC))
            for c in range(3)
        ]
        total += np.stack(channels, -1)
    return Image.fromarray(np.clip(total + 128, 0, 255).astype(np.uint8))


def encode(image: Image.Image, kind: str, **save: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **save)
    return out.getvalue()
