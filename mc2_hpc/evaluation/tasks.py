"""The kinds of task that evaluation sets are read into: what to show a model, and how its answers are scored.

A reader (``mc2_hpc.evaluation.sets``) knows the files of a set, a task knows nothing of files.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from mc2_hpc.errors import UserError
from mc2_hpc.evaluation.pictures import Pictures

METRICS = ("accuracy", "mean_per_class", "mean_top1_top5", "roc_auc")


@dataclass(frozen=True, kw_only=True)
class ClassTexts:
    """One language's classifier: its own classes, their names, and the sentence forms."""

    classes: Sequence[int]
    """Which of the set's classes the language names; pictures of other classes are not shown to it."""
    names: Sequence[str]
    """One a class."""
    templates: Sequence[str]
    """Each with one ``{}`` for the name."""

    def __post_init__(self) -> None:
        if len(self.classes) != len(self.names) or not self.names:
            raise UserError(f"{len(self.classes)} classes with {len(self.names)} names: needs one a class, and a class")
        for number, name in zip(self.classes, self.names, strict=True):
            if not name.strip():
                raise UserError(f"class {number} has an empty name")


@dataclass(frozen=True, kw_only=True)
class Classification:
    """Pictures of known classes, which are named in one or more languages."""

    pictures: Pictures
    labels: Sequence[tuple[int, ...]]
    """Right classes of each picture, mostly one; naming any of them is right."""
    languages: Mapping[str, ClassTexts]
    metric: str = "accuracy"
    """``accuracy`` (share of pictures), ``mean_per_class`` (mean over classes of each one's share), ``mean_top1_top5``
    (mean of both accuracies), or ``roc_auc`` (of two classes, by how much closer the second one is)."""
    skipped: Mapping[str, int] = field(default_factory=dict)
    """What the reader left out, by reason."""

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise UserError(f"metric {self.metric!r}: choose one of {', '.join(METRICS)}")
        if len(self.labels) != len(self.pictures):
            raise UserError(f"{len(self.pictures)} pictures with {len(self.labels)} labels")
        if self.metric in ("mean_per_class", "roc_auc") and any(len(classes) != 1 for classes in self.labels):
            raise UserError(f"metric {self.metric!r} needs one class a picture")
        if self.metric == "roc_auc" and any(sorted(texts.classes) != [0, 1] for texts in self.languages.values()):
            raise UserError("metric 'roc_auc' needs two classes, 0 and 1")


@dataclass(frozen=True, kw_only=True)
class Captions:
    """Texts of one language, and the picture that each describes."""

    texts: Sequence[str]
    pictures: Sequence[int]

    def __post_init__(self) -> None:
        if len(self.texts) != len(self.pictures) or not self.texts:
            raise UserError(
                f"{len(self.texts)} captions of {len(self.pictures)} pictures: needs one a text, and a text"
            )


@dataclass(frozen=True, kw_only=True)
class Retrieval:
    """Pictures and their captions in one or more languages; each language is searched by itself."""

    pictures: Pictures
    languages: Mapping[str, Captions]
    skipped: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Question:
    """A picture and the texts to choose from."""

    picture: int
    options: Sequence[str]
    answer: int
    """Index of the right option."""
    group: str
    """What the report counts it under, such as ``Spanish, Argentina``."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Multiple choice: the option whose text is closest to the picture is the answer."""

    pictures: Pictures
    variants: Mapping[str, Sequence[Question]]
    """Wordings of the same questions, such as ``LOCAL`` and ``EN``."""
    skipped: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Places:
    """Pictures of known places, for few-shot geo-localisation."""

    pictures: Pictures
    places: Mapping[str, Sequence[str]]
    """By kind (``country``, ``region``), the place of each picture."""
    train: Sequence[int]
    test: Sequence[int]
    skipped: Mapping[str, int] = field(default_factory=dict)


Task = Classification | Retrieval | Choice | Places
