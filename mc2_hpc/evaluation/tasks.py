"""The kinds of task that evaluation sets are read into: what to show a model, and how its answers are scored.

A reader (``mc2_hpc.evaluation.sets``) knows the files of a set, a task knows nothing of files.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from mc2_hpc.errors import UserError
from mc2_hpc.evaluation.images import Images

_ONE_CLASS = ("mean_per_class", "roc_auc", "macro_f1")
METRICS = ("accuracy", "mean_per_class", "mean_top1_top5", "roc_auc", "macro_f1", "worst_group")


@dataclass(frozen=True, kw_only=True)
class ClassTexts:
    """One language's classifier: its own classes, their names, and the sentence forms."""

    classes: Sequence[int]
    """Which of the set's classes the language names; images of other classes are not shown to it."""
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
    """Right classes of each image, mostly one; naming any of them is right."""
    languages: Mapping[str, ClassTexts]
    metric: str = "accuracy"
    """``accuracy`` (share of images), ``mean_per_class`` (mean over classes of each one's share), ``mean_top1_top5``
    (mean of both accuracies), ``roc_auc`` (of two classes, by how much closer the second one is), ``macro_f1`` (mean of
    the F1 scores of the classes that have an image), or ``worst_group`` (accuracy in the worst of ``groups``)."""
    groups: Sequence[int] = ()
    """For ``worst_group``: what each image belongs to, such as its region."""
    skipped: Mapping[str, int] = field(default_factory=dict)
    """What the reader left out, by reason."""
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
    """Texts of one language, and the image that each describes."""

    texts: Sequence[str]
    images: Sequence[int]

    def __post_init__(self) -> None:
        if len(self.texts) != len(self.images) or not self.texts:
            raise UserError(
                f"{len(self.texts)} captions of {len(self.images)} images: needs one per text, and at least one"
            )


@dataclass(frozen=True, kw_only=True)
class Retrieval:
    """Images and their captions in one or more languages; each language is searched by itself."""

    images: Images
    languages: Mapping[str, Captions]
    pooled: bool = False
    """Whether the set's own number is of all captions at once, as the group ``all``, rather than the mean over the
    languages. Then captions of no known language, under ``""``, are among ``all`` too."""
    skipped: Mapping[str, int] = field(default_factory=dict)
    lacking: Mapping[str, str] = field(default_factory=dict)
    """Languages that are not whole, and why, a word that they are counted under."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """An image and the texts to choose from."""

    image: int
    options: Sequence[str]
    answer: int
    """Index of the right option."""
    group: str
    """What the report counts it under, such as ``Spanish, Argentina``."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Multiple choice: the option whose text is closest to the image is the answer."""

    images: Images
    variants: Mapping[str, Sequence[Question]]
    """Wordings of the same questions, such as ``LOCAL`` and ``EN``."""
    skipped: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Places:
    """Images of known places, for few-shot geo-localisation."""

    images: Images
    places: Mapping[str, Sequence[str]]
    """By kind (``country``, ``region``), the place of each image."""
    train: Sequence[int]
    test: Sequence[int]
    skipped: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Round:
    """A cue, and images of which some go with it."""

    cue: str
    candidates: Sequence[int]
    associated: Sequence[int]
    """Those of the candidates that go with the cue."""


@dataclass(frozen=True, kw_only=True)
class Association:
    """Of each round's candidates, as many as are right are picked: those closest to the cue."""

    images: Images
    rounds: Sequence[Round]
    skipped: Mapping[str, int] = field(default_factory=dict)


Task = Classification | Retrieval | Choice | Places | Association
