"""Settings from YAML, a program or ``key.sub=value`` overrides to a dataclass; each field's type decides the meaning.

    typed(RunConfig, read_yaml("run.yaml", "config file"), ["output=2024_11"], source="run.yaml")

A text setting is taken literally: ``2024_11``, ``on``, ``1:30``, ``1e3``, ``007`` and ``run #3`` are not converted (in
a file, ``#`` after a blank starts a comment, so quote the last one). Numbers are decimal and finite. ``true``, ``yes``
and ``on``, or ``false``, ``no`` and ``off``, are booleans only for a boolean setting. ``null`` means no value for a
setting that allows it.

``${key.sub}`` in a value refers to another setting of the same tree, and nothing else: no environment, no functions.
``$${`` is a literal ``${``.
"""

import dataclasses
import difflib
import functools
import math
import os
import re
import types
import typing
from collections import abc
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypeVar, Union, cast

from mc2_hpc.errors import UserError
from mc2_hpc.reading.yaml_file import Argument, Items, Node, Scalar, Section, Value, parse_yaml

Settings = TypeVar("Settings")

Prose = Annotated[str, "several lines"]
"""A text setting that may contain line breaks."""

PathName = Annotated[str, "a path"]
"""A text setting that names a file or folder: a leading ``~`` is the home folder, as in a shell."""

_MAPPINGS = (dict, abc.Mapping)
_CONTAINERS = (list, tuple, abc.Sequence, *_MAPPINGS)
_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
_INTEGER = re.compile(r"[-+]?(?:0|[1-9][0-9]*(?:_[0-9]+)*)")
_NUMBER = re.compile(r"[-+]?(?:[0-9]+(?:_[0-9]+)*(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.?(?:inf|infinity|nan)", re.IGNORECASE)
_MOST_DIGITS = 18
_UNUSABLE = re.compile("[\x00-\x1f\x7f\ud800-\udfff]")
_REFERENCE = re.compile(r"(\$\$\{)|\$\{([^{}]*)(\}?)")
_KEY = re.compile(r"[^.\s$:{}]+(?:\.[^.\s$:{}]+)*")
_MOST_REFERENCES = 10


def typed(
    kind: type[Settings],
    values: Section | Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    source: str,
    within: str = "",
) -> Settings:
    """An object of the dataclass ``kind`` from a mapping and ``key.sub=value`` overrides.

    Args:
        values: a tree from :func:`~mc2_hpc.reading.yaml_file.read_yaml`, or plain values, whose types must be exact.
        within: prefix for keys in messages, if ``values`` is a part of a larger file.

    Raises:
        UserError: names ``source``, or the override, and the key that is unknown or has an invalid value.
    """
    tree = values if isinstance(values, Section) else as_node(values, source)
    assert isinstance(tree, Section)
    for word in overrides:
        tree = _with_override(kind, tree, word)
    try:
        return cast(Settings, _Reader(kind, tree).value(kind, tree, ""))
    except _Misfit as error:
        raise UserError(f"{error.place or source}: {within}{error}") from None


def typed_arguments(function: Any, values: Mapping[str, Node], *, within: str) -> dict[str, Any]:
    """Keyword arguments of ``function`` from a tree, by its parameters' annotations.

    Raises:
        UserError: names the place and, after ``within``, the argument that has an invalid value.
    """
    hints = typing.get_type_hints(function, include_extras=True)
    reader = _Reader(None, Section(dict(values), ""))
    try:
        return {key: reader.value(hints.get(key, Any), node, key) for key, node in values.items()}
    except _Misfit as error:
        raise UserError(f"{error.place}: {within}{error}") from None


def as_node(value: object, place: str) -> Node:
    """Plain values as a tree in which every node is at ``place``."""
    if isinstance(value, Mapping):
        return Section({str(key): as_node(part, place) for key, part in value.items()}, place)
    if isinstance(value, list | tuple):
        return Items(tuple(as_node(part, place) for part in value), place)
    return value if isinstance(value, Scalar | Items | Section | Value | Argument) else Value(value, place)


class _Misfit(Exception):
    """What is wrong and where; the place is None if a dataclass rejected its values as a whole."""

    def __init__(self, place: str | None, message: str) -> None:
        super().__init__(message)
        self.place = place


# ---- overrides


