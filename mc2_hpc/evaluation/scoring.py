"""A task and a model's features to numbers.

N pictures, C classes, T texts, D embedding width.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

import torch
from torch import Tensor

from mc2_hpc.errors import UserError
from mc2_hpc.evaluation.embedding_quality import alignment, modality_gap, uniformity
from mc2_hpc.evaluation.encoder import Encoder, PictureFeatures
from mc2_hpc.evaluation.geolocation import ridge_accuracy
from mc2_hpc.evaluation.nearest import nearest
from mc2_hpc.evaluation.prompts import fill, templates_of
from mc2_hpc.evaluation.retrieval import recall
from mc2_hpc.evaluation.tasks import Choice, Classification, ClassTexts, Places, Question, Retrieval, Task
from mc2_hpc.evaluation.zero_shot import average_templates

SHOTS = (5, 10, 25)
"""Pictures a place that few-shot geo-localisation learns from."""
QUALITY_PAIRS = 5_000
"""Pairs that alignment and uniformity are computed of, as many as the paper takes."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Numbers of one task, each in [0, 1]."""

    mean: Mapping[str, float]
    """Metric -> the set's own number: the mean over languages, or over questions."""
    groups: Mapping[str, Mapping[str, float]]
    """Language, country or variant -> metric -> number."""
    counts: Mapping[str, int]
    """Group -> how many pictures, texts or questions its numbers are of."""
    skipped: Mapping[str, int] = field(default_factory=dict)
    """What no number includes, by reason."""
    embedding: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """For pairs, by language: alignment, uniformity of both sides, modality gap (``embedding_quality``)."""


def score(task: Task, pictures: PictureFeatures, encoder: Encoder) -> Scores:
    """Encode the task's texts and score it. Collective.

    Raises:
        UserError: nothing of the task is left to score.
    """
    if isinstance(task, Classification):
        found = _classification(task, pictures, encoder)
    elif isinstance(task, Retrieval):
        found = _retrieval(task, pictures, encoder)
    elif isinstance(task, Choice):
        found = _choice(task, pictures, encoder)
    else:
        found = _places(task, pictures)
    skipped = {**task.skipped, **pictures.skipped(), **found.skipped}
    return dataclasses.replace(found, skipped=skipped)


