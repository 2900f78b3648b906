"""What evaluation, search and ``mc2_hpc.load`` need from a CLIP model, whichever library runs it.

B images or texts, D embedding width.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from PIL import Image
from torch import Tensor, nn

from mc2_hpc.conversion.model_card import CARD_NAME
from mc2_hpc.conversion.provenance import PROVENANCE_FILE
from mc2_hpc.data.crop import Encoded
from mc2_hpc.data.teacher import CaptionEncoder
from mc2_hpc.errors import UserError
from mc2_hpc.reading.files import check_regular
from mc2_hpc.reading.tensors import read_header
from mc2_hpc.storage import file_sha256

RESIZES = ("shortest", "squash", "longest")
"""How an image is fitted to the model's square input: shortest side resized and centre cropped, whole image squashed,
or longest side resized and the rest padded (open_clip only)."""


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """What a report says about a model."""

    format: str
    """A value of ``mc2_hpc.models.formats.Format``."""
    image_size: int
    """Side of the square input in pixels."""
    resize: str
    """One of :data:`RESIZES`, or ``patches`` if the model takes images in their own shape."""
    context_length: int
    """Most tokens in a text."""
    parameters: int
    vision_width: int | None = None
    """None if the library does not say, as for towers that are not vision transformers."""
    patch_size: int | None = None
    step: int | None = None
    """Training steps of the weights, for our checkpoints."""


class DualEncoder(Protocol):
    """A CLIP model with its tokenizer and image transform."""

    facts: ModelFacts
    identity: str
    """Hex digest of the weights, the tokenizer and the image preprocessing."""

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        ...

    @property
    def model(self) -> nn.Module:
        """The library's own model, in eval mode."""
        ...

    @property
    def tokenizer(self) -> Any:
        """The library's own tokenizer."""
        ...

    def preprocess(self, image: Encoded | Image.Image) -> Any:
        """One image as :meth:`encode_images` takes it. Thread-safe. Raises Dropped."""
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
        """Scale and bias that turn a cosine into the model's logit; the bias is 0 if the model has none."""
        ...


@runtime_checkable
class TeachingEncoder(DualEncoder, Protocol):
    """One that also encodes what another model's data loader makes for it, on the device of that model."""

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """Unit-length float32 (B, D) of uint8 (B, 3, S, S) RGB images of the model's size, both on its device. Not for
        models that take images in their own shape."""
        ...

    @property
    def captions(self) -> CaptionEncoder:
        """Encodes texts for :meth:`encode_tokens`, in any process."""
        ...

    def encode_tokens(self, tokens: Tensor) -> Tensor:
        """Unit-length float32 (B, D) of int64 (B, K, L) from :attr:`captions`, both on the model's device."""
        ...


@torch.inference_mode()
def encode_texts(encoder: DualEncoder, texts: Sequence[str], *, batch: int = 256) -> Tensor:
    """Unit-length float32 (n, D) on the CPU for ``texts``, in their order; equal texts are encoded once.

    Raises:
        UserError: there are no texts, or a feature is not finite.
    """
    if not texts:
        raise UserError("no texts to encode")
    # Texts of similar length share a batch, because a batch is padded to its longest text.
    ordered = sorted(dict.fromkeys(texts), key=len)
    parts = [encoder.encode_texts(ordered[start : start + batch]).cpu() for start in range(0, len(ordered), batch)]
    features = finite(torch.cat(parts), "texts")
    row = {text: index for index, text in enumerate(ordered)}
    return features[torch.tensor([row[text] for text in texts])]


def finite(features: Tensor, what: str, *, num_missing: int = 0) -> Tensor:
    """Return the features (n, D).

    Args:
        num_missing: rows that have no feature, and are zero.

    Raises:
        UserError: a feature is not finite, or has length zero.
    """
    if not bool(torch.isfinite(features).all()):
        raise UserError(f"the model gives non-finite features for some {what}, so results would be meaningless")
    if int((features == 0).all(1).sum()) > num_missing:
        raise UserError(f"the model gives features of length zero for some {what}, so results would be meaningless")
    return features


def hash_files(files: Iterable[Path], *facts: object) -> str:
    """Hex digest of files' names and contents, and of other facts that determine a model's features."""
    parts = [*(repr(fact) for fact in facts), *(f"{file.name} {file_sha256(file)}" for file in sorted(files))]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def folder_files(source: Path) -> list[Path]:
    """What determines the features of a model in a folder: its files, and tower configs in folders below it."""
    found = [*source.iterdir(), *source.glob("*/config.json")]
    described = {CARD_NAME, PROVENANCE_FILE}
    return [path for path in found if path.is_file() and not path.name.startswith(".") and path.name not in described]


_LONGEST_REASON = 200


def check_weight_files(source: Path) -> None:
    """Check what the libraries that load ``source`` do not: they wait for the writer of a named pipe, and round
    floating-point weights to the integers that they find.

    Raises:
        UserError: a pipe, socket or device is in the folder, or a safetensors file that cannot be read or that holds
            integers alone.
    """
    for entry in sorted(source.iterdir()):
        if entry.suffix == ".safetensors":
            types = {tensor.dtype for tensor in read_header(entry).values()}
            if types and not any("F" in kind for kind in types):
                raise UserError(
                    f"{entry}: holds {', '.join(sorted(types))}, no floating-point weights; convert fp32, fp16 or bf16"
                )
        elif entry.exists() and not entry.is_dir():
            check_regular(entry)


def cannot_load(source: Path, library: str, error: Exception) -> UserError:
    """The error for a folder that ``library`` cannot load, in one line."""
    words = " ".join((str(error).strip() or type(error).__name__).split())
    reason = words if len(words) <= _LONGEST_REASON else f"{words[:_LONGEST_REASON]}..."
    return UserError(
        f"{source}: {library} cannot load it: {reason} (`mc2 convert {source} --to mc2 --out NEW` may still read it)"
    )


def count_parameters(model: nn.Module) -> int:
    """The total number of parameters of a model."""
    return sum(parameter.numel() for parameter in model.parameters())
