"""Ways to damage a file, an override or the environment, each a function of a seeded random generator."""

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.fuzz.archive_mutations import change_image, change_tar, change_text, change_warc
from tests.fuzz.array_mutations import change_npy, change_safetensors
from tests.fuzz.json_mutations import change_json
from tests.fuzz.saved_mutations import change_saved

Mutation = Callable[[Path, random.Random], str]
"""Damages a file in place and says how."""


# ---- any file


def truncate(path: Path, rng: random.Random) -> str:
    data = path.read_bytes()
    path.write_bytes(data[: rng.randrange(len(data) + 1)])
    return "cut off"


def flip_bytes(path: Path, rng: random.Random) -> str:
    data = bytearray(path.read_bytes())
    for _ in range(rng.choice((1, 1, 4, 32))):
        if data:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    return "flipped bits"


def overwrite(path: Path, rng: random.Random) -> str:
    content = rng.choice(
        [b"", b"\x00", b"\xff\xfe", b"{}", b"[]", b"null", b"\x80" * 100, rng.randbytes(300), b"PK\x03\x04"]
    )
    path.write_bytes(content)
    return "other content"


def insert_bytes(path: Path, rng: random.Random) -> str:
    data = path.read_bytes()
    at = rng.randrange(len(data) + 1)
    path.write_bytes(data[:at] + rng.choice([b"\xff", b"\x00", b"\xed\xa0\x80", b"\t", b"\r", b"9" * 5000]) + data[at:])
    return "bytes inserted"


def replace_file(path: Path, rng: random.Random) -> str:
    path.unlink()
    kind = rng.choice(
        ["pipe", "folder", "dangling link", "circular link", "link to a device", "hole", "absent", "no permission"]
    )
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind.endswith("link") or kind == "link to a device":
        target = {"dangling link": "nowhere", "circular link": path.name}.get(kind, "/dev/zero")
        path.symlink_to(target)
    elif kind == "hole":
        with open(path, "wb") as stream:
            stream.truncate(1 << 36)
    elif kind == "no permission":
        path.write_bytes(b"x")
        path.chmod(0)
    return kind


# ---- YAML, overrides, environment


_WORDS = [
    "null",
    "~",
    "true",
    "on",
    "1:30",
    "2024_11",
    "0x10",
    "007",
    ".inf",
    ".nan",
    "1e999",
    "-1",
    "[]",
    "{}",
    "[1, 2",
    "{a: 1",
    "!!int 3",
    "&a [*a]",
    "*b",
    "${oc.env:HOME}",
    "${x}",
    "${",
    "'q",
    '"\\x00"',
    "9" * 30,
    "9" * 5000,
    "\t",
    "@x",
    "x: y",
    "/dev/null",
    "s3://",
    "http://127.0.0.1:1/x",
    "[" * 5000,
]


def change_yaml(path: Path, rng: random.Random) -> str:
    lines = path.read_text(encoding="utf-8").split("\n")
    number = rng.randrange(len(lines))
    kind = rng.choice(["value", "value", "value", "twice", "removed", "tab", "key", "bomb"])
    if kind == "value":
        head, colon, _ = lines[number].partition(":")
        lines[number] = f"{head}{colon or ' -'} {rng.choice(_WORDS)}"
    elif kind == "twice":
        lines.insert(number, lines[number])
    elif kind == "removed":
        del lines[number]
    elif kind == "tab":
        lines[number] = "\t" + lines[number]
    elif kind == "key":
        lines.insert(
            number, rng.choice(["steps: x", "<<: 3", "? [a]\n: 1", "--- \n", "%YAML 9.9", "x" * 3000, "\ufffe"])
        )
    else:
        bomb = ["a: &a [x,x,x,x,x,x,x,x,x]"] + [
            f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
        ]
        lines = bomb + lines
    path.write_text("\n".join(lines), encoding="utf-8")
    return f"line {number + 1} {kind}"


