"""From a task and a model's features to scores.

N images, C classes, T texts, D embedding width.
"""

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

import torch
from torch import Tensor

from mc2_hpc.errors import UserError
from mc2_hpc.evaluation.accuracy import accuracies, chance_of_classes, chance_of_recall
from mc2_hpc.evaluation.embedding_quality import alignment, modality_gap, uniformity
from mc2_hpc.evaluation.encoder import Encoder, ImageFeatures
from mc2_hpc.evaluation.geolocation import ridge_accuracy
from mc2_hpc.evaluation.nearest import nearest
from mc2_hpc.evaluation.prompts import templates_of
from mc2_hpc.evaluation.retrieval import recall
from mc2_hpc.evaluation.tasks import (
    Association,
    Choice,
    Classification,
    ClassTexts,
    Places,
    Question,
    Retrieval,
    Task,
)
from mc2_hpc.evaluation.zero_shot import build_classifier

ALL = "all"
"""The group of all captions of a set at once."""
MANY_CANDIDATES = 10
"""Rounds with at least this many images are hard; DataComp reports their mean for WinoGAViL."""
SHOTS = (5, 10, 25)
"""Training images per place for few-shot geo-localisation."""
QUALITY_PAIRS = 5_000
"""Pairs used for alignment and uniformity, as in the paper."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Numbers of one task, each in [0, 1]."""

    mean: Mapping[str, float]
    """Metric -> the set's own number: the mean over languages, or over questions."""
    groups: Mapping[str, Mapping[str, float]]
    """Language, country or variant -> metric -> number."""
    counts: Mapping[str, int]
    """Group -> how many images, texts or questions its numbers cover."""
    skipped: Mapping[str, int] = field(default_factory=dict)
    """Samples that no number includes, by reason."""
    chance: Mapping[str, float] = field(default_factory=dict)
    """Metric of ``mean`` -> its expected value for random guessing, if defined."""
    embedding: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """For pairs, by language: alignment, uniformity of images and of texts, modality gap (``embedding_quality``)."""


def score(task: Task, images: ImageFeatures, encoder: Encoder) -> Scores:
    """Encode the task's texts and score it. Collective.

    Raises:
        UserError: nothing in the task is left to score.
    """
    if isinstance(task, Classification):
        found = _classification(task, images, encoder)
    elif isinstance(task, Retrieval):
        found = _retrieval(task, images, encoder)
    elif isinstance(task, Choice):
        found = _choice(task, images, encoder)
    elif isinstance(task, Association):
        found = _association(task, images, encoder)
    else:
        found = _places(task, images)
    skipped = Counter(task.skipped)
    for more in (images.skipped(), found.skipped):
        skipped.update(more)
    return dataclasses.replace(found, skipped=dict(skipped))


