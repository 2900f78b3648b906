"""``mc2_hpc.load``: a CLIP model in any format for Python programs.

clip = mc2_hpc.load("runs/my-run")
clip.encode_image([Image.open("a.jpg"), "b.png"]) @ clip.encode_text(["a cat", "кошка"]).T
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from mc2_hpc.drops import Dropped
from mc2_hpc.errors import UserError, first_line
from mc2_hpc.evaluation.dual_encoders import DualEncoder, open_dual_encoder
from mc2_hpc.evaluation.dual_encoders.protocol import ModelFacts, encode_texts, finite
from mc2_hpc.images import read_image_file

AnyImage = Image.Image | str | Path | bytes
"""An open image, the path of an image, or an encoded image."""


class Clip:
    """A model with its tokenizer and image transform; created by :func:`load`."""

    def __init__(self, dual: DualEncoder) -> None:
        self.dual = dual
        """The encoder that evaluation and search also use."""

    @property
    def model(self) -> nn.Module:
        """The library's own model, in eval mode."""
        return self.dual.model

    @property
    def device(self) -> torch.device:
        """Where it computes: ONNX exports run on the CPU wherever other models would."""
        return self.dual.device

    @property
    def tokenizer(self) -> Any:
        """The library's own tokenizer; :meth:`tokenize` calls it with the model's options."""
        return self.dual.tokenizer

    @property
    def facts(self) -> ModelFacts:
        """Sizes of the model, and its training steps if known."""
        return self.dual.facts

    def transform(self, image: Image.Image) -> Any:
        """One image as ``model`` takes it, without the batch dimension."""
        return self.dual.transform(image)

    def tokenize(self, texts: Sequence[str]) -> Any:
        """Texts as ``model`` takes them, on the CPU."""
        return self.dual.tokenize(texts)

    @torch.inference_mode()
    def encode_image(self, images: AnyImage | Sequence[AnyImage], *, batch: int = 64) -> Tensor:
        """Unit-length float32 features on the CPU: (n, D) for n images, (D,) for a single image.

        Args:
            images: open images, paths, or encoded images. Paths and encoded images are decoded as in evaluation.
            batch: images encoded at a time.

        Raises:
            UserError: an image cannot be read or decoded, there are no images, or a feature is not finite.
        """
        if isinstance(images, Image.Image | str | Path | bytes):
            return self.encode_image([images], batch=batch)[0]
        _at_least_one(batch, len(images), "images")
        parts = [
            self.dual.encode_images([self._preprocessed(image) for image in images[start : start + batch]]).cpu()
            for start in range(0, len(images), batch)
        ]
        return finite(torch.cat(parts), "images")

    def encode_text(self, texts: str | Sequence[str], *, batch: int = 256) -> Tensor:
        """Unit-length float32 features on the CPU: (n, D) for n texts, (D,) for a single text.

        Raises:
            UserError: there are no texts, or a feature is not finite.
        """
        if isinstance(texts, str):
            return self.encode_text([texts], batch=batch)[0]
        _at_least_one(batch, len(texts), "texts")
        return encode_texts(self.dual, texts, batch=batch)

    def _preprocessed(self, image: AnyImage) -> Any:
        path = None
        try:
            if isinstance(image, str | Path):
                path = image
                image = read_image_file(path)
            return self.dual.preprocess(image)
        except Dropped as skip:
            raise UserError(f"{path or 'an image'}: cannot be decoded ({skip})") from None
        except OSError as error:
            raise UserError(f"{path or 'an image'}: cannot be read ({error.strerror or error})") from None


def load(
    source: str | Path,
    device: str | torch.device | None = None,
    *,
    eval_resize: str | None = None,
    ema: bool = False,
) -> Clip:
    """Load a model: a checkpoint or run folder of ours, a folder of open_clip or transformers, or an ONNX export.

    Args:
        device: to run on; by default a GPU if there is one. ONNX exports run on the CPU.
        eval_resize: ``shortest``, ``squash`` or ``longest``, instead of the model's own way to its square input.
        ema: take the moving average of a checkpoint's weights.

    Raises:
        UserError: no model can be loaded, or there is no such device.
    """
    try:
        place = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    except RuntimeError as error:
        raise UserError(f"device={device!r}: {first_line(error)}") from None
    return Clip(open_dual_encoder(source, place, eval_resize=eval_resize, ema=ema))


def _at_least_one(batch: int, count: int, what: str) -> None:
    if batch < 1:
        raise UserError(f"batch={batch}: must be at least 1")
    if not count:
        raise UserError(f"no {what} to encode")
