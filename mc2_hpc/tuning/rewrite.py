"""A config's text with other values of some settings, and everything else as it was written: comments, order."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from mc2_hpc.config import RunConfig, load_config, typed, with_settings, yaml_text
from mc2_hpc.errors import UserError
from mc2_hpc.reading.files import read_text
from mc2_hpc.reading.yaml_file import Items, Scalar, Section, parse_yaml
from mc2_hpc.tuning.space import Settings

_MOST_BYTES = 1 << 20


def nested(settings: Settings) -> dict[str, Any]:
    """``{"a.b": 1}`` as ``{"a": {"b": 1}}``."""
    tree: dict[str, Any] = {}
    for key, value in settings.items():
        *sections, name = key.split(".")
        section = tree
        for each in sections:
            section = section.setdefault(each, {})
        section[name] = value
    return tree


def rewritten(path: Path, overrides: Sequence[str], settings: Settings) -> str:
    """The text of the config at ``path`` with its overrides and the settings.

    Raises:
        UserError: the text is not the config that these mean, as when a value comes from an anchor.
    """
    wanted = with_settings(load_config(path, list(overrides)), settings)
    text = read_text(path, most=_MOST_BYTES)
    changes: dict[str, str] = {}
    for word in overrides:
        key, _, value = word.partition("=")
        changes[key] = _plain(value)
    changes |= {key: _scalar(value) for key, value in settings.items()}
    for key, value in changes.items():
        text = _with_value(text, key.split("."), value)
    if _parsed(text, str(path)) != wanted:
        raise UserError(f"{path}: its values cannot be replaced in place; put those of best.yaml into it by hand")
    return text


def _parsed(text: str, source: str) -> RunConfig | None:
    try:
        tree = parse_yaml(text, source, lambda line: f"{source}, line {line}")
        return typed(RunConfig, tree, source=source) if isinstance(tree, Section) else None
    except UserError:
        return None


def _plain(text: str) -> str:
    """The value of an override in YAML: as it is, or in quotes if it would mean something else there."""
    try:
        node = parse_yaml(f"value: {text}\n", "", str)
        found = node.entries["value"] if isinstance(node, Section) and len(node.entries) == 1 else None
    except UserError:
        found = None
    same = isinstance(found, Items | Section) or (isinstance(found, Scalar) and found.text == text)
    return text if same else json.dumps(text, ensure_ascii=False)


def _scalar(value: Any) -> str:
    return yaml_text({"value": value}).partition(": ")[2].rstrip("\n")


def _with_value(text: str, keys: Sequence[str], value: str) -> str:
    """The text with the value at a path of keys replaced, or added at the end of the innermost section that exists."""
    node = yaml.compose(text, Loader=yaml.SafeLoader)
    indent = 0
    for depth, key in enumerate(keys):
        if not isinstance(node, yaml.MappingNode):
            break
        found = next((pair for pair in node.value if pair[0].value == key), None)
        if found is None:
            return _with_entry(text, node, keys[depth:], value, indent)
        if depth == len(keys) - 1:
            begin, end = found[1].start_mark.index, found[1].end_mark.index
            space = "" if begin and text[begin - 1] in " \n" else " "
            return text[:begin] + space + value + text[end:]
        node = found[1]
        if isinstance(node, yaml.MappingNode) and node.value:
            indent = node.value[0][0].start_mark.column
    return text


def _with_entry(text: str, section: yaml.MappingNode, keys: Sequence[str], value: str, indent: int) -> str:
    if section.flow_style:
        place = section.end_mark.index - 1
        entry = value
        for key in reversed(keys):
            entry = f"{key}: {entry}" if key == keys[0] else "{" + f"{key}: {entry}" + "}"
        return text[:place] + (", " if section.value else "") + entry + text[place:]
    last = section.value[-1][1].end_mark.index
    # The end of a block is where the next token begins, after blank lines and comments of what follows.
    before = text[:last].rstrip()
    line_end = text.find("\n", len(before))
    place = len(text) if line_end == -1 else line_end + 1
    lines = [f"{' ' * (indent + 2 * depth)}{key}:" for depth, key in enumerate(keys)]
    lines[-1] += f" {value}"
    start = "" if place == 0 or text[place - 1] == "\n" else "\n"
    return text[:place] + start + "\n".join(lines) + "\n" + text[place:]
