"""JSON as a typed value: the schema (a ``msgspec.Struct``) of each kind of file is defined by the code that owns it.

Types are exact: a boolean is not a number, text is not a list, a number with a fraction is not a whole number. Rejected
with one line, in bounded time and memory: duplicate keys, NaN and infinities, numbers out of range, nesting beyond the
interpreter's limit, bytes that are not UTF-8.
"""

import json
import math
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec

from mc2_hpc.errors import UserError
from mc2_hpc.reading.files import decode, read_bytes, shown

T = TypeVar("T")

Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 53)]
"""A whole number that may be 0."""
Size = Annotated[int, msgspec.Meta(ge=1, le=1 << 53)]
"""A whole number of at least 1."""
Sha256 = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
Name = Annotated[str, msgspec.Meta(pattern=r"^\w[\w.-]*$", max_length=200)]
"""The name of a file or folder; it cannot lead to another folder."""

ANYTHING: Any = Any
"""The schema of arbitrary JSON; the caller checks it further."""

_MOST_BYTES = 64 << 20
_WORDS = {"int": "a whole number", "float": "a number", "str": "text", "bool": "true or false", "array": "a list"}
_WORDS |= {"object": "an object", "null": "null"}


class File(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Base of the schemas of our own files: unknown keys are errors."""


class Foreign(msgspec.Struct, kw_only=True):
    """Base of the schemas of other programs' files: unknown keys are ignored."""


def read_json(path: str | Path, kind: type[T], *, most: int = _MOST_BYTES, what: str = "", cure: str = "") -> T:
    """A JSON file of at most ``most`` bytes as a value of ``kind``.

    Args:
        what: what the file should be, for the message if it has another form.
        cure: how to get a good file, for the end of every message.

    Raises:
        UserError: not a regular file, not JSON, or another form; the message has the place and what was expected there.
    """
    return parse_json(read_bytes(path, most=most), kind, path, what=what, cure=cure)


def parse_json(data: bytes, kind: type[T], path: str | Path, *, what: str = "", cure: str = "") -> T:
    """:func:`read_json` for bytes already in memory; messages name them ``path``."""
    tail = f"; {cure}" if cure else ""
    data = data.removeprefix(b"\xef\xbb\xbf")
    try:
        found = msgspec.json.decode(data, type=kind)
        if b"{" in data:
            json.loads(data, object_pairs_hook=_without_repeats)
        return found
    except msgspec.ValidationError as error:
        place = _expected(str(error))
        if place.startswith("$[...]"):
            try:
                place = _with_keys(place, data, kind)
            except RecursionError:  # msgspec stopped before it came to the deep part
                raise UserError(f"{shown(path)}: nested too deeply{tail}") from None
        raise UserError(f"{shown(path)}: {_not_that(what)}{place}{tail}") from None
    except UnicodeDecodeError:
        decode(data, path)  # raises, with the line
        raise UserError(f"{shown(path)}: not UTF-8{tail}") from None
    except RecursionError:
        raise UserError(f"{shown(path)}: nested too deeply{tail}") from None
    except _Repeated as error:
        raise UserError(f"{shown(path)}: the key {str(error)[:100]!r} occurs twice in one object{tail}") from None
    except ValueError as error:  # msgspec.DecodeError, and json's for parts that the schema skips
        raise UserError(f"{shown(path)}: not valid JSON: {_malformed(str(error), data)}{tail}") from None


def as_type(value: object, kind: type[T], source: str, *, what: str = "") -> T:
    """A part of parsed JSON as a value of ``kind``; messages name it ``source``.

    Raises:
        UserError: it has another form; the message has the place and what was expected there.
    """
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise UserError(f"{source}: {_not_that(what)}{_expected(str(error))}") from None


def read_fields(path: str | Path, kind: type[Any], *, what: str = "", cure: str = "") -> Any:
    """:func:`read_json` as plain dictionaries and lists, with defaults for keys that the file leaves out."""
    return msgspec.to_builtins(read_json(path, kind, what=what, cure=cure))


class _Repeated(ValueError):
    pass


def _without_repeats(pairs: list[tuple[str, Any]]) -> None:
    """Check for repeated keys; returns nothing, because the contents are already known."""
    if len(pairs) > 1:
        seen = set()
        for key, _ in pairs:
            if key in seen:
                raise _Repeated(key)
            seen.add(key)


def _not_that(what: str) -> str:
    return f"not {what}: " if what else ""


def _expected(message: str) -> str:
    """msgspec's message, reworded with the place first."""
    what, _, place = message.partition(" - at ")
    place = place.strip("`") or "$"
    if place.startswith("key in "):
        place = f"a {place.replace('`', '')}"
    if missing := re.fullmatch(r"Object missing required field `(.*)`", what):
        return f"{place}: {missing[1]!r} is missing"
    if unknown := re.fullmatch(r"Object contains unknown field `(.*)`", what, re.DOTALL):
        return f"{place}: unknown key {unknown[1][:100]!r}"
    if types := re.fullmatch(r"Expected `([^`]*)`, got `([^`]*)`", what):
        kinds = " or ".join(_WORDS.get(part, part) for part in types[1].split(" | "))
        return f"{place}: expected {kinds}, found {_WORDS.get(types[2], types[2])}"
    return shown(f"{place}: {what[0].lower()}{what[1:].replace('`', '')}")  # may quote a value of the file


def _malformed(message: str, data: bytes) -> str:
    message = message.removeprefix("JSON is malformed: ")
    if surrogate := _lone_surrogate(data):
        return f"{surrogate}: has a lone surrogate, half of a character; remove it"
    if message == "Input data was truncated":
        return "it ends too early" if data.strip() else "it is empty"
    at = re.search(r"\(byte (\d+)\)$", message)
    if at is None:
        return "a number with too many digits" if "integer string conversion" in message else message.splitlines()[0]
    line = data.count(b"\n", 0, int(at[1])) + 1
    return f"line {line}: {message[: at.start()].strip()}"


def _lone_surrogate(data: bytes) -> str:
    """The place of a string with half of a ``\\u`` surrogate pair, which UTF-8 cannot encode; empty if none."""
    if b"\\u" not in data:
        return ""
    texts = ((place, value) for place, value in _leaves(data) if isinstance(value, str))
    return next((place for place, value in texts if any("\ud800" <= c <= "\udfff" for c in value)), "")


def _leaves(data: bytes) -> Iterator[tuple[str, Any]]:
    """Every value that is neither list nor object, with its place; none if the JSON is malformed."""
    try:
        pending = [("$", json.loads(data))]
    except (ValueError, RecursionError):
        return
    while pending:
        place, value = pending.pop()
        if isinstance(value, list):
            pending += [(f"{place}[{number}]", part) for number, part in enumerate(value)][::-1]
        elif isinstance(value, dict):
            pending += [(f"{place}.{shown(key)[:100]}", part) for key, part in value.items()][::-1]
        else:
            yield place, value


def _in_range(number: int | float) -> bool:
    """Whether msgspec accepts it: finite, or a whole number of 64 bits with or without a sign."""
    return math.isfinite(number) if isinstance(number, float) else -(1 << 63) <= number < 1 << 64


def _with_keys(message: str, data: bytes, kind: Any) -> str:
    """A message whose place starts with ``$[...]``, msgspec's sign for any key, with the key instead."""
    place, _, what = message.partition(": ")
    if what.endswith("out of range"):
        numbers = ((found, value) for found, value in _leaves(data) if isinstance(value, int | float))
        return f"{next((found for found, value in numbers if not _in_range(value)), place)}: {what}"
    _, expected = typing.get_args(kind)
    for key, value in json.loads(data).items():
        try:
            msgspec.convert(value, expected)
        except msgspec.ValidationError:
            return message.replace("$[...]", f"$.{shown(key)[:100]}", 1)
    return message
