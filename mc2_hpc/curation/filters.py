"""Filters: classes with one method that drop captions and count each drop under a reason.

    @dataclass(frozen=True)
    class NoPrices:
        currency: str = "€"

        def drop_reasons(self, rows: pa.Table) -> list[str | None]:
            return ["price" if self.currency in text else None for text in rows["text"].to_pylist()]

``--filter mypackage.NoPrices currency=$`` selects it; see docs/curation.md. This module has the protocol, the code that
parses that flag and applies filters, and two filters: :class:`Length` and :class:`Pattern`. Filters that also see
images are in :mod:`mc2_hpc.curation.filtering`.
"""

import inspect
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.compute as pc

from mc2_hpc.curation.pool.language_codes import is_in_languages, split_codes
from mc2_hpc.errors import UserError
from mc2_hpc.jobs.named import Named, constructor_options, describe, from_plain, import_object, to_plain

_FORM = "--filter package.module.Class key=value key=value ..."
_METHOD = "drop_reasons"
_SCORES = "scores"
_BUILT_IN = "Length, Pattern, Languages, Words; of images: Size, Aspect, ClipScore, OnnxScore, DropFaces, BlurFaces"


class Filter(Protocol):
    """Decides which captions to drop, and why. Created once per process; its results must depend only on the rows."""

    def drop_reasons(self, rows: pa.Table) -> Iterable[str | None] | pa.Array | pa.ChunkedArray:
        """A reason per row, in row order: a short name such as ``too_short``; None keeps the row.

        Args:
            rows: a batch of ``key``, ``text``, ``lang`` (a language with metadata) and, if the pool has it,
                ``source``; large strings, nulls only in ``source``, possibly no rows.
        """
        ...


def parse_filter(words: Sequence[str], *, images: bool = False) -> Named:
    """A filter from the words of one ``--filter``, with options of the types that its constructor declares.

    Args:
        images: allow filters that see images too.

    Raises:
        UserError: malformed words, an unknown class, or options that it does not have.
    """
    name, *options = words
    form = f"{_FORM}; other arguments come before --filter"
    named = Named(name, constructor_options(_filter_class(name, images), options, f"--filter {name}", form=form))
    load_filter(named, images=images)
    return named


def load_filter(named: Named, *, images: bool = False) -> Any:
    """An instance of the filter: a :class:`Filter`, or with ``images`` any filter of :mod:`mc2_hpc.curation.filtering`.

    Raises:
        UserError: there is no such class, it is not a filter, or its constructor rejects the options.
    """
    kind = _filter_class(named.name, images)
    try:
        inspect.signature(kind).bind(**(named.arguments or {}))
        return Named(named.name, named.arguments or {}).load()
    except UserError as error:  # of the constructor, or of an option's type; then it has the name already
        raise UserError(f"--filter {named.name}: {str(error).removeprefix(f'{named.name}: ')}") from None
    except TypeError as error:
        raise UserError(f"--filter {named.name}: {error}; its options: {inspect.signature(kind)}") from None
    except Exception as error:  # whatever the constructor does
        raise UserError(f"--filter {named.name}: constructing it failed: {describe(error)}") from error


def _filter_class(name: str, images: bool) -> type:
    try:
        kind = import_object(name)
    except UserError as error:
        raise UserError(f"--filter {error}; built in, in mc2_hpc.filters: {_BUILT_IN}") from None
    if not isinstance(kind, type):
        raise UserError(f"--filter {name}: is not a class; a filter is a class with a method {_METHOD}(rows)")
    if sees_images(kind):
        if not images:
            raise UserError(f"--filter {name}: judges images, which only `mc2 curate filter` can do")
    elif _num_parameters(kind, _METHOD) != 2:
        also = f", or with images, or {_SCORES}(self, rows, images)" if images else ""
        page = "images.md" if images else "curation.md"
        raise UserError(f"--filter {name}: a filter needs a method {_METHOD}(self, rows){also}; see docs/{page}")
    return kind


