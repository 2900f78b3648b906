"""``provenance.json``: what a model was trained on and how, as far as the files around it say.

It is collected from a run when a checkpoint is converted, stays with the model through further conversions, and is what
the model card (:mod:`mc2_hpc.conversion.model_card`) is made from. It has no paths: folders are meant to be published.
"""

import logging
from pathlib import Path
from typing import Any

import msgspec

from mc2_hpc.balancing.folder import REPORT
from mc2_hpc.errors import UserError
from mc2_hpc.reading.files import read_bytes
from mc2_hpc.reading.json_file import Count, File, Foreign, Sha256, parse_json, read_json
from mc2_hpc.storage import file_sha256, write_json

logger = logging.getLogger(__name__)

PROVENANCE_FILE = "provenance.json"
_MOST_BYTES = 1 << 30
"""Of ``evaluations.jsonl``."""
_TOLD = ("steps", "global_batch", "precision", "seed", "freeze", "optim", "loss")
"""Settings of a run that are recorded; the others are paths, sizes that the model's config has, or matters of speed."""


class Shards(File):
    """The training shards."""

    count: Count
    sha256: Sha256
    """Of their names, one per line."""


class Score(File):
    """One number of an evaluation."""

    set: str
    metric: str
    value: float
    """A share, of at most 1."""


class Provenance(File, omit_defaults=True):
    """``provenance.json``."""

    step: Count | None = None
    samples_seen: Count | None = None
    """Pairs."""
    initial: str | None = None
    """Name of the folder in ``model.init_from``."""
    shards: Shards | None = None
    metadata: dict[str, Sha256] = {}
    """SHA-256 of the metadata of each language."""
    balance: Sha256 | None = None
    """SHA-256 of ``balance.json``."""
    t_en: Count | None = None
    """English's balancing threshold."""
    config: dict[str, Any] = {}
    versions: dict[str, str] = {}
    scores: list[Score] = []
    merged: list[str] = []
    """How it was merged from other models, a line for each."""


class _Trainer(Foreign):
    """The fields of ``trainer.json`` that are told."""

    step: Count
    samples_seen: Count
    config: dict[str, Any]
    shards: Shards | None = None
    versions: dict[str, str] = {}


class _Sources(Foreign):
    metadata: dict[str, Sha256]


class _Balance(Foreign):
    """``balance.json``."""

    t_en: Count
    sources: _Sources


class _Sample(Foreign):
    balance: Sha256


class _Matched(Foreign):
    metadata: dict[str, Sha256]
    sample: _Sample | None = None


class _Pack(Foreign):
    """``pack.json`` of curated shards."""

    matched: _Matched


class _Set(Foreign):
    mean: dict[str, float] = {}


class _Results(Foreign):
    """``results.json`` of ``mc2 eval``; a row of ``evaluations.jsonl`` also has the step."""

    sets: dict[str, _Set]
    step: Count | None = None


def write_provenance(folder: Path, found: Provenance) -> None:
    """Write ``provenance.json`` into ``folder``."""
    write_json(folder / PROVENANCE_FILE, msgspec.to_builtins(found))


def find_provenance(folder: Path, *, ema: bool = False) -> Provenance:
    """What is known about the model in a checkpoint folder of ours or an exported folder.

    What cannot be read is left out with a warning, because the model itself is complete without it.

    Args:
        ema: whether the model is the moving average of the checkpoint's weights, which has scores of its own.
    """
    try:
        if (folder / "trainer.json").is_file():
            return _of_run(folder, ema)
        if (folder / PROVENANCE_FILE).is_file():
            return read_json(folder / PROVENANCE_FILE, Provenance)
    except UserError as error:
        _leave_out(error)
    return Provenance()


def read_scores(path: Path) -> list[Score]:
    """The numbers of a ``results.json`` of ``mc2 eval``, means over languages.

    Raises:
        UserError: it is missing or of another form.
    """
    return _scores(read_json(path, _Results, what="results.json of `mc2 eval`", most=_MOST_BYTES))


def _leave_out(error: UserError) -> None:
    logger.warning("left out of the model card: %s", error)


def _of_run(checkpoint: Path, ema: bool) -> Provenance:
    trainer = read_json(checkpoint / "trainer.json", _Trainer, cure="the checkpoint is damaged")
    model, data = (_section(trainer.config, name) for name in ("model", "data"))
    initial = model.get("init_from")
    evaluated_ema = bool(_section(trainer.config, "eval").get("ema"))
    found = Provenance(
        step=trainer.step,
        samples_seen=trainer.samples_seen,
        initial=Path(initial).name if isinstance(initial, str) else None,
        shards=trainer.shards,
        config={name: trainer.config[name] for name in _TOLD if name in trainer.config},
        versions=trainer.versions,
        scores=_evaluated(checkpoint, trainer.step) if evaluated_ema == ema else [],
    )
    try:
        return _with_curation(found, data)
    except UserError as error:
        _leave_out(error)
        return found


def _section(config: dict[str, Any], name: str) -> dict[str, Any]:
    found = config.get(name)
    return found if isinstance(found, dict) else {}


def _with_curation(found: Provenance, data: dict[str, Any]) -> Provenance:
    """With the hashes of metadata and balance, if their folders are on this machine."""
    balance, train = data.get("balance"), data.get("train")
    if isinstance(balance, str) and (Path(balance) / REPORT).is_file():
        path = Path(balance) / REPORT
        report = read_json(path, _Balance)
        hashes = {"metadata": report.sources.metadata, "balance": file_sha256(path), "t_en": report.t_en}
        return msgspec.structs.replace(found, **hashes)
    for place in [train] if isinstance(train, str) else train if isinstance(train, list) else []:
        path = Path(str(place)) / "pack.json"
        if path.is_file():
            matched = read_json(path, _Pack).matched
            sampled = matched.sample.balance if matched.sample is not None else None
            return msgspec.structs.replace(found, metadata=matched.metadata, balance=sampled)
    return found


def _evaluated(checkpoint: Path, step: int) -> list[Score]:
    """The run's own evaluation of a checkpoint; none if the run has no row for its step."""
    path = checkpoint.parent.parent / "evaluations.jsonl"
    if checkpoint.parent.name != "checkpoints" or not path.is_file():
        return []
    try:
        lines = read_bytes(path, most=_MOST_BYTES).splitlines()
    except UserError as error:
        _leave_out(error)
        return []
    unreadable = None
    for number, line in reversed(list(enumerate(lines, 1))):
        try:
            row = parse_json(line, _Results, f"{path}, line {number}")
        except UserError as error:  # such as the torn last line of a killed run
            unreadable = error
            continue
        if row.step == step:
            return _scores(row)
    if unreadable is not None:
        _leave_out(unreadable)
    return []


def _scores(results: _Results) -> list[Score]:
    return [
        Score(set=name, metric=metric, value=value)
        for name, entry in results.sets.items()
        for metric, value in entry.mean.items()
    ]
