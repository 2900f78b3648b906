"""Text-to-image and image-to-text retrieval, with any number of captions per image."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mc2_hpc.errors import UserError
from mc2_hpc.evaluation.nearest import nearest_both_ways


@dataclass(frozen=True)
class Recall:
    """``{k: R@k}`` in both directions, each in [0, 1]."""

    text_to_image: dict[int, float]
    image_to_text: dict[int, float]


def recall(image_features: Tensor, text_features: Tensor, text_image: Tensor, ks: Sequence[int] = (1, 5, 10)) -> Recall:
    """R@k over all texts (own image among the k best) and over all images (any own caption among the k best).

    Ties: of equal scores, the lower index comes first. A ``k`` beyond the size of the gallery counts all of it.

    Args:
        image_features: float32 (I, D).
        text_features: float32 (T, D).
        text_image: int64 (T,), the image each text describes; every image needs a text.

    Raises:
        UserError: a text without an image, or an image without a text.
    """
    num_images, num_texts = len(image_features), len(text_features)
    if len(text_image) != num_texts or num_texts == 0:
        raise UserError(
            f"{num_texts} texts with {len(text_image)} image indices: needs one index per text, and at least one"
        )
    low, high = int(text_image.min()), int(text_image.max())
    if low < 0 or high >= num_images:
        raise UserError(f"image indices are in {low}..{high}, but there are {num_images} images")
    without = num_images - len(text_image.unique())
    if without:
        raise UserError(f"{without} of {num_images} images have no text: leave them out")
    (_, images), (_, texts) = nearest_both_ways(text_features, image_features, max(ks))
    return Recall(
        text_to_image=_recall_at(images == text_image[:, None], ks),
        image_to_text=_recall_at(text_image[texts] == torch.arange(num_images, device=texts.device)[:, None], ks),
    )


def _recall_at(hit: Tensor, ks: Sequence[int]) -> dict[int, float]:
    """``hit``: bool (Q, k_max), best first."""
    return {k: hit[:, :k].any(dim=1).double().mean().item() for k in ks}