def sees_images(kind: type) -> bool:
    """Whether a class is a filter of images: it has ``drop_reasons(rows, images)`` or ``scores(rows, images)``."""
    return 3 in (_num_parameters(kind, _METHOD), _num_parameters(kind, _SCORES))


def _num_parameters(kind: type, method: str) -> int:
    """Parameters of a method with ``self``; 0 if there is no such method."""
    found = getattr(kind, method, None)
    return len(inspect.signature(found).parameters) if callable(found) else 0


def apply_filters(filters: Iterable[tuple[str, Filter]], rows: pa.Table, drops: Counter[str]) -> pa.Table:
    """The rows that every filter keeps; the others are counted in ``drops``.

    Args:
        filters: with their names, for errors.

    Raises:
        UserError: a filter raised, or did not return one reason per row.
    """
    for name, one in filters:
        reasons = ask(name, one, rows)
        drops.update(counted(reasons))
        rows = rows.filter(reasons.is_null())
    return rows


def ask(name: str, one: Any, rows: pa.Table, *images: Any) -> pa.Array:
    """What the method ``drop_reasons`` of a filter answers, checked: a column of strings, null for rows to keep.

    Args:
        name: of the filter, for errors.
        images: one sequence if it is a filter of images.

    Raises:
        UserError: it raised, or did not return one reason per row.
    """
    try:
        reasons = _as_column(one.drop_reasons(rows, *images), len(rows))
    except UserError as error:
        raise UserError(f"filter {name}: {error}") from None
    except Exception as error:  # whatever the filter does
        raise UserError(f"filter {name}: {_METHOD} raised {describe(error)}") from error
    for reason in reasons.drop_null().unique().to_pylist():
        check_reason(name, reason)
    return reasons


def complete(named: Named, one: Any) -> Named:
    """A filter with all its options: also those that were not given, and paths as its constructor made them.

    Args:
        one: an instance of it.
    """
    arguments = dict(named.arguments or {})
    if is_dataclass(one):
        arguments |= {field.name: to_plain(getattr(one, field.name)) for field in fields(one) if field.init}
    return Named(named.name, arguments)


def sources_of(where: str, one: Any) -> dict[str, str]:
    """Digests of the files that a filter or an encoder reads, by name: what its method ``sources`` returns, if it has
    one.

    Args:
        where: the flag and the class, for errors.

    Raises:
        UserError: a file cannot be used, or the method raised.
    """
    find = getattr(one, "sources", None)
    try:
        return {str(file): str(digest) for file, digest in find().items()} if find is not None else {}
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    except Exception as error:  # whatever the method does
        raise UserError(f"{where}: sources raised {describe(error)}") from error


def counted(reasons: pa.Array | pa.ChunkedArray) -> dict[str, int]:
    """How often each string occurs in a column; nulls are left out."""
    return {one["values"]: one["counts"] for one in reasons.drop_null().value_counts().to_pylist()}


def recorded_filters(settings: Mapping[str, Any], where: object) -> list[tuple[str, Filter]]:
    """The filters that a matched pool was made with, and their names.

    Args:
        settings: from its ``match.json``.
        where: the pool, for errors.
    """
    named = from_plain(settings.get("filters", []), list[Named], f"{where}: filters")
    return [(one.name, load_filter(one)) for one in named]


def filtered_as(filters: Iterable[tuple[str, Filter]], text: str, lang: str, key: str | None) -> str | None:
    """The reason one caption is dropped; None if it is kept.

    Args:
        key: of its image; empty if unknown.
    """
    columns = {"key": key or "", "text": text, "lang": lang}
    rows = pa.table({name: pa.array([value], pa.large_string()) for name, value in columns.items()})
    drops: Counter[str] = Counter()
    apply_filters(filters, rows, drops)
    return next(iter(drops), None)


