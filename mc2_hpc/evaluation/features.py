"""Embeddings of pictures and texts, batch by batch.

B batch, S image side, L tokens, D embedding width.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from mc2_hpc.data.normalise import normalise
from mc2_hpc.errors import UserError

Tokenize = Callable[[Sequence[str]], Tensor]
"""Texts -> int64 token ids (B, L); open_clip's tokenizers and ``Tokenizer.encode`` are such."""


class DualEncoder(Protocol):
    """What evaluation asks of a model; ours and open_clip's have it."""

    def encode_image(self, images: Tensor, normalize: bool = False) -> Tensor:
        """Normalised float images (B, 3, S, S) -> (B, D), of unit length if ``normalize``."""
        ...

    def encode_text(self, tokens: Tensor, normalize: bool = False) -> Tensor:
        """Token ids (B, L) -> (B, D), of unit length if ``normalize``."""
        ...


@torch.inference_mode()
def encode_images(model: DualEncoder, batches: Iterable[Tensor], device: str | torch.device = "cpu") -> Tensor:
    """Unit-length float32 features (n, D) on the CPU of uint8 batches (B, 3, S, S), in their order.

    Raises:
        UserError: there are no pictures, or a feature is not finite.
    """
    parts = [model.encode_image(normalise(batch.to(device)), normalize=True).float().cpu() for batch in batches]
    return _joined(parts, "pictures")


@torch.inference_mode()
def encode_texts(
    model: DualEncoder,
    tokenize: Tokenize,
    texts: Sequence[str],
    *,
    batch: int = 256,
    device: str | torch.device = "cpu",
) -> Tensor:
    """Unit-length float32 features (n, D) on the CPU of ``texts``, in their order; equal texts are encoded once.

    Raises:
        UserError: there are no texts, or a feature is not finite.
    """
    # Texts of like length share a batch, since a batch is padded to its longest.
    ordered = sorted(dict.fromkeys(texts), key=len)
    parts = [
        model.encode_text(tokenize(ordered[start : start + batch]).to(device), normalize=True).float().cpu()
        for start in range(0, len(ordered), batch)
    ]
    features = _joined(parts, "texts")
    row = {text: index for index, text in enumerate(ordered)}
    return features[torch.tensor([row[text] for text in texts])]


def _joined(parts: list[Tensor], what: str) -> Tensor:
    if not parts:
        raise UserError(f"no {what} to encode")
    features = torch.cat(parts)
    if not bool(torch.isfinite(features).all()):
        raise UserError(f"the model gives non-finite features for some {what}: no number computed from them would hold")
    return features
