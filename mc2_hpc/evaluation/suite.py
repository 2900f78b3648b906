"""Suites: a YAML file names evaluation sets and where they lie; one call scores a checkpoint on all of them.

    root: /data/eval
    sets:
      xm3600: {reader: xm3600, path: xm3600}

A set that is missing or broken does not stop the others: its error stands in the results in place of numbers.
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

from mc2_hpc.config import read_yaml, typed
from mc2_hpc.distributed import first_error
from mc2_hpc.errors import UserError
from mc2_hpc.evaluation.encoder import Encoder, PictureFeatures
from mc2_hpc.evaluation.gradients import gradient_cosines
from mc2_hpc.evaluation.scoring import Scores, score
from mc2_hpc.evaluation.sets import READERS
from mc2_hpc.evaluation.tasks import Classification, Retrieval, Task
from mc2_hpc.reading.settings import typed_arguments
from mc2_hpc.reading.yaml_file import Section

logger = logging.getLogger(__name__)

Report = Callable[[str, int, int, str], None]
"""Called with (set, pictures done, pictures in all, "")."""


@dataclass(frozen=True, kw_only=True)
class SetConfig:
    """One evaluation set of a suite."""

    reader: str
    """A name from ``mc2_hpc.evaluation.sets.READERS``."""
    path: str
    """Where it lies; relative to the suite's ``root``."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the reader."""
    languages: list[str] = field(default_factory=list)
    """Those to score; empty scores all that the set has."""
    gradient_pairs: int = 0
    """Retrieval sets: pairs a language whose loss's gradient is compared with English's (``gradients``); 0 compares
    none."""

    def __post_init__(self) -> None:
        if self.gradient_pairs < 0 or self.gradient_pairs == 1:
            raise UserError(f"gradient_pairs={self.gradient_pairs}: must be 0, or 2 at least")


@dataclass(frozen=True, kw_only=True)
class Suite:
    """What a suite file says."""

    root: str = "."
    sets: dict[str, SetConfig] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class _SetInFile(SetConfig):
    """With the options as they were written: their types are those of the reader's arguments."""

    options: Section = Section({}, "")  # type: ignore[assignment]


@dataclass(frozen=True, kw_only=True)
class _SuiteFile:
    root: str = "."
    sets: dict[str, _SetInFile] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class SetResult:
    """What became of one set: scores, or why there are none."""

    name: str
    config: SetConfig
    task: Task | None = None
    pictures: PictureFeatures | None = None
    scores: Scores | None = None
    error: str = ""
    seconds: float = 0.0


def load_suite(path: str | Path, overrides: list[str] | None = None) -> Suite:
    """Read a suite file and apply ``key.sub=value`` overrides.

    Raises:
        UserError: no such file, not YAML, an unknown key, reader or option, or no set at all.
    """
    found = typed(_SuiteFile, read_yaml(path, "suite file"), overrides or (), source=str(path))
    if not found.sets:
        raise UserError(f"{path}: no sets in it")
    return Suite(root=found.root, sets={name: _checked(path, name, of) for name, of in found.sets.items()})


def _checked(path: str | Path, name: str, config: "_SetInFile") -> SetConfig:
    where = f"{path}: sets.{name}"
    if config.reader not in READERS:
        raise UserError(f"{where}: unknown reader {config.reader!r}; choose one of {', '.join(READERS)}")
    parameters = list(inspect.signature(READERS[config.reader].read).parameters.values())[1:]
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
    options = typed_arguments(READERS[config.reader].read, given, within=f"sets.{name}.options.")
    return SetConfig(**{**vars(config), "options": options})


def run_suite(suite: Suite, encoder: Encoder, progress: Report | None = None) -> list[SetResult]:
    """Score every set of the suite. Collective."""
    return [_run_set(name, config, Path(suite.root), encoder, progress) for name, config in suite.sets.items()]


def _run_set(name: str, config: SetConfig, root: Path, encoder: Encoder, progress: Report | None) -> SetResult:
    start = time.perf_counter()
    try:
        task = _read(config, root)

        def report(done: int, total: int) -> None:
            if progress is not None:
                progress(name, done, total, "")

        pictures = encoder.pictures(task.pictures, report)
        scores = score(task, pictures, encoder)
        if config.gradient_pairs:
            scores = _with_gradients(scores, task, pictures, encoder, config.gradient_pairs)
    except UserError as error:
        logger.warning("%s: %s", name, error)
        return SetResult(name=name, config=config, error=str(error))
    seconds = time.perf_counter() - start
    return SetResult(name=name, config=config, task=task, pictures=pictures, scores=scores, seconds=seconds)


def _with_gradients(scores: Scores, task: Task, pictures: PictureFeatures, encoder: Encoder, pairs: int) -> Scores:
    if not isinstance(task, Retrieval):
        raise UserError("gradient_pairs: only sets of pictures with captions have pairs")
    found = gradient_cosines(task, pictures, encoder, pairs=pairs)
    return dataclasses.replace(
        scores, embedding={lang: {**scores.embedding.get(lang, {}), **found.get(lang, {})} for lang in task.languages}
    )


def _read(config: SetConfig, root: Path) -> Task:
    """The set's task, or on every rank the error of the first one that cannot read it. Collective."""
    task, error = None, None
    try:
        task = _only(READERS[config.reader].read(root / config.path, **config.options), config.languages)
    except UserError as failure:
        error = failure
    except OSError as failure:  # such as a file that may not be read: the other sets need not go without for it
        error = UserError(str(failure))
    first_error(error)
    assert task is not None
    return task


def _only(task: Task, languages: list[str]) -> Task:
    """The task in these languages alone."""
    if not languages:
        return task
    if not isinstance(task, Classification | Retrieval):
        raise UserError("languages: only sets that are scored by language can be limited to some")
    missing = [lang for lang in languages if lang not in task.languages]
    if missing:
        raise UserError(f"no language {missing[0]!r} in the set; it has {', '.join(task.languages)}")
    return dataclasses.replace(task, languages={lang: task.languages[lang] for lang in languages})  # type: ignore[arg-type]


def to_json(results: list[SetResult]) -> dict[str, Mapping[str, Any]]:
    """Every number with its protocol, the set's hash and what it is of; or the error."""
    return {result.name: _set_json(result) for result in results}


def _set_json(result: SetResult) -> dict[str, Any]:
    reader = {"reader": result.config.reader, "protocol": READERS[result.config.reader].protocol}
    if result.task is None or result.scores is None:
        return {**reader, "error": result.error}
    return {
        **reader,
        "set": result.task.pictures.fingerprint(),
        "pictures": len(result.task.pictures),
        "mean": dict(result.scores.mean),
        "groups": {group: dict(numbers) for group, numbers in result.scores.groups.items()},
        "n": dict(result.scores.counts),
        "embedding": {lang: dict(numbers) for lang, numbers in result.scores.embedding.items()},
        "embedding_mean": embedding_mean(result.scores),
        "skipped": dict(result.scores.skipped),
        "seconds": result.seconds,
    }


def embedding_mean(scores: Scores) -> dict[str, float]:
    """The mean of each number of ``scores.embedding`` over the languages that have it."""
    values: dict[str, list[float]] = {}
    for numbers in scores.embedding.values():
        for metric, value in numbers.items():
            values.setdefault(metric, []).append(value)
    return {metric: fmean(found) for metric, found in values.items()}
