"""``provenance.json``: what a model was trained on and how, as far as the files around it say.

It is collected from a run when a checkpoint is converted, stays with the model through further conversions, and is what
the model card (:mod:`mc2_hpc.conversion.model_card`) is made from. It has no paths: folders are meant to be published.
"""

import logging
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from mc2_hpc.balancing.folder import REPORT
from mc2_hpc.errors import UserError
from mc2_hpc.reading.files import read_bytes, shown
from mc2_hpc.reading.json_file import Count, File, Foreign, Sha256, Size, parse_json, read_json
from mc2_hpc.storage import file_sha256, write_json

logger = logging.getLogger(__name__)

PROVENANCE_FILE = "provenance.json"
_MOST_BYTES = 1 << 30
"""Of ``evaluations.jsonl``."""
_TOLD = ("steps", "stages", "global_batch", "precision", "seed", "freeze", "lora", "optim", "loss")
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


class Curation(File, kw_only=True, omit_defaults=True):
    """How captions were chosen."""

    metadata: dict[str, Sha256] = {}
    """SHA-256 of the metadata of each language."""
    balance: Sha256 | None = None
    """SHA-256 of ``balance.json``."""
    t_en: Count | None = None
    """English's balancing threshold."""


class Source(Curation, kw_only=True, omit_defaults=True):
    """One of several pools of shards that a run was trained on."""

    name: str
    """Its own in a mix; otherwise its folder's."""
    weight: float | None = None
    """How often it was drawn in a mix, relative to the others."""
    captions: dict[str, float] = {}
    """Probability of each caption field, if the mix chose among them."""
    shards: Shards | None = None


class Teacher(File, kw_only=True, omit_defaults=True):
    """A model from which the run distilled."""

    name: str
    """Of its folder, or of that of its features."""
    settings: dict[str, Any] = {}
    """The other settings of the section ``distill``."""


class Provenance(Curation, kw_only=True, omit_defaults=True):
    """``provenance.json``."""

    step: Count | None = None
    samples_seen: Count | None = None
    """Pairs."""
    initial: str | None = None
    """Name of the folder in ``model.init_from``."""
    teacher: Teacher | None = None
    ema: bool = False
    """Whether the weights are the moving average of the run's."""
    trained_size: Size | None = None
    """Side in pixels of the images in training, if the model takes others now."""
    shards: Shards | None = None
    """Of a run that was not trained on a mix."""
    sources: list[Source] = []
    """Of a mix, or of folders that were curated in different ways."""
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
    sources: dict[str, Shards] = {}
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
        if _is_there(folder / "trainer.json"):
            return _of_run(folder, ema)
        if _is_there(folder / PROVENANCE_FILE):
            return read_json(folder / PROVENANCE_FILE, Provenance)
    except UserError as error:
        _leave_out(error)
    return Provenance()


def read_scores(path: Path) -> list[Score]:
    """The numbers of a ``results.json`` of ``mc2 eval``, means over languages, in the order of their names.

    Raises:
        UserError: it is missing or of another form.
    """
    return _scores(read_json(path, _Results, what="results.json of `mc2 eval`", most=_MOST_BYTES))


def _leave_out(error: UserError) -> None:
    logger.warning("left out of the model card: %s", error)


def _of_run(checkpoint: Path, ema: bool) -> Provenance:
    trainer = read_json(checkpoint / "trainer.json", _Trainer, cure="the checkpoint is damaged")
    model, data, distill, evaluation = (_section(trainer.config, name) for name in ("model", "data", "distill", "eval"))
    evaluated_ema = bool(evaluation.get("ema"))
    found = Provenance(
        step=trainer.step,
        samples_seen=trainer.samples_seen,
        initial=_name(model.get("init_from")) or None,
        teacher=_teacher(distill) if distill else None,
        ema=ema,
        shards=trainer.shards,
        config={name: value for name in _TOLD if (value := trainer.config.get(name)) not in (None, [])},
        versions=trainer.versions,
        scores=_evaluated(checkpoint, trainer.step) if evaluated_ema == ema else [],
    )
    return _with_data(found, data, trainer.sources)


def _name(place: object) -> str:
    """The last part of a path or address, which may be published."""
    return Path(place).name if isinstance(place, str) else ""