def _mean(groups: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    metrics = next(iter(groups.values()))
    return {metric: fmean(numbers[metric] for numbers in groups.values()) for metric in metrics}


def _classification(task: Classification, pictures: PictureFeatures, encoder: Encoder) -> Scores:
    labels = _padded(task.labels)
    groups, counts, lost = {}, {}, 0
    for lang, texts in task.languages.items():
        local = _local_labels(labels, texts.classes)
        shown = (local >= 0).any(1) & pictures.usable
        if not shown.any():  # a language whose classes have no picture has no number
            lost += 1
            continue
        weights = class_weights(texts, lang, encoder)
        groups[lang] = _accuracies(pictures.features[shown], weights, local[shown], task.metric)
        counts[lang] = int(shown.sum())
    if not groups:
        raise UserError("no picture is of a class that any language names")
    return Scores(mean=_mean(groups), groups=groups, counts=counts, skipped=_count("language_without_pictures", lost))


def _padded(labels: Sequence[tuple[int, ...]]) -> Tensor:
    """int64 (N, most labels of a picture), filled up with -1."""
    width = max(len(classes) for classes in labels)
    return torch.tensor([(*classes, *[-1] * (width - len(classes))) for classes in labels])


def _local_labels(labels: Tensor, classes: Sequence[int]) -> Tensor:
    """The labels as positions in ``classes``; -1 where a class is not among them."""
    # One row more than there are classes, for the -1 that fills up.
    positions = torch.full((max(int(labels.max()), *classes) + 2,), -1)
    positions[torch.tensor(classes)] = torch.arange(len(classes))
    return positions[labels]


def class_weights(texts: ClassTexts, lang: str, encoder: Encoder) -> Tensor:
    """Classifier float32 (C, D) of one language's classes (see ``zero_shot.build_classifier``)."""
    templates = templates_of({lang: texts.templates}, lang)
    features = encoder.texts(fill(templates, texts.names))
    return average_templates(features.view(len(texts.names), len(templates), -1))


def _accuracies(features: Tensor, weights: Tensor, labels: Tensor, metric: str) -> dict[str, float]:
    """The numbers of ``tasks.METRICS``; labels (N, most of a picture)."""
    if metric == "roc_auc":
        logits = (features @ weights.T).double()
        return {"roc_auc": roc_auc(logits[:, 1] - logits[:, 0], labels[:, 0] == 1)}
    best = nearest(features, weights, min(5, len(weights)))[1]
    right = (best[:, :, None] == labels[:, None, :]).any(2)
    hits = {k: right[:, :k].any(1).double() for k in (1, 5)}
    if metric == "mean_per_class":
        return {f"mean_per_class_top{k}": _mean_per_class(hit, labels[:, 0]) for k, hit in hits.items()}
    numbers = {f"top{k}": hit.mean().item() for k, hit in hits.items()}
    return {"mean_top1_top5": fmean(numbers.values()), **numbers} if metric == "mean_top1_top5" else numbers


def _mean_per_class(hit: Tensor, labels: Tensor) -> float:
    """Mean over the classes that have a picture; hit float64 (N,), labels int64 (N,)."""
    sizes = torch.bincount(labels)
    sums = torch.zeros(len(sizes), dtype=torch.float64).index_add_(0, labels, hit)
    return (sums[sizes > 0] / sizes[sizes > 0]).mean().item()


def roc_auc(scores: Tensor, positive: Tensor) -> float:
    """Area under the ROC curve: the chance that a positive scores above a negative, an equal score counting half.

    By ranks (Mann-Whitney): exact, with ties.

    Args:
        scores: (N,).
        positive: bool (N,).

    Raises:
        UserError: one of the two has no member.
    """
    positives = int(positive.sum())
    negatives = len(positive) - positives
    if not positives or not negatives:
        raise UserError(f"ROC-AUC needs pictures of both classes: {negatives} and {positives}")
    _, group, sizes = scores.unique(return_inverse=True, return_counts=True)
    last = sizes.cumsum(0).double()
    ranks = (last - (sizes - 1) / 2)[group]  # from 1; equals share the mean of theirs
    return (ranks[positive].sum().item() - positives * (positives + 1) / 2) / (positives * negatives)


def _retrieval(task: Retrieval, pictures: PictureFeatures, encoder: Encoder) -> Scores:
    groups, counts, embedding, lost = {}, {}, {}, 0
    for lang, captions in task.languages.items():
        owners = torch.tensor(captions.pictures)
        usable = pictures.usable[owners]
        lost += int((~usable).sum())
        if not usable.any():
            continue
        texts = encoder.texts([text for text, good in zip(captions.texts, usable.tolist(), strict=True) if good])
        shown, local = owners[usable].unique(return_inverse=True)
        groups[lang] = _recalls(pictures.features[shown], texts, local)
        counts[lang] = len(texts)
        if len(shown) > 1:
            embedding[lang] = _quality(pictures.features[shown], texts, local)
    if not groups:
        raise UserError("no caption has a picture that can be decoded")
    skipped = _count("caption_without_picture", lost)
    return Scores(mean=_mean(groups), groups=groups, counts=counts, skipped=skipped, embedding=embedding)


def _recalls(images: Tensor, texts: Tensor, owners: Tensor) -> dict[str, float]:
    found = recall(images, texts, owners)
    forward = {f"text_to_image_R@{k}": value for k, value in found.text_to_image.items()}
    return forward | {f"image_to_text_R@{k}": value for k, value in found.image_to_text.items()}


def _quality(images: Tensor, texts: Tensor, owners: Tensor) -> dict[str, float]:
    """Of the first ``QUALITY_PAIRS`` pictures and the first caption of each."""
    first = torch.full((len(images),), len(texts)).scatter_reduce_(0, owners, torch.arange(len(texts)), "amin")
    image, text = images[:QUALITY_PAIRS], texts[first[:QUALITY_PAIRS]]
    return {
        "alignment": alignment(image, text),
        "uniformity_image": uniformity(image),
        "uniformity_text": uniformity(text),
        "modality_gap": modality_gap(image, text),
    }


def _choice(task: Choice, pictures: PictureFeatures, encoder: Encoder) -> Scores:
    mean, counts, lost = {}, {}, 0
    groups: dict[str, dict[str, float]] = defaultdict(dict)
    for variant, questions in task.variants.items():
        asked = [question for question in questions if pictures.usable[question.picture]]
        lost += len(questions) - len(asked)
        if not asked:
            continue
        right = _answers(asked, pictures, encoder)
        mean[variant] = fmean(right)
        by_group: dict[str, list[bool]] = defaultdict(list)
        for question, hit in zip(asked, right, strict=True):
            by_group[question.group].append(hit)
        for group, hits in sorted(by_group.items()):
            groups[group][variant] = fmean(hits)
            counts[group] = len(hits)
    if not mean:
        raise UserError("no question has a picture that can be decoded")
    return Scores(mean=mean, groups=groups, counts=counts, skipped=_count("question_without_picture", lost))


def _answers(questions: Sequence[Question], pictures: PictureFeatures, encoder: Encoder) -> list[bool]:
    texts = encoder.texts([option for question in questions for option in question.options])
    right, start = [], 0
    for question in questions:
        options = texts[start : start + len(question.options)]
        start += len(question.options)
        chosen = nearest(pictures.features[question.picture][None], options, 1)[1]
        right.append(int(chosen) == question.answer)
    return right


def _places(task: Places, pictures: PictureFeatures) -> Scores:
    groups, counts = {}, {}
    for kind, places in task.places.items():
        number = {place: index for index, place in enumerate(sorted(set(places)))}
        labels = torch.tensor([number[place] for place in places])
        train, test = (
            torch.tensor([index for index in part if pictures.usable[index]], dtype=torch.int64)
            for part in (task.train, task.test)
        )
        groups[kind] = {
            f"{shots}_shot": ridge_accuracy(pictures.features, labels, train, test, shots=shots) for shots in SHOTS
        }
        counts[kind] = len(test)
    return Scores(mean=_mean(groups), groups=groups, counts=counts)


def _count(reason: str, number: int) -> dict[str, int]:
    return {reason: number} if number else {}
