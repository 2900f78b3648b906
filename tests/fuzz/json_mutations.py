"""What the fuzz lane does to JSON, and to the headers and members that are JSON."""

import json
import random
from pathlib import Path
from typing import Any

RAW = "@raw@"
VALUES: list[Any] = [None, True, False, 0, -1, 1.5, 1e308, 10**30, "", "x", "1", "\x00", [], {}, [[]], {"x": 1}]
RAW_VALUES = [
    "NaN",
    "Infinity",
    "1" * 5000,
    "[" * 20_000 + "]" * 20_000,
    "[" * 100_000,
    '{"a":1,"a":2}',
    '"\\ud800"',
    "1e999",
]


def change_json(path: Path, rng: random.Random) -> str:
    """Give a random value another type, remove it, duplicate it, or replace it with invalid JSON."""
    lines = path.read_text(encoding="utf-8").split("\n")
    jsonl = path.suffix == ".jsonl"
    number = rng.randrange(max(1, len(lines) - 1)) if jsonl else 0
    value = json.loads(lines[number] if jsonl else "\n".join(lines))
    raw = rng.choice(RAW_VALUES) if rng.random() < 0.3 else ""
    value, what = changed(value, rng, raw)
    text = json.dumps(value, ensure_ascii=True).replace(f'"{RAW}"', raw)
    if jsonl:
        lines[number] = text
        text = "\n".join(lines)
    path.write_text(text, encoding="utf-8")
    return what


def changed(value: Any, rng: random.Random, raw: str) -> tuple[Any, str]:
    place = rng.choice(_places(value, ()))
    if not place:
        return (RAW if raw else rng.choice(VALUES)), "$ replaced"
    parent = value
    for key in place[:-1]:
        parent = parent[key]
    name = "$" + "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in place)
    if not raw and rng.random() < 0.2:
        del parent[place[-1]]
        return value, f"{name[:60]} removed"
    before = parent[place[-1]]
    others = [other for other in [*VALUES, [before], {"a": before}, str(before)] if type(other) is not type(before)]
    parent[place[-1]] = RAW if raw else rng.choice(others)
    return value, f"{name[:60]} = {raw[:20] or repr(parent[place[-1]])[:20]}"


def _places(value: Any, place: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    found = [place]
    items = value.items() if isinstance(value, dict) else enumerate(value[:20]) if isinstance(value, list) else ()
    for key, part in items:
        found += _places(part, (*place, key))
    return found