def _teacher(distill: dict[str, Any]) -> Teacher:
    settings = {key: value for key, value in distill.items() if key not in ("teacher", "features")}
    return Teacher(name=_name(distill.get("teacher") or distill.get("features")), settings=settings)


def _section(config: dict[str, Any], name: str) -> dict[str, Any]:
    found = config.get(name)
    return found if isinstance(found, dict) else {}


def _with_data(found: Provenance, data: dict[str, Any], shards: dict[str, Shards]) -> Provenance:
    """With what is known about the data: of the whole, or of each source if there are several."""
    mix = [entry for entry in _listed(data.get("train")) if isinstance(entry, dict)]
    if mix or shards:
        by_name = {str(entry.get("name")): entry for entry in mix}
        sources = [
            source
            for name in dict.fromkeys([*by_name, *shards])
            for source in _of_mix(name, by_name.get(name, {}), shards.get(name))
        ]
        return msgspec.structs.replace(found, sources=sources)
    pools = _curations(data)
    if len(pools) == 1:
        (curation,) = pools.values()
        return msgspec.structs.replace(found, **_fields(curation))
    return msgspec.structs.replace(found, sources=[Source(name=name, **_fields(of)) for name, of in pools.items()])


def _listed(train: object) -> list[Any]:
    return train if isinstance(train, list) else [train]


def _of_mix(name: str, entry: dict[str, Any], shards: Shards | None) -> list[Source]:
    """A source of a mix, then its folders if they were curated in different ways."""
    weight, captions = entry.get("weight"), entry.get("captions")
    source = Source(
        name=name,
        weight=float(weight) if isinstance(weight, int | float) else None,
        captions=captions if isinstance(captions, dict) else {},
        shards=shards,
    )
    pools = _curations({"train": entry.get("path"), "balance": entry.get("balance")})
    if len(pools) == 1:
        (curation,) = pools.values()
        return [msgspec.structs.replace(source, **_fields(curation))]
    return [source, *(Source(name=f"{name}/{folder}", **_fields(of)) for folder, of in pools.items())]


def _fields(curation: Curation) -> dict[str, Any]:
    return {name: getattr(curation, name) for name in Curation.__struct_fields__}


def _curations(data: dict[str, Any]) -> dict[str, Curation]:
    """The different ways in which shards were curated, by the name of the first folder of each, if their folders are on
    this machine. Online balancing applies to all."""
    balance = data.get("balance")
    if isinstance(balance, str) and (curation := _read(Path(balance) / REPORT, _of_balance)) is not None:
        return {_name(balance): curation}
    found: dict[str, Curation] = {}
    for place in _listed(data.get("train")):
        curation = _read(Path(place) / "pack.json", _of_pack) if isinstance(place, str) and place else None
        if curation is not None and curation not in found.values():
            name = _name(place)
            found[name if name not in found else f"{name} ({len(found) + 1})"] = curation
    return found


def _of_balance(path: Path) -> Curation:
    report = read_json(path, _Balance)
    return Curation(metadata=report.sources.metadata, balance=file_sha256(path), t_en=report.t_en)


def _of_pack(path: Path) -> Curation:
    matched = read_json(path, _Pack).matched
    return Curation(metadata=matched.metadata, balance=matched.sample.balance if matched.sample is not None else None)


def _read(path: Path, of: Callable[[Path], Curation]) -> Curation | None:
    """None if it is not there; or if it cannot be read, with a warning."""
    try:
        return of(path) if _is_there(path) else None
    except UserError as error:
        _leave_out(error)
        return None


def _is_there(path: Path) -> bool:
    """Whether there is such a file.

    Raises:
        UserError: nobody can tell, as in a folder that may not be read.
    """
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise UserError(f"{shown(path)}: {getattr(error, 'strerror', None) or error}") from None


def _evaluated(checkpoint: Path, step: int) -> list[Score]:
    """The run's own evaluation of a checkpoint; none if the run has no row for its step."""
    path = checkpoint.parent.parent / "evaluations.jsonl"
    try:
        if checkpoint.parent.name != "checkpoints" or not _is_there(path):
            return []
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
        for name, entry in sorted(results.sets.items())
        for metric, value in sorted(entry.mean.items())
    ]
