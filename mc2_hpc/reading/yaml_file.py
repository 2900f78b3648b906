"""YAML as a tree that keeps the original text and line numbers; the meaning of a value depends on its setting's type.

YAML's implicit types (``on``, ``1:30``, ``2024_11``, ``1e3``, ``007``) are not applied. Anchors, aliases and merge keys
work; tags do not. Duplicate keys, tabs where blanks are expected, endless or exploding aliases and excessive nesting
are errors that name the line.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import yaml

from mc2_hpc.errors import UserError
from mc2_hpc.reading.files import read_text, shown

_MOST_BYTES = 1 << 20
_MOST_DEPTH = 50
_MOST_NODES = 100_000


@dataclass(frozen=True, slots=True)
class Scalar:
    """A value as its original text."""

    text: str
    place: str
    plain: bool = True
    """Without quotes."""
    literal: bool = False
    """Its references (``${key}``) are already resolved."""


@dataclass(frozen=True, slots=True)
class Items:
    """A list."""

    items: tuple["Node", ...]
    place: str


@dataclass(frozen=True, slots=True)
class Section:
    """A mapping of keys, in file order. Like that of every value in a section, ``place`` is that of its key."""

    entries: dict[str, "Node"]
    place: str

    def merged(self, other: "Section") -> "Section":
        """With the keys of ``other`` replacing or added to its own; sections on both sides are merged recursively."""
        entries = dict(self.entries)
        for key, node in other.entries.items():
            own = entries.get(key)
            entries[key] = own.merged(node) if isinstance(own, Section) and isinstance(node, Section) else node
        return Section(entries, self.place)


@dataclass(frozen=True, slots=True)
class Value:
    """A value that already has a Python type, from JSON or from a program."""

    value: object
    place: str


@dataclass(frozen=True, slots=True)
class Argument:
    """The value of a ``key=value`` override: text, or a list in YAML's flow form if the setting's type requires it."""

    text: str
    place: str
    literal: bool = False


Node: TypeAlias = Scalar | Items | Section | Value | Argument


def read_yaml(path: str | Path, what: str) -> Section:
    """The mapping in a YAML file of at most 1 MiB.

    Raises:
        UserError: no such file (``what`` says what it should be), empty, not a UTF-8 YAML mapping, or a duplicate key.
    """
    path = Path(path)
    if not path.exists() and not path.is_symlink():
        raise UserError(f"{shown(path)}: no such {what}")
    tree = parse_yaml(read_text(path, most=_MOST_BYTES), f"{shown(path)}", lambda line: f"{shown(path)}, line {line}")
    if tree is None:
        raise UserError(f"{shown(path)}, line 1: is empty; a {what} has keys, such as `key: value`")
    if not isinstance(tree, Section):
        raise UserError(f"{shown(path)}: not a mapping of keys")
    return tree


def parse_yaml(text: str, source: str, place: Callable[[int], str]) -> Node | None:
    """The tree of one YAML document; None if it is empty.

    Args:
        source: names the text in messages about its syntax.
        place: describes a line, counted from 1.

    Raises:
        UserError: not YAML, or unreasonably large or deep.
    """
    builder = _Builder(source, place)
    try:
        return builder.document(yaml.parse(text, Loader=yaml.SafeLoader))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}: " if mark is not None else ""
        raise UserError(f"{source}: not valid YAML: {where}{_problem(error)}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise UserError(
            f"{source}: not valid YAML: line {line}: the character {chr(error.character)!r} is not allowed"
        ) from None


def _problem(error: yaml.MarkedYAMLError) -> str:
    problem = str(error.problem or error.context or "cannot be read").replace("\n", " ")
    return "a tab where blanks are expected" if r"'\t'" in problem else problem


class _Builder:
    """Builds nodes from the events of PyYAML's parser one by one, so nesting that is too deep is never read fully."""

    def __init__(self, source: str, place: Callable[[int], str]) -> None:
        self._source, self._place = source, place
        self._anchors: dict[str, tuple[Node, int]] = {}
        self._num_nodes = 0

    def document(self, events: Iterator[yaml.Event]) -> Node | None:
        self._events = events
        next(events)  # the stream's beginning
        if isinstance(next(events), yaml.StreamEndEvent):
            return None
        node = self._node(next(events), 0, None)
        next(events)  # the document's end
        extra = next(events)
        if not isinstance(extra, yaml.StreamEndEvent):
            raise self._wrong(extra, "a second document; only one is allowed")
        if isinstance(node, Scalar) and node.plain and not node.text:
            return None
        return node

    def _node(self, event: yaml.Event, depth: int, place: str | None) -> Node:
        place = place or self._place(event.start_mark.line + 1)
        if depth > _MOST_DEPTH:
            raise self._wrong(event, f"nested more than {_MOST_DEPTH} levels deep")
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in self._anchors:
                raise self._wrong(event, f"*{event.anchor}: no such anchor before this line")
            node, size = self._anchors[event.anchor]
            self._count(event, size)
            return node
        if event.tag is not None:
            raise self._wrong(event, f"the tag {event.tag}: tags are not supported, write only the value")
        before = self._num_nodes
        self._count(event, 1)
        node = self._fresh(event, depth, place)
        if event.anchor is not None:
            self._anchors[event.anchor] = node, self._num_nodes - before
        return node

    def _fresh(self, event: yaml.Event, depth: int, place: str) -> Node:
        if isinstance(event, yaml.ScalarEvent):
            return Scalar(event.value, place, plain=event.style is None)
        if isinstance(event, yaml.SequenceStartEvent):
            items = []
            while not isinstance(event := next(self._events), yaml.SequenceEndEvent):
                items.append(self._node(event, depth + 1, None))
            return Items(tuple(items), place)
        return self._section(depth, place)

    def _section(self, depth: int, place: str) -> Section:
        entries: dict[str, Node] = {}
        inherited: list[Section] = []
        while not isinstance(event := next(self._events), yaml.MappingEndEvent):
            where = self._place(event.start_mark.line + 1)
            key = self._node(event, depth + 1, None)
            if not isinstance(key, Scalar):
                raise self._wrong(event, "a key must be one word or text, not a list or mapping")
            value = self._node(next(self._events), depth + 1, where)
            if key.text == "<<" and key.plain:
                inherited += self._merged(event, value)
            elif key.text in entries:
                raise UserError(f"{where}: the key {key.text!r} occurs twice; first in {entries[key.text].place}")
            else:
                entries[key.text] = value
        for section in inherited:
            entries = {**section.entries, **entries}
        return Section(entries, place)

    def _merged(self, event: yaml.Event, value: Node) -> list[Section]:
        sections = list(value.items) if isinstance(value, Items) else [value]
        if not all(isinstance(section, Section) for section in sections):
            raise self._wrong(event, "<<: needs a mapping, or a list of mappings")
        return sections  # type: ignore[return-value]

    def _count(self, event: yaml.Event, size: int) -> None:
        self._num_nodes += size
        if self._num_nodes > _MOST_NODES:
            raise self._wrong(event, f"more than {_MOST_NODES:,} values after expanding aliases")

    def _wrong(self, event: yaml.Event, problem: str) -> UserError:
        return UserError(f"{self._source}: not valid YAML: line {event.start_mark.line + 1}: {problem}")
