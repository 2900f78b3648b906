"""The kinds of task that evaluation sets are read into: what to show a model, and how to score its answers.

A reader (``mc2_hpc.evaluation.sets``) handles the files of a set; a task is independent of files.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from mc2_hpc.errors import UserError
from mc2_hpc.evaluation.images import Images

_ONE_CLASS = ("mean_per_class", "roc_auc", "macro_f1")
METRICS = ("accuracy", "mean_per_class", "mean_top1_top5", "roc_auc", "macro_f1", "worst_group")


@dataclass(frozen=True, kw_only=True)
class ClassTexts:
    """One language's classifier: its own classes, their names, and the templates."""

    classes: Sequence[int]
    """The set's classes that the language names; images of other classes are left out for it."""
    names: Sequence[str]
    """One per class."""
    templates: Sequence[str]
    """Each with one ``{}`` for the name."""

    def __post_init__(self) -> None:
        if len(self.classes) != len(self.names) or not self.names:
            raise UserError(
                f"{len(self.classes)} classes with {len(self.names)} names: needs one per class, and at least one"
            )
        for number, name in zip(self.classes, self.names, strict=True):
            if not name.strip():
                raise UserError(f"class {number} has an empty name")


@dataclass(frozen=True, kw_only=True)
class Classification:
    """Images of known classes, which are named in one or more languages."""

    images: Images
    labels: Sequence[tuple[int, ...]]
    """Correct classes of each image, usually one; any of them counts as correct."""
    languages: Mapping[str, ClassTexts]
    metric: str = "accuracy"
    """``accuracy`` (share of images), ``mean_per_class`` (mean of the classes' accuracies), ``mean_top1_top5`` (mean of
    both accuracies), ``roc_auc`` (of two classes, by how much closer the second one is), ``macro_f1`` (mean F1 score of
    the classes that have an image), or ``worst_group`` (accuracy in the worst of ``groups``)."""
    groups: Sequence[int] = ()
    """For ``worst_group``: the group of each image, such as its region."""
    skipped: Mapping[str, int] = field(default_factory=dict)
    """Samples that the reader left out, by reason."""
    lacking: Mapping[str, str] = field(default_factory=dict)
    """Languages that are not whole, and why, a word that they are counted under."""

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise UserError(f"metric {self.metric!r}: choose one of {', '.join(METRICS)}")
        if len(self.labels) != len(self.images):
            raise UserError(f"{len(self.images)} images with {len(self.labels)} labels")
        if self.metric in _ONE_CLASS and any(len(classes) != 1 for classes in self.labels):
            raise UserError(f"metric {self.metric!r} needs one class per image")
        if self.metric == "roc_auc" and any(sorted(texts.classes) != [0, 1] for texts in self.languages.values()):
            raise UserError("metric 'roc_auc' needs two classes, 0 and 1")
        if self.metric == "worst_group" and len(self.groups) != len(self.images):
            raise UserError("metric 'worst_group' needs the group of every image (option group)")


@dataclass(frozen=True, kw_only=True)
class Captions:
    """Texts in one language, and the image that each describes."""

    texts: Sequence[str]
    images: Sequence[int]

    def __post_init__(self) -> None:
        if len(self.texts) != len(self.images) or not self.texts:
            raise UserError(
                f"{len(self.texts)} captions with {len(self.images)} images: needs one per caption, and at least one"
            )


@dataclass(frozen=True, kw_only=True)
class Retrieval:
    """Images and their captions in one or more languages; each language is searched separately."""

    images: Images
    languages: Mapping[str, Captions]
    pooled: bool = False
    """Whether the set's own number is over all captions at once, as the group ``all``, rather than the mean over
    languages. ``all`` then includes captions in no known language, under ``""``."""
    skipped: Mapping[str, int] = field(default_factory=dict)
    lacking: Mapping[str, str] = field(default_factory=dict)
    """Languages that are not whole, and why, a word that they are counted under."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """An image and the texts to choose from."""

    image: int
    options: Sequence[str]
    answer: int
    """Index of the correct option."""
    group: str
    """Its group in the report, such as ``Spanish, Argentina``."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Multiple choice: the option whose text is closest to the image is the answer."""

    images: Images
    variants: Mapping[str, Sequence[Question]]
    """Versions of the same questions, such as ``LOCAL`` and ``EN``."""
    skipped: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Places:
    """Images of known places, for few-shot geo-localisation."""

    images: Images
    places: Mapping[str, Sequence[str]]
    """The place of each image, by kind (``country``, ``region``)."""
    train: Sequence[int]
    test: Sequence[int]
    skipped: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Round:
    """A cue, and images, some of which go with it."""

    cue: str
    candidates: Sequence[int]
    associated: Sequence[int]
    """The candidates that go with the cue."""


@dataclass(frozen=True, kw_only=True)
class Association:
    """For each round, the candidates closest to the cue are picked, as many as are correct."""

    images: Images
    rounds: Sequence[Round]
    skipped: Mapping[str, int] = field(default_factory=dict)


Task = Classification | Retrieval | Choice | Places | Association