def _as_column(answer: Any, num_rows: int) -> pa.Array:
    """The reasons as an Arrow column of strings."""
    wanted = f"{_METHOD} must return None (keep) or a string (the reason) for each of {num_rows} rows"
    if isinstance(answer, str | bytes) or not isinstance(answer, Iterable):
        raise UserError(f"{wanted}, not {type(answer).__name__}")
    if isinstance(answer, pa.ChunkedArray):
        answer = answer.combine_chunks()
    if not isinstance(answer, pa.Array):
        answer = list(answer)
        if others := [value for value in answer if not (value is None or isinstance(value, str))]:
            raise UserError(f"{wanted}; one of them is {others[0]!r}")
        answer = pa.array(answer, pa.string())
    kind = answer.type.value_type if pa.types.is_dictionary(answer.type) else answer.type
    if kind not in (pa.string(), pa.large_string(), pa.null()):
        raise UserError(f"{wanted}; it returned a column of {kind}")
    if len(answer) != num_rows:
        raise UserError(f"{wanted}, but returned {len(answer)}")
    return answer.cast(pa.string())


def check_reason(name: str, reason: str) -> None:
    """Check that a filter's reason can be a counter's name.

    Raises:
        UserError: it is blank, long, or has control characters.
    """
    if not reason.strip() or not reason.isprintable() or len(reason) > 100:
        raise UserError(f"filter {name}: {reason[:100]!r} is not a reason; use a short name such as 'too_short'")


@dataclass(frozen=True)
class Length:
    """Drops captions as ``too_short`` or ``too_long``, by characters (code points) or space-separated words."""

    min_characters: int = 0
    max_characters: int | None = None
    min_words: int = 0
    max_words: int | None = None
    """Not meaningful in languages written without spaces."""

    def __post_init__(self) -> None:
        for least, most in ((self.min_characters, self.max_characters), (self.min_words, self.max_words)):
            if least < 0 or (most is not None and most < least):
                raise UserError(f"no length is from {least} to {most}")

    def drop_reasons(self, rows: pa.Table) -> pa.Array:
        """See :class:`Filter`."""
        text = pc.utf8_trim_whitespace(rows["text"].combine_chunks())
        too_short, too_long = _outside(pc.utf8_length(text), self.min_characters, self.max_characters)
        if self.min_words or self.max_words is not None:
            words = pc.list_value_length(pc.utf8_split_whitespace(text))
            fewer, more = _outside(words, self.min_words, self.max_words)
            too_short, too_long = pc.or_(too_short, fewer), pc.or_(too_long, more)
        return pc.if_else(too_short, "too_short", pc.if_else(too_long, "too_long", pa.scalar(None, pa.string())))


def _outside(length: pa.Array, least: int, most: int | None) -> tuple[pa.Array, pa.Array]:
    return pc.less(length, least), pc.greater(length, most if most is not None else 2**31 - 1)


@dataclass(frozen=True)
class Pattern:
    """Drops captions in which the regular expression ``drop`` occurs, or ``keep`` does not; the syntax is RE2's."""

    drop: str | None = None
    keep: str | None = None
    reason: str = "pattern"
    """The reason that dropped captions are counted under."""
    languages: str = ""
    """Codes with commas between them, such as ``en,de``: captions in other languages are kept; empty for all."""

    def __post_init__(self) -> None:
        if self.drop is None and self.keep is None:
            raise UserError("give drop=REGEX, keep=REGEX, or both")
        if self.languages:
            split_codes(self.languages)
        for expression in filter(None, (self.drop, self.keep)):
            try:
                pc.match_substring_regex(pa.array([""]), expression)
            except pa.ArrowInvalid as error:
                raise UserError(f"{expression!r} is not a valid regular expression ({error})") from None

    def drop_reasons(self, rows: pa.Table) -> pa.Array:
        """See :class:`Filter`."""
        text = rows["text"].combine_chunks()
        dropped = pa.array([False] * len(text), pa.bool_())
        if self.drop is not None:
            dropped = pc.match_substring_regex(text, self.drop)
        if self.keep is not None:
            dropped = pc.or_(dropped, pc.invert(pc.match_substring_regex(text, self.keep)))
        if self.languages:
            dropped = pc.and_(dropped, is_in_languages(rows, split_codes(self.languages)))
        return pc.if_else(dropped, self.reason, pa.scalar(None, pa.string()))
