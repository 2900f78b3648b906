"""Shards with every kind of damage that costs only itself."""

import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from mc2_hpc.tar import write_tar
from tests.ingestion.sources import picture


def bomb() -> bytes:
    """A PNG of a hundred million pixels in a few kilobytes."""
    data = io.BytesIO()
    Image.new("1", (10_000, 10_000)).save(data, "PNG")
    return data.getvalue()


def write_messy(folder: Path) -> Path:
    """Six good images in two readable shards, and three shards that cannot be read."""
    folder.mkdir()
    good = [
        (f"{number:03d}.{kind}", data)
        for number in range(4)
        for kind, data in (("jpg", picture(number, size=(300, 200 + number))), ("txt", f"a picture {number}".encode()))
    ]
    bad = [
        ("empty.jpg", picture()),
        ("empty.txt", b" "),
        ("latin.jpg", picture()),
        ("latin.txt", b"caf\xe9"),
        ("record.jpg", picture()),
        ("record.json", b"{nope"),
        ("none.jpg", picture()),
        ("orphan.txt", b"no image"),
        ("cut.jpg", picture(9, size=(300, 300))[:500]),
        ("cut.txt", b"cut off"),
        ("page.png", b"<html>"),
        ("page.txt", b"not an image"),
        ("bomb.png", bomb()),
        ("bomb.txt", b"too many pixels"),
        ("phone.heic", b"unsupported"),
        ("phone.txt", b"unsupported"),
        ("../unsafe.jpg", picture()),
        ("german.png", picture(1, "PNG")),
        ("german.json", json.dumps({"captions": ["ein Bild", "noch ein Bild"], "lang": "de"}).encode()),
    ]
    write_tar(folder / "plain.tar", good + bad)
    write_tar(folder / "curated.tar", [("000.jpg", picture(5)), ("x.jpg", picture(6)), ("y.jpg", b"damaged")])
    rows = [("000", "one", "en"), ("000", "two", "en"), ("x", " ", "fr"), ("x", "trois", "fr"), ("y", "four", "en")]
    rows += [("gone", "five", None)]
    columns = dict(zip(("key", "text", "lang"), map(list, zip(*rows, strict=True)), strict=True))
    pq.write_table(pa.table(columns), folder / "curated.parquet")
    (folder / "cut.tar").write_bytes((folder / "plain.tar").read_bytes()[:3000])
    (folder / "zero.tar").write_bytes(b"")
    write_tar(folder / "other.tar", [("a.npy", b"array")])
    return folder
