"""The sources that ``data.train`` may mix: where each is, how often it is drawn, and which of its captions are used.

data:
  train:
    - {name: alt, path: /data/alt, weight: 5, balance: /data/alt_balance}
    - {name: recaptioned, path: /data/more, weight: 2, captions: {txt: 0.85, json.synthetic: 0.15}}
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from mc2_hpc.errors import UserError
from mc2_hpc.reading.settings import PathName

TXT, JSON, PARQUET = "txt", "json", "parquet"
"""Where a caption may be: the ``.txt``, a key of the ``.json``, a column of the ``.parquet`` beside a curated tar."""

_NAME = re.compile(r"\w[\w.-]{0,99}")
_FIELD = re.compile(rf"{TXT}|{JSON}(?:\.[^.]+)+|{PARQUET}\.(?!(?:key|lang|entries)$).+")
_ROUNDING = 1e-6


@dataclass(frozen=True, kw_only=True)
class TrainSource:
    """One source of a mix."""

    name: str
    """Identifies it in checkpoints and metrics; with ``data.seed``, it also seeds the order of its samples."""
    path: str | list[str]
    """Its shards, in any form that ``data.train`` has for a single source."""
    weight: float = 1.0
    """How often it is drawn, relative to the weights of the other sources."""
    balance: PathName | None = None
    """Folder with ``balance.json`` to balance its curated shards online; null keeps all."""
    captions: dict[str, float] = field(default_factory=dict)
    """Probability of each caption field: ``txt``, ``json.<key>`` or ``parquet.<column>``; empty uses the captions of a
    single source."""

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise UserError(f"data.train: name {self.name[:100]!r}: use letters, digits and _ . - only, at most 100")
        where = f"data.train: source {self.name}"
        if not 0 < self.weight < math.inf:
            raise UserError(f"{where}: weight={self.weight}: must be above 0; leave out a source that is not wanted")
        _check_captions(where, self.captions)


def _check_captions(where: str, captions: Mapping[str, float]) -> None:
    for name, probability in captions.items():
        if not _FIELD.fullmatch(name):
            raise UserError(
                f"{where}: captions: {name[:100]!r} is not a caption field: write {TXT}, {JSON}.<key> or "
                f"{PARQUET}.<column>"
            )
        if not 0 < probability <= 1:
            raise UserError(f"{where}: captions: {name}={probability}: must be above 0 and at most 1")
    total = math.fsum(captions.values())
    if captions and abs(total - 1) > _ROUNDING:
        raise UserError(f"{where}: captions: the probabilities add up to {total:g}: they must add up to 1")


def check_mix(sources: Sequence[TrainSource]) -> None:
    """
    Raises:
        UserError: two sources have the same name.
    """
    names = [source.name for source in sources]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"data.train: two sources have the name {name!r}: give each its own")
