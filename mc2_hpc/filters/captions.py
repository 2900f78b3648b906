"""Filters of captions by language, and by lists of words in each language."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mc2_hpc.curation.filters import check_reason
from mc2_hpc.curation.matched import rows_by_language
from mc2_hpc.curation.matching.matcher import Matcher
from mc2_hpc.curation.pool.language_codes import is_in_languages, split_codes
from mc2_hpc.errors import UserError
from mc2_hpc.metadata.languages import is_language_code, known_code
from mc2_hpc.reading.files import read_text
from mc2_hpc.storage import file_sha256

_LARGEST_LIST = 64 << 20
_EVERY_LANGUAGE = ""


@dataclass(frozen=True)
class Languages:
    """Drops captions as ``language`` whose language is not among ``keep``, or is among ``drop``."""

    keep: str = ""
    """Codes with commas between them, such as ``en,pt,zh``; any code that matching accepts."""
    drop: str = ""

    def __post_init__(self) -> None:
        if bool(self.keep) == bool(self.drop):
            raise UserError("give either keep=CODE,CODE,... or drop=CODE,CODE,...")
        split_codes(self.keep or self.drop)

    def drop_reasons(self, rows: pa.Table) -> pa.Array:
        """See :class:`~mc2_hpc.curation.filters.Filter`."""
        is_listed = is_in_languages(rows, split_codes(self.keep or self.drop))
        return pc.if_else(pc.invert(is_listed) if self.keep else is_listed, "language", pa.scalar(None, pa.string()))


@dataclass(frozen=True)
class Words:
    """Drops captions in which a word of a list occurs.

    A word, or several in a row, occurs where a metadata entry would match (mode ``fixed``, docs/curation.md): between
    spaces or punctuation, and anywhere in languages written without spaces. Upper and lower case are the same.
    """

    lists: Path
    """A folder of ``<lang>.txt`` files, each for captions in its language; or one file, for all captions. One word per
    line, UTF-8; empty lines are ignored."""
    reason: str = "listed_word"

    def __post_init__(self) -> None:
        check_reason(type(self).__name__, self.reason)
        object.__setattr__(self, "lists", Path(self.lists).absolute())
        if not self._files():
            raise UserError(f"{self.lists}: no file, and no folder of <lang>.txt files")
        for lang, path in self._files().items():
            if lang != _EVERY_LANGUAGE and not is_language_code(lang):
                raise UserError(f"{path}: {lang!r} is not the code of a language; name it <lang>.txt, or move it away")

    def drop_reasons(self, rows: pa.Table) -> pa.Array:
        """See :class:`~mc2_hpc.curation.filters.Filter`."""
        listed = np.zeros(len(rows), bool)
        texts = rows["text"].combine_chunks()
        for lang, members in rows_by_language(rows):
            code = _EVERY_LANGUAGE if _EVERY_LANGUAGE in self._matchers else known_code(lang, self._matchers)
            if code in self._matchers:
                folded = [text.casefold() for text in texts.take(pa.array(members)).to_pylist()]
                listed[members] = np.diff(self._matchers[code].match(folded)[0]) > 0
        return pc.if_else(pa.array(listed), self.reason, pa.scalar(None, pa.string()))

    def sources(self) -> dict[str, str]:
        """Digests of the lists."""
        return {path.name: file_sha256(path) for path in self._files().values()}

    def _files(self) -> dict[str, Path]:
        if self.lists.is_dir():
            return {path.stem: path for path in sorted(self.lists.glob("*.txt")) if not path.name.startswith(".")}
        return {_EVERY_LANGUAGE: self.lists} if self.lists.exists() else {}

    @cached_property
    def _matchers(self) -> dict[str, Matcher]:
        """By language."""
        return {lang: _matcher(path) for lang, path in self._files().items()}


def _matcher(path: Path) -> Matcher:
    lines = (line.strip().casefold() for line in read_text(path, most=_LARGEST_LIST).splitlines())
    words = list(dict.fromkeys(filter(None, lines)))
    try:
        return Matcher.build(words)
    except UserError as error:
        raise UserError(f"{path}: no list of words ({error})") from None
