"""Ways to damage a file, an override or the environment, each a function of a seeded random generator.

A mutation is *structural* if no reader may mistake the result for the original: results then equal those of the valid
input, or say what was left out.
"""

import io
import json
import os
import random
import re
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tests.fuzz.saved_mutations import change_saved

Mutation = Callable[[Path, random.Random], str]
"""Damages a file in place and says how."""

_RAW = "@raw@"
_VALUES: list[Any] = [None, True, False, 0, -1, 1.5, 1e308, 10**30, "", "x", "1", "\x00", [], {}, [[]], {"x": 1}]
_RAW_VALUES = [
    "NaN",
    "Infinity",
    "1" * 5000,
    "[" * 20_000 + "]" * 20_000,
    "[" * 100_000,
    '{"a":1,"a":2}',
    '"\\ud800"',
    "1e999",
]


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


# ---- JSON


def change_json(path: Path, rng: random.Random) -> str:
    """Give a random value another type, remove it, duplicate it, or replace it with invalid JSON."""
    lines = path.read_text(encoding="utf-8").split("\n")
    jsonl = path.suffix == ".jsonl"
    number = rng.randrange(max(1, len(lines) - 1)) if jsonl else 0
    value = json.loads(lines[number] if jsonl else "\n".join(lines))
    raw = rng.choice(_RAW_VALUES) if rng.random() < 0.3 else ""
    value, what = _changed(value, rng, raw)
    text = json.dumps(value, ensure_ascii=True).replace(f'"{_RAW}"', raw)
    if jsonl:
        lines[number] = text
        text = "\n".join(lines)
    path.write_text(text, encoding="utf-8")
    return what


def _changed(value: Any, rng: random.Random, raw: str) -> tuple[Any, str]:
    place = rng.choice(_places(value, ()))
    if not place:
        return (_RAW if raw else rng.choice(_VALUES)), "$ replaced"
    parent = value
    for key in place[:-1]:
        parent = parent[key]
    name = "$" + "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in place)
    if not raw and rng.random() < 0.2:
        del parent[place[-1]]
        return value, f"{name[:60]} removed"
    before = parent[place[-1]]
    others = [other for other in [*_VALUES, [before], {"a": before}, str(before)] if type(other) is not type(before)]
    parent[place[-1]] = _RAW if raw else rng.choice(others)
    return value, f"{name[:60]} = {raw[:20] or repr(parent[place[-1]])[:20]}"


