"""Suites: a YAML file lists evaluation sets and their paths; one call scores a checkpoint on all of them.

    root: /data/eval
    sets:
      xm3600: {reader: xm3600, path: xm3600}

A missing or broken set does not stop the others: the results have its error instead of numbers.
"""

import dataclasses
import inspect
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from mc2_hpc.config import read_yaml, typed
from mc2_hpc.distributed import first_error
from mc2_hpc.errors import UserError
from mc2_hpc.evaluation.dual_encoders import RESIZES
from mc2_hpc.evaluation.encoder import Encoder, ImageFeatures
from mc2_hpc.evaluation.gradients import gradient_cosines
from mc2_hpc.evaluation.linear_probe import linear_probe
from mc2_hpc.evaluation.scoring import ALL, Scores, score
from mc2_hpc.evaluation.sets import reader_of
from mc2_hpc.evaluation.sets.files import shuffled
from mc2_hpc.evaluation.tasks import Classification, Retrieval, Task
from mc2_hpc.reading.settings import PathName, typed_arguments
from mc2_hpc.reading.yaml_file import Section

logger = logging.getLogger(__name__)

Report = Callable[[str, int, int, str], None]
"""Called with (set, images done, images in total, "")."""


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """The training images of a set's linear probe, read by the set's own reader."""

    path: str | None = None
    """Their path; null is the set's own path."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options that differ from the set's own, such as ``{split: train}``."""
    validation: float = 0.2
    """Share of them held out to choose the strength of the penalty."""

    def __post_init__(self) -> None:
        if self.path is None and not self.options:
            raise UserError("linear_probe: needs the path of the training images, or options such as {split: train}")
        if not 0 < self.validation < 1:
            raise UserError(f"linear_probe.validation={self.validation}: must be between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class SetConfig:
    """One evaluation set of a suite."""

    reader: str
    """A name from ``mc2_hpc.evaluation.sets.READERS``, or the dotted name of your own function."""
    path: PathName
    """Its path, relative to the suite's ``root``."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the reader."""
    languages: list[str] = field(default_factory=list)
    """Languages to score; empty scores all languages in the set."""
    gradient_pairs: int = 0
    """Retrieval sets: pairs per language for comparing its loss gradient with that of English (``gradients``); 0
    compares none."""
    linear_probe: ProbeConfig | None = None
    """Sets of classes: also train a classifier on these training images (``linear_probe``); null trains none."""

    def __post_init__(self) -> None:
        if self.gradient_pairs < 0 or self.gradient_pairs == 1:
            raise UserError(f"gradient_pairs={self.gradient_pairs}: must be 0, or at least 2")


@dataclass(frozen=True, kw_only=True)
class Suite:
    """The content of a suite file."""

    root: str = "."
    eval_resize: str | None = None
    """How images are fitted to the model's square input: ``shortest``, ``squash``, ``longest``; null: the model's own.
    """
    sets: dict[str, SetConfig] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.eval_resize is not None and self.eval_resize not in RESIZES:
            raise UserError(f"eval_resize={self.eval_resize}: choose one of {', '.join(RESIZES)}")


@dataclass(frozen=True, kw_only=True)
class _ProbeInFile:
    """:class:`ProbeConfig` with the options as written."""

    path: str | None = None
    options: Section = Section({}, "")
    validation: float = 0.2


@dataclass(frozen=True, kw_only=True)
class _SetInFile(SetConfig):
    """With the options as written; their types are those of the reader's arguments."""

    options: Section = Section({}, "")  # type: ignore[assignment]
    linear_probe: _ProbeInFile | None = None  # type: ignore[assignment]


@dataclass(frozen=True, kw_only=True)
class _SuiteFile:
    root: PathName = "."
    eval_resize: str | None = None
    sets: dict[str, _SetInFile] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class SetResult:
    """The result of one set: its scores, or why there are none."""

    name: str
    config: SetConfig
    task: Task | None = None
    images: ImageFeatures | None = None
    scores: Scores | None = None
    probe: Mapping[str, float] = field(default_factory=dict)
    """How the linear probe was chosen."""
    error: str = ""
    seconds: float = 0.0


def load_suite(path: str | Path, overrides: list[str] | None = None) -> Suite:
    """Read a suite file and apply ``key.sub=value`` overrides.

    Raises:
        UserError: no such file, not YAML, an unknown key, reader or option, or no sets.
    """
    found = typed(_SuiteFile, read_yaml(path, "suite file"), overrides or (), source=str(path))
    if not found.sets:
        raise UserError(f"{path}: no sets in it")
    return _suite(found, str(path))


def shards_suite(path: str, overrides: list[str] | None = None) -> Suite:
    """The suite with the single set ``shards`` that ``mc2 eval --shards`` stands for.

    Raises:
        UserError: an unknown key.
    """
    values = {"sets": {"shards": {"reader": "shards", "path": path}}}
    return _suite(typed(_SuiteFile, values, overrides or (), source="--shards"), "--shards")


def _suite(found: "_SuiteFile", source: str) -> Suite:
    sets = {name: _checked(source, name, config) for name, config in found.sets.items()}
    return Suite(root=found.root, eval_resize=found.eval_resize, sets=sets)


def _checked(source: str, name: str, config: "_SetInFile") -> SetConfig:
    where = f"{source}: sets.{name}"
    try:
        reader = reader_of(config.reader)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    read = reader.read
    if _is_address(config.path) and not reader.addresses:
        raise UserError(f"{where}.path: {config.reader} reads files on this machine; {config.path} is an address")
    parameters = list(inspect.signature(read).parameters.values())[1:]
    known = {parameter.name for parameter in parameters}
    unknown = sorted(set(config.options.entries) - known)
    if unknown:
        raise UserError(
            f"{where}: {config.reader} has no option {unknown[0]!r}; it has {', '.join(sorted(known)) or 'none'}"
        )
    given = config.options.entries
    needed = [p.name for p in parameters if p.default is inspect.Parameter.empty and p.name not in given]
    if needed:
        raise UserError(f"{where}: {config.reader} needs the option {needed[0]!r}")
    values = {**vars(config), "options": typed_arguments(read, given, within=f"sets.{name}.options.")}
    if config.linear_probe is not None:
        within = f"sets.{name}.linear_probe.options."
        of_probe = typed_arguments(read, config.linear_probe.options.entries, within=within)
        values["linear_probe"] = ProbeConfig(**{**vars(config.linear_probe), "options": of_probe})
    return SetConfig(**values)


def run_suite(suite: Suite, encoder: Encoder, progress: Report | None = None) -> list[SetResult]:
    """Score every set of the suite. Collective."""
    return [_run_set(name, config, Path(suite.root), encoder, progress) for name, config in suite.sets.items()]


def _run_set(name: str, config: SetConfig, root: Path, encoder: Encoder, progress: Report | None) -> SetResult:
    start = time.perf_counter()

    def report(done: int, total: int) -> None:
        if progress is not None:
            progress(name, done, total, "")

    probe: Mapping[str, float] = {}
    try:
        task = _read(config, root)
        images = encoder.images(task.images, report)
        scores = score(task, images, encoder)
        if config.gradient_pairs:
            scores = _with_gradients(scores, task, images, encoder, config.gradient_pairs)
        if config.linear_probe is not None:
            train = _read(_training_part(config, config.linear_probe), root)
            features = encoder.images(train.images, report)
            scores, probe = _with_probe(scores, (task, images), (train, features), config.linear_probe.validation)
    except UserError as error:
        logger.warning("%s: %s", name, error)
        return SetResult(name=name, config=config, error=str(error))
    seconds = time.perf_counter() - start
    return SetResult(name=name, config=config, task=task, images=images, scores=scores, probe=probe, seconds=seconds)


def _training_part(config: SetConfig, probe: ProbeConfig) -> SetConfig:
    path = config.path if probe.path is None else probe.path
    return SetConfig(reader=config.reader, path=path, options={**config.options, **probe.options})


def _with_probe(
    scores: Scores,
    test: tuple[Task, ImageFeatures],
    train: tuple[Task, ImageFeatures],
    validation: float,
) -> tuple[Scores, dict[str, float]]:
    """The scores including the probe's, and how the probe was chosen."""
    task = train[0]
    names = [task.images.name(index) for index in range(len(task.images))]
    held = torch.zeros(len(names), dtype=torch.bool)
    held[torch.from_numpy(shuffled(names)[: round(validation * len(names))])] = True
    usable, shown = train[1].usable, test[1].usable
    labels = _one_class(task)[usable]
    probe = linear_probe(train[1].features[usable], labels, held[usable], test[1].features[shown])
    numbers = probe.numbers(_one_class(test[0])[shown])
    found = dataclasses.replace(scores, mean={**scores.mean, **numbers})
    return found, {"C": probe.strength, "validation_top1": probe.validation_top1, "training_images": len(labels)}


def _one_class(task: Task) -> Tensor:
    """int64 (N,): the class of each image."""
    if not isinstance(task, Classification) or any(len(classes) != 1 for classes in task.labels):
        raise UserError("linear_probe: needs a set with one class per image")
    return torch.tensor([label for (label,) in task.labels])


def _with_gradients(scores: Scores, task: Task, images: ImageFeatures, encoder: Encoder, pairs: int) -> Scores:
    if not isinstance(task, Retrieval):
        raise UserError("gradient_pairs: needs a set of images with captions")
    found = gradient_cosines(task, images, encoder, pairs=pairs)
    named = [lang for lang in task.languages if lang]  # shards may have captions in no known language
    embedding = {lang: {**scores.embedding.get(lang, {}), **found.get(lang, {})} for lang in named}
    return dataclasses.replace(scores, embedding=embedding)


def _read(config: SetConfig, root: Path) -> Task:
    """The set's task, or on every rank the error of the first one that cannot read it. Collective."""
    task, error = None, None
    try:
        task = _only(reader_of(config.reader).read(_place(root, config.path), **config.options), config.languages)
        if not len(task.images):
            raise UserError(f"{config.path}: no images in it")
    except UserError as failure:
        error = failure
    except OSError as failure:  # such as an unreadable file: the other sets are still scored
        error = UserError(str(failure))
    first_error(error)
    assert task is not None
    return task


def _place(root: Path, path: str) -> Path | str:
    """The set's path below the root. An address stays text, because a ``Path`` would turn ``//`` into ``/``."""
    return path if _is_address(path) else root / path


def _is_address(path: str) -> bool:
    return "://" in path


def _only(task: Task, languages: list[str]) -> Task:
    """The task in only these languages."""
    if not languages:
        return task
    if not isinstance(task, Classification | Retrieval):
        raise UserError("languages: only sets that are scored by language can be limited to some")
    # Ignore case: Babel-ImageNet's own file has EN, but its reader, like other sets, has en.
    known = {lang.lower(): lang for lang in (*task.lacking, *task.languages)}
    missing = [lang for lang in languages if lang.lower() not in known]
    if missing:
        raise UserError(f"no language {missing[0]!r} in the set; it has {', '.join(task.languages)}")
    wanted = [known[lang.lower()] for lang in languages]
    found = {lang: task.languages[lang] for lang in wanted if lang in task.languages}
    if not found:
        raise UserError(f"languages: none of {', '.join(wanted)} can be scored ({task.lacking[wanted[0]]})")
    lacking = {lang: reason for lang, reason in task.lacking.items() if lang in wanted}
    return dataclasses.replace(task, languages=found, lacking=lacking)  # type: ignore[arg-type]


def to_json(results: list[SetResult]) -> dict[str, Mapping[str, Any]]:
    """Every number with its protocol, the set's hash and what it covers; or the error."""
    return {result.name: _set_json(result) for result in results}


def _set_json(result: SetResult) -> dict[str, Any]:
    reader = {"reader": result.config.reader, "protocol": reader_of(result.config.reader).protocol}
    if result.task is None or result.scores is None:
        return {**reader, "error": result.error}
    scores = result.scores
    found = {
        **reader,
        "set": result.task.images.fingerprint(),
        "images": len(result.task.images),
        "mean": dict(scores.mean),
        "chance": {metric: scores.chance[metric] for metric in scores.mean if metric in scores.chance},
        "spread": spread(scores),
        "groups": {group: dict(numbers) for group, numbers in scores.groups.items()},
        "n": dict(scores.counts),
        "embedding": {lang: dict(numbers) for lang, numbers in scores.embedding.items()},
        "embedding_mean": embedding_mean(scores),
        "skipped": dict(scores.skipped),
        "seconds": result.seconds,
    }
    return {**found, "linear_probe": dict(result.probe)} if result.probe else found


def spread(scores: Scores) -> dict[str, dict[str, float | str]]:
    """Metric -> its lowest and highest value over languages or other groups, and which groups have them."""
    groups = {group: numbers for group, numbers in scores.groups.items() if group != ALL}
    found: dict[str, dict[str, float | str]] = {}
    for metric in scores.mean:
        values = {group: numbers[metric] for group, numbers in groups.items() if metric in numbers}
        if len(values) > 1:
            low, high = min(values, key=values.__getitem__), max(values, key=values.__getitem__)
            found[metric] = {"lowest": values[low], "of": low, "highest": values[high], "and_of": high}
    return found


def embedding_mean(scores: Scores) -> dict[str, float]:
    """The mean of each number of ``scores.embedding`` over the languages that have it."""
    values: dict[str, list[float]] = {}
    for numbers in scores.embedding.values():
        for metric, value in numbers.items():
            values.setdefault(metric, []).append(value)
    return {metric: fmean(found) for metric, found in values.items()}
