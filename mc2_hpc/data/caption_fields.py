"""Caption fields: a sample with several captions, such as its alt text and a synthetic one, draws one by probability.

=====================  ===============================================================================================
field                  means
=====================  ===============================================================================================
``txt``                the ``.txt``
``json.<key>``         a key of the ``.json``, or ``json.<key>.<key>`` inside it: text, or a list of texts, of which one
                       is drawn
``parquet.<column>``   a column of the ``.parquet`` beside a curated tar; ``parquet.text`` is the caption that curation
                       matched and that balancing weighs
=====================  ===============================================================================================

The draw depends on (seed, epoch, key) alone. Where the drawn field is missing or unusable, another is drawn among the
rest, so every field keeps its probability relative to the others that a sample has.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from mc2_hpc.balancing.selection import choose_texts
from mc2_hpc.draws import uniform
from mc2_hpc.drops import Drop, Dropped
from mc2_hpc.samples import parse_record, usable_text, usable_texts
from mc2_hpc.train_sources import JSON, PARQUET


class CaptionFields:
    """The fields of a source, with their probabilities."""

    def __init__(self, probabilities: Mapping[str, float]) -> None:
        self._probabilities = dict(sorted(probabilities.items()))  # their order in the config means nothing

    @property
    def in_records(self) -> bool:
        """Whether some are in records."""
        return any(name.startswith(f"{JSON}.") for name in self._probabilities)

    @property
    def columns(self) -> list[str]:
        """Columns of the table beside a curated shard."""
        return [name.partition(".")[2] for name in self._probabilities if name.startswith(f"{PARQUET}.")]

    def draw(
        self, read: Callable[[str], Sequence[str]], key_hash: np.uint64, *, seed: int, epoch: int
    ) -> tuple[str, str]:
        """The drawn field of a sample, and its caption.

        Args:
            read: returns the texts of a field; raises Dropped if there are none.

        Raises:
            Dropped: no field has a usable caption; the reason is that of the field drawn first.
        """
        first_problem: Dropped | None = None
        for name in self._in_turn(key_hash, seed=seed, epoch=epoch):
            try:
                texts = read(name)
            except Dropped as problem:
                first_problem = first_problem or problem
                continue
            keys = np.repeat(key_hash, len(texts))
            return name, texts[0 if len(texts) == 1 else choose_texts(keys, texts, seed=seed, epoch=epoch)[0]]
        assert first_problem is not None
        raise first_problem

    def texts(self, read: Callable[[str], Sequence[str]]) -> list[str]:
        """All captions that :meth:`draw` may return; arguments and errors as there."""
        found: list[str] = []
        first_problem: Dropped | None = None
        for name in self._probabilities:
            try:
                found += read(name)
            except Dropped as problem:
                first_problem = first_problem or problem
        if not found and first_problem is not None:
            raise first_problem
        return found

    def _in_turn(self, key_hash: np.uint64, *, seed: int, epoch: int) -> Iterator[str]:
        """All fields, each drawn among the remaining ones."""
        remaining = dict(self._probabilities)
        for turn in range(len(remaining)):
            *others, last = remaining
            point = uniform(np.array([key_hash]), seed=seed, epoch=epoch, purpose=f"caption field {turn}")[0]
            point *= sum(remaining.values())
            for name in others:
                point -= remaining[name]
                if point < 0:
                    break
            else:
                name = last
            yield name
            del remaining[name]


class FieldReader:
    """The texts of one sample's fields; the record is parsed when it is first needed.

    Args:
        text, record: contents of the ``.txt`` and the ``.json``; None if missing.
        columns: the sample's values in the columns of the caption table.
    """

    def __init__(
        self, text: bytes | None, record: bytes | None, columns: Mapping[str, bytes | None] | None = None
    ) -> None:
        self._text = text
        self._raw = record
        self._columns = columns or {}
        self._record: Mapping[str, Any] | None = None

    def __call__(self, name: str) -> list[str]:
        """The texts of field ``name``. Raises Dropped."""
        kind, _, rest = name.partition(".")
        if kind == JSON:
            return self._in_record(rest.split("."))
        raw = self._columns.get(rest) if kind == PARQUET else self._text
        if raw is None:
            raise Dropped(Drop.CAPTION_MISSING, f"no {name}")
        return [usable_text(raw)]

    def lang(self) -> str:
        """The language that the record names, or an empty string."""
        return self._named("lang")

    def url(self) -> str:
        """The address that the record names, or an empty string."""
        return self._named("url")

    def _named(self, name: str) -> str:
        try:
            value = self._parsed().get(name)
        except Dropped:
            return ""
        return value if isinstance(value, str) else ""

    def _in_record(self, keys: Sequence[str]) -> list[str]:
        value: Any = self._parsed()
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        if value is None:
            raise Dropped(Drop.CAPTION_MISSING, f"no {JSON}.{'.'.join(keys)}")
        return usable_texts(value)

    def _parsed(self) -> Mapping[str, Any]:
        if self._record is None:
            self._record = parse_record(self._raw) if self._raw is not None else {}
        return self._record