def _mean(groups: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {metric: fmean(numbers[metric] for numbers in groups) for metric in groups[0]}


def _classification(task: Classification, images: ImageFeatures, encoder: Encoder) -> Scores:
    labels = _padded(task.labels)
    members = torch.tensor(task.groups) if task.groups else None
    groups, counts, chance, lost = {}, {}, [], 0
    for lang, texts in task.languages.items():
        local = _local_labels(labels, texts.classes)
        shown = (local >= 0).any(1) & images.usable
        if not shown.any():  # a language whose classes have no image has no score
            lost += 1
            continue
        weights = class_weights(texts, lang, encoder)
        own = members[shown] if members is not None else None
        groups[lang] = accuracies(images.features[shown], weights, local[shown], task.metric, own)
        counts[lang] = int(shown.sum())
        chance.append(chance_of_classes(local[shown], len(weights)))
    if not groups:
        raise UserError("no image has a class that any language names")
    skipped = _lacking(task) | _count("language_without_images", lost)
    return Scores(
        mean=_mean(list(groups.values())), groups=groups, counts=counts, skipped=skipped, chance=_mean(chance)
    )


def _lacking(task: Classification | Retrieval) -> dict[str, int]:
    return dict(Counter(task.lacking.values()))


def _padded(labels: Sequence[tuple[int, ...]]) -> Tensor:
    """int64 (N, most labels of an image), padded with -1."""
    width = max(len(classes) for classes in labels)
    return torch.tensor([(*classes, *[-1] * (width - len(classes))) for classes in labels])


def _local_labels(labels: Tensor, classes: Sequence[int]) -> Tensor:
    """The labels as positions in ``classes``; -1 for classes that are not among them."""
    # One row more than there are classes, for the padding of -1.
    positions = torch.full((max(int(labels.max()), *classes) + 2,), -1)
    positions[torch.tensor(classes)] = torch.arange(len(classes))
    return positions[labels]


def class_weights(texts: ClassTexts, lang: str, encoder: Encoder) -> Tensor:
    """Classifier float32 (C, D) of one language's classes (see ``zero_shot.build_classifier``)."""
    return build_classifier(encoder.texts, texts.names, templates_of({lang: texts.templates}, lang))


def _retrieval(task: Retrieval, images: ImageFeatures, encoder: Encoder) -> Scores:
    groups, counts, chance, embedding, lost = {}, {}, {}, {}, 0
    kept: list[tuple[Tensor, Tensor]] = []
    for lang, captions in task.languages.items():
        owners = torch.tensor(captions.images)
        usable = images.usable[owners]
        lost += int((~usable).sum())
        if not usable.any():
            continue
        texts = encoder.texts([text for text, good in zip(captions.texts, usable.tolist(), strict=True) if good])
        if task.pooled:
            kept.append((texts, owners[usable]))
        if lang:
            groups[lang], chance[lang], embedding[lang] = _of_captions(images, texts, owners[usable])
            counts[lang] = len(texts)
    if kept:
        texts, owners = (torch.cat(parts) for parts in zip(*kept, strict=True))
        order = owners.argsort(stable=True)  # ties go to the lower index, the earlier image
        whole, chance[ALL], quality = _of_captions(images, texts[order], owners[order])
        groups, counts = {ALL: whole, **groups}, {ALL: len(texts), **counts}
        embedding = embedding or {ALL: quality}
    if not groups:
        raise UserError("no caption has an image that can be decoded")
    of = [ALL] if kept else list(groups)  # their mean is the set's own number
    return Scores(
        mean=_mean([groups[lang] for lang in of]),
        groups=groups,
        counts=counts,
        skipped=_lacking(task) | _count("caption_without_image", lost),
        chance=_mean([chance[lang] for lang in of]),
        embedding={lang: quality for lang, quality in embedding.items() if quality},
    )


def _of_captions(
    images: ImageFeatures, texts: Tensor, owners: Tensor
) -> tuple[dict[str, float], dict[str, float], dict[str, float]]:
    """Recalls, their chance level, and embedding quality (for at least two images) of captions and their images."""
    shown, local, sizes = owners.unique(return_inverse=True, return_counts=True)
    features = images.features[shown]
    quality = _quality(features, texts, local) if len(shown) > 1 else {}
    return _recalls(features, texts, local), chance_of_recall(len(shown), sizes.tolist()), quality


def _recalls(images: Tensor, texts: Tensor, owners: Tensor) -> dict[str, float]:
    found = recall(images, texts, owners)
    forward = {f"text_to_image_R@{k}": value for k, value in found.text_to_image.items()}
    return forward | {f"image_to_text_R@{k}": value for k, value in found.image_to_text.items()}


def _quality(images: Tensor, texts: Tensor, owners: Tensor) -> dict[str, float]:
    """Of the first ``QUALITY_PAIRS`` images and the first caption of each."""
    first = torch.full((len(images),), len(texts)).scatter_reduce_(0, owners, torch.arange(len(texts)), "amin")
    image, text = images[:QUALITY_PAIRS], texts[first[:QUALITY_PAIRS]]
    return {
        "alignment": alignment(image, text),
        "uniformity_image": uniformity(image),
        "uniformity_text": uniformity(text),
        "modality_gap": modality_gap(image, text),
    }


def _choice(task: Choice, images: ImageFeatures, encoder: Encoder) -> Scores:
    mean, counts, chance, lost = {}, {}, {}, 0
    groups: dict[str, dict[str, float]] = defaultdict(dict)
    for variant, questions in task.variants.items():
        asked = [question for question in questions if images.usable[question.image]]
        lost += len(questions) - len(asked)
        if not asked:
            continue
        right = _answers(asked, images, encoder)
        mean[variant] = fmean(right)
        chance[variant] = fmean(1 / len(question.options) for question in asked)
        by_group: dict[str, list[bool]] = defaultdict(list)
        for question, hit in zip(asked, right, strict=True):
            by_group[question.group].append(hit)
        for group, hits in sorted(by_group.items()):
            groups[group][variant] = fmean(hits)
            counts[group] = len(hits)
    if not mean:
        raise UserError("no question has an image that can be decoded")
    skipped = _count("question_without_image", lost)
    return Scores(mean=mean, groups=groups, counts=counts, skipped=skipped, chance=chance)


def _answers(questions: Sequence[Question], images: ImageFeatures, encoder: Encoder) -> list[bool]:
    texts = encoder.texts([option for question in questions for option in question.options])
    right, start = [], 0
    for question in questions:
        options = texts[start : start + len(question.options)]
        start += len(question.options)
        chosen = nearest(images.features[question.image][None], options, 1)[1]
        right.append(int(chosen) == question.answer)
    return right


def _association(task: Association, images: ImageFeatures, encoder: Encoder) -> Scores:
    rounds = [one for one in task.rounds if all(images.usable[index] for index in one.candidates)]
    if not rounds:
        raise UserError("no round has all of its images")
    found: dict[int, list[float]] = defaultdict(list)
    for one, cue in zip(rounds, encoder.texts([one.cue for one in rounds]), strict=True):
        candidates = images.features[torch.tensor(one.candidates)]
        picked = nearest(cue[None], candidates, len(one.associated))[1][0].tolist()
        right = {one.candidates[place] for place in picked} & set(one.associated)
        found[len(one.candidates)].append(len(right) / (2 * len(one.associated) - len(right)))
    many = [value for size, values in found.items() if size >= MANY_CANDIDATES for value in values]
    mean = {"jaccard": fmean(value for values in found.values() for value in values)}
    return Scores(
        mean={f"jaccard_{MANY_CANDIDATES}_up": fmean(many), **mean} if many else mean,
        groups={f"{size} candidates": {"jaccard": fmean(values)} for size, values in sorted(found.items())},
        counts={f"{size} candidates": len(values) for size, values in sorted(found.items())},
        skipped=_count("round_without_image", len(task.rounds) - len(rounds)),
    )


def _places(task: Places, images: ImageFeatures) -> Scores:
    groups, counts, chance = {}, {}, []
    for kind, places in task.places.items():
        number = {place: index for index, place in enumerate(sorted(set(places)))}
        labels = torch.tensor([number[place] for place in places])
        train, test = (
            torch.tensor([index for index in part if images.usable[index]], dtype=torch.int64)
            for part in (task.train, task.test)
        )
        groups[kind] = {
            f"{shots}_shot": ridge_accuracy(images.features, labels, train, test, shots=shots) for shots in SHOTS
        }
        counts[kind] = len(test)
        chance.append({f"{shots}_shot": 1 / len(number) for shots in SHOTS})
    return Scores(mean=_mean(list(groups.values())), groups=groups, counts=counts, chance=_mean(chance))


def _count(reason: str, number: int) -> dict[str, int]:
    return {reason: number} if number else {}
