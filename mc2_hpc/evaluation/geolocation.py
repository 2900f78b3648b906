"""Few-shot geo-localisation: which place a picture is from, by ridge regression on its features.

N pictures, P places, D embedding width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mc2_hpc.errors import UserError

RIDGE = 2.0**10
"""Weight of the squared norm of the coefficients; from a public script of the protocol, no paper states it."""


def ridge_accuracy(
    features: Tensor, labels: Tensor, train: Tensor, test: Tensor, *, shots: int, ridge: float = RIDGE
) -> float:
    """Share of test pictures whose place scores highest.

    One-hot places are regressed on unit-length features and a constant, ``(X^T X + ridge I) W = X^T Y`` with the
    constant's own coefficient free, in float64; of equal scores the lower place wins.

    Args:
        features: float32 (N, D).
        labels: int64 (N,), each picture's place.
        train, test: int64 indices of pictures; the first ``shots`` of each place in ``train`` are learnt from.

    Raises:
        UserError: either part is empty.
    """
    if len(train) == 0 or len(test) == 0:
        raise UserError(f"geo-localisation needs pictures to learn from and to test: {len(train)} and {len(test)}")
    chosen = torch.cat([train[labels[train] == place][:shots] for place in labels[train].unique()])
    inputs = features[chosen].double()
    targets = F.one_hot(labels[chosen], int(labels.max()) + 1).double()
    # A free constant is the same as centring both sides.
    input_mean, target_mean = inputs.mean(0), targets.mean(0)
    centred = inputs - input_mean
    gram = centred.T @ centred + ridge * torch.eye(centred.shape[1], dtype=torch.float64)
    weights = torch.linalg.solve(gram, centred.T @ (targets - target_mean))
    scores = (features[test].double() - input_mean) @ weights + target_mean
    return (scores.argmax(1) == labels[test]).double().mean().item()