def _with_override(kind: type, tree: Section, word: str) -> Section:
    place = f"override {_brief(word)}"
    key, equals, text = word.partition("=")
    parts = key.split(".")
    if not equals or not all(part.strip() for part in parts):
        raise UserError(f"{place}: write it as key.sub=value")
    if re.search(r"\[[^\]]*\]$", key):
        raise UserError(f"{place}: set the list as a whole: {key.partition('[')[0]}=[first, second]")
    allowed = _type_at(kind, parts, place)
    target = _without_none(allowed)
    node: Node = Argument(text, place)
    is_section = dataclasses.is_dataclass(target) or typing.get_origin(target) in _MAPPINGS
    if is_section and not (target is not allowed and _is_null(node)):
        node = _flow(Argument(text, place), key)
        if not isinstance(node, Section):
            raise UserError(f"{place}: {key}: is a section of keys: write {key}.sub=value or {key}={{sub: value}}")
    for part in reversed(parts):
        node = Section({part: node}, place)
    assert isinstance(node, Section)
    _check_sections(tree, node, "")
    return tree.merged(node)


def _check_sections(tree: Section, new: Section, prefix: str) -> None:
    """Check that ``new`` has sections only where ``tree`` has sections or nothing."""
    for key, node in new.entries.items():
        own = tree.entries.get(key)
        if isinstance(node, Section) and own is not None:
            if not isinstance(own, Section):
                raise UserError(f"{node.place}: {prefix}{key} is a value, not a section of keys")
            _check_sections(own, node, f"{prefix}{key}.")


def _type_at(kind: Any, parts: Sequence[str], place: str) -> Any:
    """The type of the setting at a path of keys; Any below an untyped setting."""
    for number, part in enumerate(parts):
        kind = _without_none(kind)
        if kind is Section or kind is Any:
            return Any
        if dataclasses.is_dataclass(kind):
            if part not in (hints := _hints(cast(type, kind))):
                raise UserError(f"{place}: {_unknown_key('.'.join(parts[: number + 1]), cast(type, kind))}")
            kind = hints[part]
        elif typing.get_origin(kind) in _MAPPINGS:
            kind = typing.get_args(kind)[1]
        else:
            raise UserError(f"{place}: {'.'.join(parts[:number])} is a value, not a section of keys")
    return kind


# ---- values


