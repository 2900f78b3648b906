"""What the fuzz lane does to tars and their members, images, texts and WARC files."""

import gzip
import io
import json
import random
import re
import struct
import tarfile
import zlib
from pathlib import Path

from tests.fuzz.json_mutations import RAW, RAW_VALUES, changed

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
        raw = rng.choice(RAW_VALUES) if rng.random() < 0.3 else ""
        value, _ = changed(json.loads(content), rng, raw)
        return json.dumps(value).replace(f'"{RAW}"', raw).encode()
    return rng.choice(
        [content[: len(content) // 2], rng.randbytes(100), b"\xff\xfe\x00", b"9" * 5000, b"true", b"-1", bomb_png()]
    )


def bomb_png() -> bytes:
    """An image that claims to have 60,000 by 60,000 pixels."""

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
