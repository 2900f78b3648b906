"""Metrics of a classifier: accuracies, ROC-AUC, F1, the worst group; and their values for random guessing.

N images, C classes, D embedding width.
"""

from collections.abc import Callable, Sequence
from math import comb
from statistics import fmean

import torch
from torch import Tensor

from mc2_hpc.errors import UserError
from mc2_hpc.evaluation.nearest import nearest


def accuracies(
    features: Tensor, weights: Tensor, labels: Tensor, metric: str, groups: Tensor | None = None
) -> dict[str, float]:
    """The values of one of ``tasks.METRICS``, the metric in its name first.

    Args:
        features: float32 (N, D).
        weights: float32 (C, D).
        labels: int64 (N, most classes of an image), padded with -1; any of an image's classes is correct.
        groups: int64 (N,), for ``worst_group``.
    """
    if metric == "roc_auc":
        logits = (features @ weights.T).double()
        return {"roc_auc": roc_auc(logits[:, 1] - logits[:, 0], labels[:, 0] == 1)}
    best = nearest(features, weights, min(5, len(weights)))[1]
    right = (best[:, :, None] == labels[:, None, :]).any(2)
    hits = {k: right[:, :k].any(1).double() for k in (1, 5)}
    if metric == "mean_per_class":
        return {f"mean_per_class_top{k}": mean_per_class(hit, labels[:, 0]) for k, hit in hits.items()}
    numbers = {f"top{k}": hit.mean().item() for k, hit in hits.items()}
    more: dict[str, Callable[[], dict[str, float]]] = {
        "accuracy": dict,
        "mean_top1_top5": lambda: {"mean_top1_top5": fmean(numbers.values())},
        "macro_f1": lambda: {"macro_f1": macro_f1(best[:, 0], labels[:, 0])},
        "worst_group": lambda: {f"worst_group_top{k}": worst_group(hit, groups) for k, hit in hits.items()},
    }
    return more[metric]() | numbers


def mean_per_class(hit: Tensor, labels: Tensor) -> float:
    """Mean over the classes that have an image; hit float64 (N,), labels int64 (N,)."""
    return float(_group_means(hit, labels).mean())


def worst_group(hit: Tensor, groups: Tensor | None) -> float:
    """Smallest mean over the groups that have an image; hit float64 (N,), groups int64 (N,)."""
    assert groups is not None
    return float(_group_means(hit, groups).min())


def _group_means(hit: Tensor, groups: Tensor) -> Tensor:
    sizes = torch.bincount(groups)
    sums = torch.zeros(len(sizes), dtype=torch.float64).index_add_(0, groups, hit)
    return sums[sizes > 0] / sizes[sizes > 0]


def macro_f1(predicted: Tensor, labels: Tensor) -> float:
    """Mean of 2 TP / (2 TP + FP + FN) over the classes that have an image; int64 (N,) each.

    WILDS's metric for iWildCam: predicting a class without images lowers only the recall of the image's own class.
    """
    classes = 1 + int(torch.maximum(predicted.max(), labels.max()))
    hits = torch.bincount(labels[predicted == labels], minlength=classes)
    shown, taken = torch.bincount(labels, minlength=classes), torch.bincount(predicted, minlength=classes)
    present = shown > 0
    return float((2 * hits[present].double() / (shown + taken)[present]).mean())


def roc_auc(scores: Tensor, positive: Tensor) -> float:
    """Area under the ROC curve: the probability that a positive scores above a negative; ties count half.

    Computed from ranks (Mann-Whitney), exact with ties.

    Args:
        scores: (N,).
        positive: bool (N,).

    Raises:
        UserError: there are no positives or no negatives.
    """
    positives = int(positive.sum())
    negatives = len(positive) - positives
    if not positives or not negatives:
        raise UserError(f"ROC-AUC needs images of both classes: {negatives} and {positives}")
    _, group, sizes = scores.unique(return_inverse=True, return_counts=True)
    last = sizes.cumsum(0).double()
    ranks = (last - (sizes - 1) / 2)[group]  # from 1; ties share their mean rank
    return (ranks[positive].sum().item() - positives * (positives + 1) / 2) / (positives * negatives)


def chance_of_classes(labels: Tensor, classes: int) -> dict[str, float]:
    """The expected value for a random order of the classes, by metric; not defined for the worst group and F1.

    Args:
        labels: int64 (N, most classes of an image), padded with -1.
    """
    right = (labels >= 0).sum(1).tolist()
    top = {k: fmean(hit_chance(classes, count, k) for count in right) for k in (1, 5)}
    numbers = {f"{name}{k}": value for k, value in top.items() for name in ("top", "mean_per_class_top")}
    return {**numbers, "mean_top1_top5": fmean(top.values()), "roc_auc": 0.5}


def chance_of_recall(images: int, captions: Sequence[int]) -> dict[str, float]:
    """The expected R@1, 5, 10 for random orders, in both directions.

    Args:
        images: in the gallery.
        captions: number of captions of each image.
    """
    total, numbers = sum(captions), {}
    count_of = {count: captions.count(count) / images for count in set(captions)}
    for k in (1, 5, 10):
        numbers[f"text_to_image_R@{k}"] = min(k, images) / images
        numbers[f"image_to_text_R@{k}"] = sum(share * hit_chance(total, count, k) for count, share in count_of.items())
    return numbers


def hit_chance(total: int, right: int, k: int) -> float:
    """The probability that ``k`` draws without replacement from ``total`` items hit one of the ``right`` ones."""
    ways = comb(total, min(k, total))
    return (ways - comb(total - right, min(k, total))) / ways
