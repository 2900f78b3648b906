"""Zero-shot classification, with a classifier made from class names in sentence templates.

C classes, T templates, N images, D embedding width.
"""

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor

from mc2_hpc.errors import UserError
from mc2_hpc.evaluation.nearest import nearest
from mc2_hpc.evaluation.prompts import fill

EncodeTexts = Callable[[Sequence[str]], Tensor]
"""Texts -> unit-length float32 (n, D), such as ``Encoder.texts`` or ``mc2_hpc.load(...).encode_text``."""


def build_classifier(encode_texts: EncodeTexts, names: Sequence[str], templates: Sequence[str]) -> Tensor:
    """Classifier weights float32 (C, D): per class, unit-length text features, their mean over templates, unit length.

    This is CLIP's protocol (Radford et al. 2021, section 3.1.4) and that of open_clip's
    ``build_zero_shot_classifier``, whose result is transposed.
    """
    features = encode_texts(fill(templates, names)).view(len(names), len(templates), -1)
    return F.normalize(features.mean(dim=1), dim=-1)


def predict(features: Tensor, weights: Tensor, *, k: int = 1) -> Tensor:
    """The ``k`` best classes of each image, best first: int64 (N, k).

    Args:
        features: float32 (N, D).
        weights: float32 (C, D).

    Of equal scores, the lower class comes first.
    """
    return nearest(features, weights, k)[1]


def top_k_accuracy(features: Tensor, weights: Tensor, labels: Tensor, ks: Sequence[int] = (1, 5)) -> dict[int, float]:
    """``{k: share of images with their class among the k best}``; a ``k`` beyond the number of classes counts all.

    Args:
        features: float32 (N, D).
        weights: float32 (C, D), from :func:`build_classifier`.
        labels: int64 (N,), the class of each image.

    Raises:
        UserError: there are no images, or a label is not a class.
    """
    num_classes = len(weights)
    if len(labels) == 0 or len(labels) != len(features):
        raise UserError(
            f"{len(features)} images with {len(labels)} labels: needs one label per image, and at least one"
        )
    if int(labels.min()) < 0 or int(labels.max()) >= num_classes:
        raise UserError(f"labels are in {int(labels.min())}..{int(labels.max())}, but there are {num_classes} classes")
    best = predict(features, weights, k=min(max(ks), num_classes))
    hit = best == labels[:, None]
    return {k: hit[:, :k].any(dim=1).double().mean().item() for k in ks}