_KEYS = [
    "steps",
    "output",
    "optim.lr",
    "data.crop_scale",
    "data.lanes",
    "model.vision.width",
    "model.vision.layers",
    "model.text.vocab_size",
    "data.seed",
    "seed",
    "global_batch",
    "micro_batch",
    "precision",
    "data.train",
    "data.tokenizer",
    "model.init_from",
    "eval.suite",
    "checkpoint.every",
    "data.stall_seconds",
    "data.cache_dir",
    "zero.stage",
    "data.crop_scale[0]",
    "[",
    "",
    "a..b",
    ".",
    "steps.x",
    "model.vision",
]


def override(rng: random.Random) -> str:
    key = rng.choice(_KEYS)
    return (
        f"{key}={rng.choice([*_WORDS, '', '0', '3', 'x', '-0', '1e400', chr(0xDC80)])}"[:3000]
        if rng.random() < 0.95
        else key
    )


_NUMBERS = ["0", "-1", "1.5", "nan", "inf", "", "x", "9" * 20, "9" * 5000, "0x10", "1e3", "٣", "99999", " 1"]


def flag(rng: random.Random, names: list[str]) -> list[str]:
    return [f"{rng.choice(names)}={rng.choice(_NUMBERS)}"]


def environment(rng: random.Random) -> dict[str, str]:
    names = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", "SLURM_NTASKS", "SLURM_PROCID", "XDG_CACHE_HOME"]
    return {
        rng.choice(names): rng.choice([number for number in _NUMBERS if number != "99999"] + ["/dev/null", "\udc80"])
    }


# ---- columns


def change_parquet(path: Path, rng: random.Random) -> str:
    table = pq.read_table(path)
    number = rng.randrange(table.num_columns)
    name, rows = table.column_names[number], table.num_rows
    kind = rng.choice(
        [
            "numbers",
            "null type",
            "all null",
            "lists",
            "structs",
            "bytes",
            "booleans",
            "dropped",
            "twice",
            "renamed",
            "no rows",
            "some null",
            "strange texts",
        ]
    )
    columns: dict[str, Any] = {
        "numbers": pa.array(range(rows)),
        "null type": pa.nulls(rows),
        "all null": pa.nulls(rows, table.column(number).type),
        "lists": pa.array([["x", "y"]] * rows),
        "structs": pa.array([{"a": 1}] * rows),
        "bytes": pa.array([b"\xff\xfe"] * rows),
        "booleans": pa.array([True] * rows),
        "some null": pa.array([None, *table.column(number).to_pylist()[1:]], table.column(number).type),
        "strange texts": pa.array(
            [rng.choice(["", "\x00", "../x", "/etc/passwd", "x" * 70_000, "\u202e"]) for _ in range(rows)]
        ),
    }
    if kind in columns:
        table = table.set_column(number, name, columns[kind])
    elif kind == "dropped":
        table = table.remove_column(number)
    elif kind == "twice":
        table = table.append_column(name, table.column(number))
    elif kind == "renamed":
        table = table.rename_columns(
            [*table.column_names[:number], name.upper() + "\n", *table.column_names[number + 1 :]]
        )
    else:
        table = table.slice(0, 0)
    pq.write_table(table, path)
    return f"{name}: {kind}"


ANY: list[Mutation] = [truncate, flip_bytes, overwrite, insert_bytes, replace_file]
BY_KIND: dict[str, list[Mutation]] = {
    "json": [change_json] * 8 + ANY,
    "yaml": [change_yaml] * 8 + ANY,
    "parquet": [change_parquet] * 6 + ANY,
    "array": [change_npy] * 6 + ANY,
    "tensors": [change_safetensors] * 6 + ANY,
    "saved": [change_saved] * 8 + ANY,
    "tar": [change_tar] * 6 + ANY,
    "image": [change_image] * 2 + ANY,
    "text": [change_text] * 6 + ANY,
    "warc": [change_warc] * 5 + ANY,
    "binary": ANY,
}
