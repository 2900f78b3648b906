"""Filters applied to the rows of a shard: every row is kept, or dropped by one filter for one reason."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mc2_hpc.curation.filtering.images import PoolImage, ScoreFilter
from mc2_hpc.curation.filtering.verdicts import KEPT, NO_FILTER, Verdicts
from mc2_hpc.curation.filters import ask, complete, load_filter, sees_images, sources_of
from mc2_hpc.curation.pool.captions import BATCH_ROWS
from mc2_hpc.drops import Dropped
from mc2_hpc.errors import UserError
from mc2_hpc.jobs.named import Named, describe, to_plain

_SCORE_NAME = re.compile(r"[a-z][a-z0-9_]{0,49}")


class OpenFilter(NamedTuple):
    """A filter that is ready to use."""

    named: Named
    filter: Any
    sees_images: bool

    @property
    def name(self) -> str:
        """Of its class, with the package."""
        return self.named.name

    @property
    def score(self) -> str | None:
        """The name of its score; None if it has none."""
        return self.filter.name if isinstance(self.filter, ScoreFilter) else None

    @property
    def reads_pixels(self) -> bool:
        """Whether images must be decodable."""
        return self.sees_images and getattr(self.filter, "reads_pixels", True)

    def settings(self) -> dict[str, Any]:
        """What decides its verdicts, for the record: name, all options, and digests of files."""
        return {
            **to_plain(complete(self.named, self.filter)),
            "sources": sources_of(f"--filter {self.name}", self.filter),
        }


def open_filters(filters: Iterable[Named]) -> list[OpenFilter]:
    """Instances of the filters, in order.

    Raises:
        UserError: one cannot be loaded, has limits but no usable name for its score, or has another one's name.
    """
    found: list[OpenFilter] = []
    for named in filters:
        one = load_filter(named, images=True)
        if callable(getattr(one, "scores", None)) and not isinstance(one, ScoreFilter):
            base = f"{ScoreFilter.__module__}.{ScoreFilter.__qualname__}"
            raise UserError(f"--filter {named.name}: a filter with scores(rows, images) must derive from {base}")
        opened = OpenFilter(named, one, sees_images(type(one)))
        if opened.score is not None:
            if not _SCORE_NAME.fullmatch(opened.score):
                raise UserError(f"--filter {named.name}: its name {opened.score!r} must be like clip_score")
            if opened.score in (other.score for other in found):
                raise UserError(f"--filter {named.name}: another filter has the name {opened.score} too; rename one")
        found.append(opened)
    return found


class Judge:
    """Applies filters to the rows of one shard.

    Args:
        rows: ``key``, ``text``, ``lang`` (may be null) and perhaps ``source``, sorted by key.
    """

    def __init__(self, filters: Sequence[OpenFilter], rows: pa.Table) -> None:
        self._filters = filters
        self._rows = rows.set_column(rows.column_names.index("lang"), "lang", rows["lang"].fill_null(""))
        self.verdicts = Verdicts(len(rows), [one.score for one in filters if one.score is not None])
        keys = rows["key"].combine_chunks()
        encoded = keys.dictionary_encode()
        self.keys: list[str] = encoded.dictionary.to_pylist()
        """Distinct, in the order of their rows."""
        self._starts = np.searchsorted(np.asarray(encoded.indices), np.arange(len(self.keys) + 1))
        self._number = {key: number for number, key in enumerate(self.keys)}
        first_of_images = next((n for n, one in enumerate(filters) if one.sees_images), len(filters))
        self._first, self._rest = range(first_of_images), range(first_of_images, len(filters))

    def drop(self, key: str, reason: str) -> None:
        """Drop what is left of a key's rows, for a reason that no filter gave."""
        self.verdicts.drop(self._kept(self._rows_of(key)), NO_FILTER, reason)

    def keeps(self, key: str) -> bool:
        """Whether a row of the key is still kept."""
        return len(self._kept(self._rows_of(key))) > 0

    def last_reason(self, key: str) -> str:
        """Why a key without kept rows lost the last of them: the reason of the latest filter."""
        return self.verdicts.last_reason(self._rows_of(key))

    def change(self, key: str) -> str | None:
        """How the key's image was changed; None if it was not."""
        return self.verdicts.changes[self._rows_of(key)[0]]

    def judge_captions(self) -> None:
        """Apply the filters before the first one that sees images."""
        for number in self._first:
            for start in range(0, len(self._rows), BATCH_ROWS):
                self._apply(number, self._kept(np.arange(start, min(start + BATCH_ROWS, len(self._rows)))), None)

    def judge_images(self, images: Sequence[PoolImage]) -> None:
        """Apply the other filters to the rows of these images."""
        by_row = {row: image for image in images for row in self._rows_of(image.key).tolist()}
        rows = np.array(sorted(by_row), np.int64)
        are_decoded = False
        for number in self._rest:
            if self._filters[number].reads_pixels and not are_decoded:
                self._decode([image for image in images if self.keeps(image.key)])
                are_decoded = True
            self._apply(number, self._kept(rows), by_row)
        for image in images:
            if image.change is not None:
                self.verdicts.changes[self._rows_of(image.key)] = image.change

    def _decode(self, images: Iterable[PoolImage]) -> None:
        for image in images:
            try:
                _ = image.pixels
            except Dropped as dropped:
                self.drop(image.key, dropped.reason)

    def _apply(self, number: int, numbers: npt.NDArray[np.int64], images: dict[int, PoolImage] | None) -> None:
        """Apply a filter to rows by their numbers."""
        if len(numbers) == 0:
            return
        opened = self._filters[number]
        rows = self._rows.take(pa.array(numbers))
        shown = [[images[row] for row in numbers.tolist()]] if opened.sees_images and images is not None else []
        if opened.score is None:
            reasons = ask(opened.name, opened.filter, rows, *shown).to_pylist()
        else:
            scores = _scores(opened, rows, *shown)
            self.verdicts.scores[opened.score][numbers] = scores
            reasons = _outside(opened.filter, scores)
        by_reason: dict[str, list[int]] = {}
        for row, reason in zip(numbers.tolist(), reasons, strict=True):
            if reason is not None:
                by_reason.setdefault(reason, []).append(row)
        for reason, dropped in by_reason.items():
            self.verdicts.drop(np.array(dropped), number, reason)

    def _rows_of(self, key: str) -> npt.NDArray[np.int64]:
        """The numbers of a key's rows."""
        number = self._number[key]
        return np.arange(self._starts[number], self._starts[number + 1])

    def _kept(self, numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        return numbers[self.verdicts.reasons[numbers] == KEPT]


def _scores(opened: OpenFilter, rows: pa.Table, images: Sequence[PoolImage]) -> npt.NDArray[np.float64]:
    """The checked answer of a :class:`ScoreFilter`."""
    try:
        scores = np.asarray(opened.filter.scores(rows, images), np.float64)
    except UserError as error:
        raise UserError(f"filter {opened.name}: {error}") from None
    except Exception as error:  # whatever the filter does
        raise UserError(f"filter {opened.name}: scores raised {describe(error)}") from error
    if scores.shape != (len(rows),):
        raise UserError(
            f"filter {opened.name}: scores must return {len(rows)} numbers, one per row, not {scores.shape}"
        )
    if not np.isfinite(scores).all():
        key = rows["key"][int(np.flatnonzero(~np.isfinite(scores))[0])].as_py()
        raise UserError(f"filter {opened.name}: the score of {key!r} is not a finite number")
    return scores


def _outside(limits: ScoreFilter, scores: npt.NDArray[np.float64]) -> list[str | None]:
    """The reason of each score that is outside the limits."""
    low, high = f"{limits.name}_low", f"{limits.name}_high"
    least = -np.inf if limits.least is None else limits.least
    most = np.inf if limits.most is None else limits.most
    return [low if score < least else high if score > most else None for score in scores.tolist()]