class _Reader:
    """Turns nodes of a tree into values; references are looked up in the tree, then in the defaults of ``kind``."""

    def __init__(self, kind: Any, tree: Section) -> None:
        self._kind, self._tree = kind, tree

    def value(self, kind: Any, node: Node, key: str) -> Any:
        """``node`` as a value of ``kind``; messages name it ``key``."""
        if isinstance(node, Scalar | Argument) and not node.literal and "${" in node.text:
            node = dataclasses.replace(node, text=self._resolved(node, key, 0), literal=True)
        if kind is Any:
            return self._plain(node, key)
        if kind is Section:
            return self._section(node, key)
        if typing.get_origin(kind) in (Union, types.UnionType):
            return self._of_several(typing.get_args(kind), node, key)
        if dataclasses.is_dataclass(kind):
            return self._object(cast(type, kind), node, key)
        if typing.get_origin(kind) in _CONTAINERS:
            return self._container(kind, node, key)
        whole = kind
        kind = typing.get_args(kind)[0] if typing.get_origin(kind) is Annotated else kind
        if isinstance(node, Items | Section):
            raise _wrong(node, key, f"must be {_WORDS[kind]}, not {_form(node)}")
        if kind is str:
            text = _text(node, key, several_lines=whole == Prose)
            return os.path.expanduser(text) if whole == PathName else text
        return {bool: _boolean, int: _integer, float: _number}[kind](node, key)

    def _object(self, kind: type, node: Node, key: str) -> Any:
        node = _flow(node, key)
        if not isinstance(node, Section):
            raise _wrong(node, key, f"must be a section of keys, not {_form(node)}")
        hints = _hints(kind)
        prefix = f"{key}." if key else ""
        values = {}
        for name, part in node.entries.items():
            if name not in hints:
                raise _Misfit(part.place, _unknown_key(prefix + name, kind))
            values[name] = self.value(hints[name], part, prefix + name)
        for field in dataclasses.fields(kind):
            needed = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
            if needed and field.name not in values:
                raise _Misfit(node.place, f"{prefix}{field.name}: is missing")
        try:
            return kind(**values)
        except UserError as error:
            raise _Misfit(None, str(error)) from None

    def _container(self, kind: Any, node: Node, key: str) -> Any:
        node = _flow(node, key)
        origin, arguments = typing.get_origin(kind), typing.get_args(kind)
        if origin in _MAPPINGS:
            if not isinstance(node, Section):
                raise _wrong(node, key, f"must be a section of keys, not {_form(node)}")
            return {name: self.value(arguments[1], part, f"{key}.{name}") for name, part in node.entries.items()}
        if not isinstance(node, Items):
            raise _wrong(node, key, f"must be a list, such as [first, second], not {_form(node)}")
        if origin is tuple:
            if len(node.items) != len(arguments):
                raise _wrong(node, key, f"must be a list of {len(arguments)} values, not {len(node.items)}")
            parts = zip(arguments, node.items, strict=True)
            return tuple(self.value(of, part, f"{key}[{n}]") for n, (of, part) in enumerate(parts))
        return [self.value(arguments[0], part, f"{key}[{n}]") for n, part in enumerate(node.items)]

    def _of_several(self, kinds: Sequence[Any], node: Node, key: str) -> Any:
        if types.NoneType in kinds and _is_null(node):
            return None
        kinds = [kind for kind in kinds if kind is not types.NoneType]
        if len(kinds) > 1 and isinstance(node, Argument) and node.text.startswith("[") and node.text.endswith("]"):
            node = _flow(node, key)
        is_list = isinstance(node, Items)
        fitting = [kind for kind in kinds if (typing.get_origin(kind) in _CONTAINERS) == is_list]
        if isinstance(node, Items) and len(fitting) > 1:  # lists of values, or of sections
            has_sections = any(isinstance(part, Section) for part in node.items)
            fitting = [kind for kind in fitting if _lists_sections(kind) == has_sections] or fitting
        return self.value((fitting or kinds)[0], node, key)

    def _plain(self, node: Node, key: str) -> Any:
        """Infer the type of an untyped value from its text."""
        if isinstance(node, Argument) and node.text.startswith(("[", "{")):
            node = _flow(node, key)
        if isinstance(node, Section):
            return {name: self.value(Any, part, f"{key}.{name}") for name, part in node.entries.items()}
        if isinstance(node, Items):
            return [self.value(Any, part, f"{key}[{n}]") for n, part in enumerate(node.items)]
        if isinstance(node, Value):
            return node.value
        if isinstance(node, Scalar) and not node.plain:
            return _text(node, key, several_lines=True)
        if _is_null(node):
            return None
        if node.text.lower() in ("true", "false"):
            return node.text.lower() == "true"
        if _INTEGER.fullmatch(node.text) and "_" not in node.text:
            return _integer(node, key)
        if re.search(r"[.eE]", node.text) and _NUMBER.fullmatch(node.text) and "_" not in node.text:
            return _number(node, key)
        return _text(node, key, several_lines=True)

    def _section(self, node: Node, key: str) -> Section:
        """A section to be typed later, with its references already resolved."""
        node = _flow(node, key)
        if not isinstance(node, Section):
            raise _wrong(node, key, f"must be a section of keys, not {_form(node)}")
        found = self._literal(node, key)
        assert isinstance(found, Section)
        return found

    def _literal(self, node: Node, key: str) -> Node:
        if isinstance(node, Section):
            return Section({k: self._literal(part, f"{key}.{k}") for k, part in node.entries.items()}, node.place)
        if isinstance(node, Items):
            return Items(tuple(self._literal(part, key) for part in node.items), node.place)
        if isinstance(node, Scalar | Argument) and not node.literal:
            return dataclasses.replace(node, text=self._resolved(node, key, 0), literal=True)
        return node

    # ---- references

    def _resolved(self, node: Scalar | Argument, key: str, depth: int) -> str:
        def replacement(match: re.Match[str]) -> str:
            escaped, name, closed = match.groups()
            if escaped:
                return "${"
            if not closed or not _KEY.fullmatch(name):
                raise _wrong(
                    node, key, f"{match[0]!r} is not ${{key.sub}} of another setting; write a literal one as $${{"
                )
            return self._looked_up(name, node, key, depth)

        return _REFERENCE.sub(replacement, node.text)

    def _looked_up(self, name: str, node: Scalar | Argument, key: str, depth: int) -> str:
        if depth == _MOST_REFERENCES:
            raise _wrong(node, key, f"${{{name}}} refers to itself, or goes through more than {depth} other references")
        found: Node | None = self._tree
        for part in name.split("."):
            found = found.entries.get(part) if isinstance(found, Section) else None
        if found is None:
            found = self._default(name)
        if found is None:
            raise _wrong(node, key, f"${{{name}}}: there is no such setting")
        if isinstance(found, Value):
            return str(found.value)
        if not isinstance(found, Scalar | Argument):
            raise _wrong(node, key, f"${{{name}}}: is {_form(found)}, not a single value")
        return found.text if found.literal else self._resolved(found, name, depth + 1)

    def _default(self, name: str) -> Value | None:
        kind: Any = self._kind
        value: Any = None
        for part in name.split("."):
            kind = _without_none(kind)
            fields = {field.name: field for field in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else {}
            if part not in fields:
                return None
            value, kind = fields[part].default, _hints(kind)[part]
        return Value(value, "") if isinstance(value, str | int | float) else None


_WORDS = {str: "text", bool: "true or false", int: "a whole number", float: "a number"}


def _text(node: Scalar | Value | Argument, key: str, several_lines: bool) -> str:
    if isinstance(node, Value):
        if not isinstance(node.value, str):
            raise _wrong(node, key, f"must be text, not {node.value!r}")
        return node.value
    if isinstance(node, Scalar) and _is_null(node):
        raise _wrong(node, key, f"must be text; quote it if you mean {repr(node.text) if node.text else 'empty text'}")
    bad = _UNUSABLE.search(node.text.translate({9: " ", 10: " "}) if several_lines else node.text)
    if bad:
        raise _wrong(node, key, f"the character {bad[0]!r} is not allowed")
    return node.text


def _boolean(node: Scalar | Value | Argument, key: str) -> bool:
    if isinstance(node, Value):
        if not isinstance(node.value, bool):
            raise _wrong(node, key, f"must be true or false, not {node.value!r}")
        return node.value
    word = node.text.strip().lower()
    if word not in _TRUE + _FALSE:
        raise _wrong(node, key, f"must be true or false, not {_brief(node.text)}")
    return word in _TRUE


def _integer(node: Scalar | Value | Argument, key: str) -> int:
    if isinstance(node, Value):
        if isinstance(node.value, bool) or not isinstance(node.value, int):
            raise _wrong(node, key, f"must be a whole number, not {node.value!r}")
        if abs(node.value) >= 10**_MOST_DIGITS:
            raise _wrong(node, key, f"has more than {_MOST_DIGITS} digits")
        return node.value
    text = node.text.strip()
    if not _INTEGER.fullmatch(text):
        raise _wrong(node, key, f"must be a whole number in decimal digits, not {_brief(node.text)}")
    if len(text) > 2 * _MOST_DIGITS or abs(int(text)) >= 10**_MOST_DIGITS:
        raise _wrong(node, key, f"{_brief(text)} has more than {_MOST_DIGITS} digits")
    return int(text)


def _number(node: Scalar | Value | Argument, key: str) -> float:
    if isinstance(node, Value):
        if isinstance(node.value, bool) or not isinstance(node.value, int | float):
            raise _wrong(node, key, f"must be a number, not {node.value!r}")
        found = float(node.value) if abs(node.value) < 1e300 else math.inf
    else:
        text = node.text.strip()
        if not _NUMBER.fullmatch(text) and not _NOT_FINITE.fullmatch(text):
            raise _wrong(node, key, f"must be a number, not {_brief(node.text)}")
        found = float(text) if _NUMBER.fullmatch(text) else math.inf
    if not math.isfinite(found):
        raise _wrong(node, key, "must be a finite number")
    return found


def _is_null(node: Node) -> bool:
    if isinstance(node, Value):
        return node.value is None
    if isinstance(node, Argument):
        return node.text in ("null", "Null", "NULL")
    return isinstance(node, Scalar) and node.plain and node.text in ("", "~", "null", "Null", "NULL")


def _flow(node: Node, key: str) -> Node:
    """An argument parsed as YAML's flow form; other nodes unchanged."""
    if not isinstance(node, Argument):
        return node
    place = node.place
    found = parse_yaml(node.text, f"{place}: {key}", lambda line: place)
    return found if found is not None else Scalar("", place)


def _lists_sections(kind: Any) -> bool:
    return any(dataclasses.is_dataclass(part) for part in typing.get_args(kind))


def _form(node: Node) -> str:
    if isinstance(node, Items):
        return "a list"
    if isinstance(node, Section):
        return "a section of keys"
    return _brief(node.text) if isinstance(node, Scalar | Argument) else repr(node.value)


def _brief(text: str) -> str:
    return repr(text) if len(text) <= 60 else f"{text[:57]!r}..."


def _wrong(node: Node, key: str, reason: str) -> _Misfit:
    return _Misfit(node.place, f"{key}: {reason}" if key else reason)


def _unknown_key(key: str, kind: type) -> str:
    """The message for an unknown key, with the key that replaces it, the nearest known key, or all of them.

    A field that replaces another names it in its metadata: ``{"replaces": (old name, which values to give)}``.
    """
    key = re.sub(r"^.*\]\.", "", key)  # the line number identifies the list item
    section, _, name = key.rpartition(".")
    prefix = f"{section}." if section else ""
    for field in dataclasses.fields(kind):
        old, values = field.metadata.get("replaces", ("", ""))
        if name == old:
            return f"{_brief(key)} is now {prefix + field.name!r}: {values}"
    known = [prefix + field for field in _hints(kind)]
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.8)
    cure = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
    return f"unknown key {_brief(key)}; {cure}"


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind, include_extras=True)


def _without_none(kind: Any) -> Any:
    """``X`` of ``X | None``."""
    if typing.get_origin(kind) in (Union, types.UnionType):
        others = [part for part in typing.get_args(kind) if part is not types.NoneType]
        return others[0] if len(others) == 1 else kind
    return kind
