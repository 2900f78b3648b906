"""Linear probe: logistic regression on image features, as in the CLIP paper (Radford et al. 2021, appendix A.3).

It uses scikit-learn's L-BFGS with at most 1,000 iterations. The L2 penalty is tuned on a validation part of the
training images, between 1e-6 and 1e6 with 8 steps per decade, by halving the distance around the best value. The
classifier is then trained on all of the training images.

N images, D embedding width.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mc2_hpc.errors import UserError
from mc2_hpc.evaluation.accuracy import mean_per_class
from mc2_hpc.evaluation.nearest import first_k

STRENGTHS = np.logspace(-6, 6, 97)
"""scikit-learn's ``C``, the inverse of the penalty's weight."""
_FIRST_STEP = 16
_ITERATIONS = 1_000


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A classifier trained on features, and how it was chosen."""

    strength: float
    """``C``."""
    validation_top1: float
    """Of the classifier with that strength, trained without the validation images."""
    scores: Tensor
    """float32 (N, classes), of the test images."""
    classes: Tensor
    """int64 (classes,): the class of each score; classes without a training image have no score."""

    def numbers(self, labels: Tensor) -> dict[str, float]:
        """Accuracies on the test images, with classes int64 (N,)."""
        best = self.classes[first_k(self.scores, min(5, len(self.classes)))[1]]
        hit = best == labels[:, None]
        top1, top5 = (hit[:, :k].any(1).double() for k in (1, 5))
        return {
            "linear_probe_top1": top1.mean().item(),
            "linear_probe_top5": top5.mean().item(),
            "linear_probe_mean_per_class_top1": mean_per_class(top1, labels),
        }


def linear_probe(train: Tensor, labels: Tensor, validation: Tensor, test: Tensor) -> Probe:
    """Train on ``train`` and score ``test``.

    Args:
        train: float32 (N, D).
        labels: int64 (N,).
        validation: bool (N,): which of the training images are used to choose the strength.
        test: float32 (M, D).

    Raises:
        UserError: too few images or classes for training or validation, or scikit-learn is not installed.
    """
    if validation.all() or not validation.any():
        raise UserError(f"linear_probe: {len(train)} training images are too few to hold some out for validation")
    if len(labels[~validation].unique()) < 2:
        raise UserError("linear_probe: all training images are of one class")
    inputs, targets = train.double().numpy(), labels.numpy()
    part, held = ~validation.numpy(), validation.numpy()

    def accuracy(strength: float) -> float:
        model = _fit(inputs[part], targets[part], strength)
        return float((model.predict(inputs[held]) == targets[held]).mean())

    strength, best = peak(accuracy)
    model = _fit(inputs, targets, strength)
    scores = torch.from_numpy(model.decision_function(test.double().numpy())).float()
    if scores.ndim == 1:  # for two classes, scikit-learn returns only the second's margin
        scores = torch.stack([-scores, scores], dim=1)
    return Probe(
        strength=strength, validation_top1=best, scores=scores, classes=torch.from_numpy(model.classes_).long()
    )


def peak(accuracy: Callable[[float], float]) -> tuple[float, float]:
    """The strength with the highest accuracy, and that accuracy; ties go to the smaller strength (larger penalty)."""
    found: dict[int, float] = {}

    def best_of(places: range | list[int]) -> int:
        for place in places:
            if place not in found:
                found[place] = accuracy(float(STRENGTHS[place]))
        return min(places, key=lambda place: (-found[place], place))

    place = best_of(range(0, len(STRENGTHS), _FIRST_STEP))
    step = _FIRST_STEP // 2
    while step:
        place = best_of([max(0, place - step), place, min(len(STRENGTHS) - 1, place + step)])
        step //= 2
    return float(STRENGTHS[place]), found[place]


def _fit(inputs: npt.NDArray[np.float64], targets: npt.NDArray[np.int64], strength: float) -> Any:
    try:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression
    except ModuleNotFoundError as error:
        raise UserError(f"linear_probe: {error}: pip install mc2_hpc[eval]") from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # CLIP's iteration limit is part of the protocol
        return LogisticRegression(C=strength, max_iter=_ITERATIONS).fit(inputs, targets)
