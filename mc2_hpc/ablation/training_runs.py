"""One training run of an ablation: its config, its two commands (train, evaluate), its numbers.

out/runs/<address>/settings.json, train.yaml    its settings and config
out/runs/<address>/train/                       output of ``mc2 train``
out/runs/<address>/eval-<address>/results.json  output of ``mc2 eval``; once it exists, the run is done
out/runs/<address>/train.log, eval.log
"""

import copy
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mc2_hpc.ablation.addresses import address, content
from mc2_hpc.ablation.prepare import Prepared, PreparedTokenizer
from mc2_hpc.ablation.settings import REDUCTIONS, Ablation, Column, Row
from mc2_hpc.config import config_from_dict, config_to_dict, yaml_text
from mc2_hpc.errors import UserError
from mc2_hpc.models.weights import is_checkpoint, resolve_checkpoint
from mc2_hpc.reading.json_file import Foreign, read_json
from mc2_hpc.storage import write_json, write_text

_EVAL_BATCH = 256


@dataclass(frozen=True)
class Command:
    """A command line and the log for its output."""

    words: list[str]
    log: Path


@dataclass(frozen=True, kw_only=True)
class TrainingRun:
    """A row with one seed."""

    title: str
    """For messages: ablation, row, seed; if several rows share the run, those of the last one."""
    folder: Path
    results: Path
    commands: list[Command]
    pairs: int
    """Pairs seen in training."""

    @property
    def done(self) -> bool:
        """Whether it is trained and evaluated."""
        return self.results.is_file()


def plan_run(
    ablation: Ablation, row: Row, seed: int, curated: Prepared, tokenizer: PreparedTokenizer, suite: str, out: Path
) -> TrainingRun:
    """The run of ``row`` with ``seed``; its config is checked and written.

    Args:
        suite: content address of the evaluation.

    Raises:
        UserError: the config is inconsistent.
    """
    values = config_to_dict(row.config)
    values["seed"] = values["data"]["seed"] = seed
    values["data"]["tokenizer_style"] = row.tokenizer.style
    values["model"]["text"] |= {"vocab_size": tokenizer.vocab_size, "eos_id": tokenizer.eos_id}
    # Paths do not affect the result, so the address leaves them out; a teacher's content does.
    decisive = copy.deepcopy(values)
    if row.config.distill is not None:
        if row.config.distill.features is not None:
            raise UserError(
                f"{ablation.name}: {row.name}: distill.features are of other shards than those that an ablation makes; "
                f"set distill.teacher"
            )
        decisive["distill"]["teacher"] = _model_content(Path(row.config.distill.teacher))
    del decisive["output"]
    for name in ("train", "balance", "tokenizer"):
        del decisive["data"][name]
    settings = {"curation": curated.address, "tokenizer": tokenizer.address, "config": decisive}
    folder = out / "runs" / address(**settings)
    values["output"] = str(folder / "train")
    values["data"] |= {
        "train": str(curated.path / "shards"),
        "balance": str(curated.path / "balance"),
        "tokenizer": str(tokenizer.path),
    }
    config = config_from_dict(values, f"{ablation.name}: {row.name}")
    title = f"{ablation.name}: {row.name}, seed {seed}"
    write_json(folder / "settings.json", {"title": title, **settings})
    write_text(folder / "train.yaml", yaml_text(values))
    scores = folder / f"eval-{suite}"
    mc2 = [sys.executable, "-m", "mc2_hpc.cli"]
    evaluation = ["--suite", str(ablation.suite), "--out", str(scores), "--batch", str(_EVAL_BATCH)]
    return TrainingRun(
        title=title,
        folder=folder,
        results=scores / "results.json",
        commands=[
            Command([*mc2, "train", str(folder / "train.yaml")], folder / "train.log"),
            Command([*mc2, "eval", str(folder / "train"), *evaluation], folder / "eval.log"),
        ],
        pairs=config.steps * config.global_batch,
    )


def _model_content(source: Path) -> str:
    """Digest of a model's folder; of a run's newest checkpoint alone."""
    return content(resolve_checkpoint(source) if is_checkpoint(source) else source)


class _Scores(Foreign):
    error: str | None = None
    groups: dict[str, dict[str, float]] = {}


class _Results(Foreign):
    """The fields of ``results.json`` that tables need."""

    sets: dict[str, _Scores]


def read_columns(run: TrainingRun, columns: Mapping[str, Column]) -> dict[str, float]:
    """The run's number in each column, in [0, 1].

    Raises:
        UserError: a set could not be scored, or has no such metric or language.
    """
    sets = read_json(run.results, _Results, cure="delete it to score the run again").sets
    return {name: _number(run, name, column, sets) for name, column in columns.items()}


def _number(run: TrainingRun, name: str, column: Column, sets: Mapping[str, _Scores]) -> float:
    where = f"{run.title}: column {name!r}"
    if column.set not in sets:
        raise UserError(f"{where}: {run.results} has no set {column.set!r}; delete it to score the run again")
    scores = sets[column.set]
    if scores.error is not None:
        raise UserError(f"{where}: {column.set} was not scored: {scores.error}; fix it and delete {run.results}")
    groups = scores.groups
    missing = [lang for lang in (*column.languages, *column.without) if lang not in groups]
    if missing:
        raise UserError(f"{where}: {column.set} has no language {missing[0]!r}; it has {', '.join(groups)}")
    chosen = [lang for lang in column.languages or groups if lang not in column.without]
    if not chosen:
        raise UserError(f"{where}: leaves out every language of {column.set}")
    unknown = [lang for lang in chosen if column.metric not in groups[lang]]
    if unknown:
        known = ", ".join(groups[unknown[0]])
        raise UserError(f"{where}: {column.set} has no metric {column.metric!r} in {unknown[0]!r}; it has {known}")
    return REDUCTIONS[column.reduce]([groups[lang][column.metric] for lang in chosen])
