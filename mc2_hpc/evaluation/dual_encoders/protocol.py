"""What evaluation, search and ``mc2_hpc.load`` ask of a CLIP, whatever library runs it.

B images or texts, D embedding width.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor, nn

from mc2_hpc.data.crop import Encoded
from mc2_hpc.errors import UserError
from mc2_hpc.storage import file_sha256

RESIZES = ("shortest", "squash", "longest")
"""How an image reaches the model's square input: its shortest side resized and the centre cropped, all of it squashed,
or its longest side resized and the rest padded (open_clip alone)."""


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """What a report says of a model."""

    format: str
    """A word of ``mc2_hpc.models.formats.Format``."""
    image_size: int
    """Side of the square input in pixels."""
    resize: str
    """One of :data:`RESIZES`, or ``patches`` where the model takes images in their own shape."""
    context_length: int
    """Most tokens of a text."""
    parameters: int
    vision_width: int | None = None
    """None where the library does not say, as for towers that are no vision transformers."""
    patch_size: int | None = None
    step: int | None = None
    """Training steps that the weights have seen, for a checkpoint of ours."""


class DualEncoder(Protocol):
    """A CLIP with its tokenizer and its image transform."""

    facts: ModelFacts
    identity: str
    """Hex digest of the weights, of the tokenizer and of how images are prepared."""

    @property
    def model(self) -> nn.Module:
        """The library's own, in eval mode."""
        ...

    @property
    def tokenizer(self) -> Any:
        """The library's own."""
        ...

    def preprocess(self, image: Encoded | Image.Image) -> Any:
        """One image as :meth:`encode_images` takes it. Threads may call it side by side. Raises Dropped."""
        ...

    def transform(self, image: Image.Image) -> Any:
        """One image as ``model`` takes it, without the batch dimension."""
        ...

    def tokenize(self, texts: Sequence[str]) -> Any:
        """A batch of texts as ``model`` takes it, on the CPU."""
        ...

    def encode_images(self, images: Sequence[Any]) -> Tensor:
        """Unit-length float32 (B, D) of preprocessed images, on the model's device."""
        ...

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Unit-length float32 (B, D), on the model's device."""
        ...

    def logits(self) -> tuple[float, float]:
        """Scale and bias that turn a cosine into the model's logit; the bias is 0 where the model has none."""
        ...


@torch.inference_mode()
def encode_texts(encoder: DualEncoder, texts: Sequence[str], *, batch: int = 256) -> Tensor:
    """Unit-length float32 (n, D) on the CPU of ``texts``, in their order; equal texts are encoded once.

    Raises:
        UserError: there are no texts, or a feature is not finite.
    """
    if not texts:
        raise UserError("no texts to encode")
    # Texts of like length share a batch, since a batch is padded to its longest.
    ordered = sorted(dict.fromkeys(texts), key=len)
    parts = [encoder.encode_texts(ordered[start : start + batch]).cpu() for start in range(0, len(ordered), batch)]
    features = finite(torch.cat(parts), "texts")
    row = {text: index for index, text in enumerate(ordered)}
    return features[torch.tensor([row[text] for text in texts])]


def finite(features: Tensor, what: str) -> Tensor:
    """The features themselves.

    Raises:
        UserError: one is not finite.
    """
    if not bool(torch.isfinite(features).all()):
        raise UserError(f"the model gives non-finite features for some {what}: no number computed from them would hold")
    return features


def hash_files(files: Iterable[Path], *facts: object) -> str:
    """Hex digest of files' names and contents, and of what else decides a model's features."""
    parts = [*(repr(fact) for fact in facts), *(f"{file.name} {file_sha256(file)}" for file in sorted(files))]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def folder_files(source: Path) -> list[Path]:
    """What decides the features of a model in a folder: its files, and the configs of towers in folders below it."""
    found = [*source.iterdir(), *source.glob("*/config.json")]
    return [path for path in found if path.is_file() and not path.name.startswith(".")]


def count_parameters(model: nn.Module) -> int:
    """Numbers in all parameters of a model."""
    return sum(parameter.numel() for parameter in model.parameters())