def _places(value: Any, place: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    found = [place]
    items = value.items() if isinstance(value, dict) else enumerate(value[:20]) if isinstance(value, list) else ()
    for key, part in items:
        found += _places(part, (*place, key))
    return found


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


# ---- arrays and tensors


def change_npy(path: Path, rng: random.Random) -> str:
    if path.suffix == ".npz":
        with np.load(path) as file:
            arrays = dict(file)
        name = rng.choice(list(arrays))
        arrays[name], what = _other_array(arrays[name], rng)
        if rng.random() < 0.2:
            del arrays[name]
        np.savez(path, **arrays)
        return f"{name}: {what}"
    array, what = _other_array(np.load(path), rng)
    np.save(path, array)
    return what


def _other_array(array: Any, rng: random.Random) -> tuple[Any, str]:
    kind = rng.choice(
        ["float64", "int8", "two dimensions", "longer", "shorter", "none", "scalar", "texts", "not finite"]
    )
    if kind in ("float64", "int8"):
        return array.astype(kind), kind
    if kind == "not finite" and array.dtype.kind == "f":
        return np.full_like(array, np.nan), kind
    others = {
        "two dimensions": array.reshape(1, *array.shape),
        "longer": np.concatenate([array, array]),
        "shorter": array[:-1],
        "none": array[:0],
        "scalar": np.array(array.sum()),
        "texts": array.astype(str),
    }
    return others.get(kind, array[:-1]), kind


def change_safetensors(path: Path, rng: random.Random) -> str:
    """Change the header like :func:`change_json`, or the type, shape or number of tensors."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    names = [name for name in header if name != "__metadata__"]
    kind = rng.choice(["header", "header", "type", "removed", "fp16", "int32", "not finite", "more"])
    name = rng.choice(names)
    raw, what = "", f"{name} {kind}"
    if kind == "header":
        raw = rng.choice(_RAW_VALUES) if rng.random() < 0.3 else ""
        header, what = _changed(header, rng, raw)
    elif kind == "type":
        header[name]["dtype"] = rng.choice(["F16", "I64", "BOOL", "F33", "I32"])
    elif kind == "removed":
        del header[name]
    elif kind in ("fp16", "int32"):
        header, body = _recast(header, body, kind)
    elif kind == "not finite":
        body = b"\xff" * len(body)
    else:
        header["extra"] = {"dtype": "F32", "shape": [1], "data_offsets": [len(body), len(body) + 4]}
        body += bytes(4)
    text = json.dumps(header).replace(f'"{_RAW}"', raw).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)
    return what


def _recast(header: Any, body: bytes, kind: str) -> tuple[Any, bytes]:
    new, parts, end = {}, [], 0
    for name, entry in header.items():
        if name == "__metadata__" or entry["dtype"] != "F32":
            continue
        begin, stop = entry["data_offsets"]
        part = (
            np.frombuffer(body[begin:stop], np.float32).astype({"fp16": np.float16, "int32": np.int32}[kind]).tobytes()
        )
        new[name] = {
            "dtype": {"fp16": "F16", "int32": "I32"}[kind],
            "shape": entry["shape"],
            "data_offsets": [end, end + len(part)],
        }
        parts.append(part)
        end += len(part)
    return new, b"".join(parts)


# ---- archives, texts


_NAMES = [
    "../x.jpg",
    "/etc/x.jpg",
    "a/../../x.jpg",
    "x",
    ".jpg",
    "00000",
    "\udcff.jpg",
    "x" * 3000 + ".jpg",
    "a\nb.jpg",
    "00000.JPG",
    "0.0.0.jpg",
    "00000.mask.png",
    "00000.txt",
    "00000.json",
    "00000.cls",
]


def change_tar(path: Path, rng: random.Random) -> str:
    with tarfile.open(path) as archive:
        files = [(member.name, archive.extractfile(member).read()) for member in archive if member.isfile()]  # type: ignore[union-attr]
    number = rng.randrange(len(files))
    name, content = files[number]
    kind = rng.choice(["name", "twice", "content", "content", "removed", "link", "folder", "zero bytes"])
    if kind == "name":
        files[number] = rng.choice(_NAMES), content
    elif kind == "twice":
        files.append(files[number])
    elif kind == "content":
        files[number] = name, _other_content(name, content, rng)
    elif kind == "removed":
        del files[number]
    elif kind == "zero bytes":
        files[number] = name, b""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as out:
        if kind in ("link", "folder"):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = (tarfile.SYMTYPE, "/etc/passwd") if kind == "link" else (tarfile.DIRTYPE, "")
            out.addfile(info)
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            out.addfile(info, io.BytesIO(content))
    path.write_bytes(data.getvalue())
    return f"{kind} of {name[:30]!r}"


def _other_content(name: str, content: bytes, rng: random.Random) -> bytes:
    if name.endswith("json"):
        raw = rng.choice(_RAW_VALUES) if rng.random() < 0.3 else ""
        value, _ = _changed(json.loads(content), rng, raw)
        return json.dumps(value).replace(f'"{_RAW}"', raw).encode()
    return rng.choice(
        [content[: len(content) // 2], rng.randbytes(100), b"\xff\xfe\x00", b"9" * 5000, b"true", b"-1", bomb_png()]
    )


def bomb_png() -> bytes:
    """An image that claims to have 60,000 by 60,000 pixels."""
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(bytes(100_000)))
        + chunk(b"IEND", b"")
    )


def change_image(path: Path, rng: random.Random) -> str:
    path.write_bytes(
        rng.choice([bomb_png(), b"GIF89a", b"\xff\xd8\xff", b"RIFF\xff\xff\xff\xffWEBPVP8 ", rng.randbytes(500)])
    )
    return "another image"


def change_text(path: Path, rng: random.Random) -> str:
    lines = path.read_text(encoding="utf-8").split("\n")
    number = rng.randrange(len(lines))
    kind = rng.choice(["empty", "number", "long", "twice", "removed", "quote", "control", "huge number", "other cells"])
    changed = {
        "empty": "",
        "number": "-1",
        "long": "x," * 100_000,
        "quote": lines[number] + '"',
        "control": "\x00\x1b[2J\u202e" + lines[number],
        "huge number": re.sub(r"\d+", "9" * 5000, lines[number]),
        "other cells": ",".join(reversed(lines[number].split(","))),
    }
    if kind == "twice":
        lines.insert(number, lines[number])
    elif kind == "removed":
        del lines[number]
    else:
        lines[number] = changed[kind]
    path.write_text("\n".join(lines), encoding="utf-8")
    return f"line {number + 1} {kind}"


def change_warc(path: Path, rng: random.Random) -> str:
    import gzip
    import zlib

    data = path.read_bytes()
    packed = data[:2] == b"\x1f\x8b"
    data = gzip.decompress(data) if packed else data
    kind = rng.choice(["length", "bomb", "attributes", "unclosed", "type", "charset", "headers"])
    http = b"HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=utf-8\r\n"
    bodies = {
        "bomb": http + b"Content-Encoding: gzip\r\n\r\n" + gzip.compress(bytes(100 << 20), 1)
        if rng.random() < 0.5
        else http + b"Content-Encoding: deflate\r\n\r\n" + zlib.compress(bytes(100 << 20), 1),
        "attributes": http + b"\r\n<img " + b" ".join(b"a%d=1" % n for n in range(100_000)) + b">",
        "unclosed": http + b"\r\n" + b"".join(b"<b id=%d>" % n for n in range(30_000)) + b"<p>x" * 30_000,
        "charset": http.replace(b"utf-8", rng.choice([b"\xff", b"utf-99", b"idna", b"x" * 5000]))
        + b"\r\n<img src=x alt=y>",
        "headers": b"HTTP/9.9 abc\r\n" + b"X: y\r\n" * rng.choice([1, 50_000]) + b"\r\n<img src=x alt=y>",
    }
    if kind == "length":
        data = re.sub(
            rb"Content-Length: \d+",
            b"Content-Length: " + rng.choice([b"-1", b"0", b"x", b"9" * 30, b"1"]),
            data,
            count=1,
        )
    elif kind == "type":
        data = re.sub(
            rb"WARC-Type: \w+", b"WARC-Type: " + rng.choice([b"x", b"\xff", b"metadata", b"warcinfo"]), data, count=1
        )
    else:
        head = (
            b"WARC/1.0\r\nWARC-Type: response\r\nWARC-Target-URI: http://a.b/\r\n"
            b"Content-Type: application/http; msgtype=response\r\n"
        )
        data += head + b"Content-Length: %d\r\n\r\n" % len(bodies[kind]) + bodies[kind] + b"\r\n\r\n"
    path.write_bytes(gzip.compress(data, 1) if packed else data)
    return kind


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
STRUCTURAL = {change_json, change_yaml, change_parquet, change_npy, change_safetensors}
