"""Few-shot geo-localisation: predict an image's place by ridge regression on its features.

N images, P places, D embedding width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mc2_hpc.errors import UserError

RIDGE = 2.0**10
"""Weight of the coefficients' squared norm."""
BIAS = 100.0
"""The constant feature: large, so its coefficient is hardly regularised."""
_SPREAD = 1e-5
"""Added to each feature's standard deviation."""


def ridge_accuracy(
    features: Tensor, labels: Tensor, train: Tensor, test: Tensor, *, shots: int, ridge: float = RIDGE
) -> float:
    """Share of test images whose place scores highest.

    big_vision's few-shot regression, as called by the scripts proposed to the paper's repository. Features are scaled
    to mean 0 and deviation 1 over the training images, and a constant is appended. Targets are 1 and -1, and the
    coefficients solve ``(X^T X + ridge I) W = X^T Y``, here in float64. Ties go to the lower place. A place without
    training images is never predicted.

    Args:
        features: float32 (N, D).
        labels: int64 (N,), each image's place.
        train, test: int64 indices of images; the first ``shots`` of each place in ``train`` are used for training.

    Raises:
        UserError: either part is empty.
    """
    if len(train) == 0 or len(test) == 0:
        raise UserError(f"geo-localisation needs images for training and for testing: {len(train)} and {len(test)}")
    places = labels[train].unique()
    chosen = torch.cat([train[labels[train] == place][:shots] for place in places])
    learnt = features[chosen].double()
    mean, deviation = learnt.mean(0), learnt.std(0, correction=0) + _SPREAD

    def inputs(part: Tensor) -> Tensor:
        return F.pad((part.double() - mean) / deviation, (0, 1), value=BIAS)

    design = inputs(learnt)
    targets = 2 * (labels[chosen][:, None] == places).double() - 1
    gram = design.T @ design + ridge * torch.eye(design.shape[1], dtype=torch.float64)
    weights = torch.linalg.solve(gram, design.T @ targets)
    found = places[(inputs(features[test]) @ weights).argmax(1)]
    return (found == labels[test]).double().mean().item()
