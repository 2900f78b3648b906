"""``mc2 curate extract | deduplicate | decontaminate``: their output, and one-line errors for bad input."""

import gzip
import io
import json

import pyarrow.parquet as pq
import pytest
from PIL import Image

from mc2_hpc.cli import main
from mc2_hpc.tar import write_tar

WAT = {
    "Envelope": {
        "WARC-Header-Metadata": {"WARC-Target-URI": "http://site.com/"},
        "Payload-Metadata": {
            "HTTP-Response-Metadata": {
                "HTML-Metadata": {
                    "Links": [
                        {"path": "IMG@/src", "url": "a.jpg?w=9", "alt": "a dog"},
                        {"path": "IMG@/src", "url": "a.jpg", "alt": "a dog"},
                    ]
                }
            }
        },
    }
}


def test_from_an_archive_to_a_pool(tmp_path, capsys):
    pytest.importorskip("fastwarc", reason="FastWARC is not installed")
    payload = json.dumps(WAT).encode()
    header = (
        f"WARC/1.0\r\nWARC-Type: metadata\r\nContent-Type: application/json\r\nContent-Length: {len(payload)}\r\n\r\n"
    )
    (tmp_path / "a.warc.wat.gz").write_bytes(gzip.compress(header.encode() + payload + b"\r\n\r\n"))
    where = ["--workers", "1", "--out"]
    assert main(["curate", "extract", str(tmp_path / "a.warc.wat.gz"), *where, str(tmp_path / "pool")]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 2
    assert main(["curate", "deduplicate", str(tmp_path / "pool"), *where, str(tmp_path / "distinct")]) == 0
    assert json.loads(capsys.readouterr().out)["kept"] == 1
    (row,) = pq.read_table(tmp_path / "distinct" / "00000.parquet").to_pylist()
    assert (row["text"], row["source"]) == ("a dog", "http://site.com/a.jpg")


def test_decontaminate(tmp_path, capsys):
    pytest.importorskip("imagehash", reason="imagehash is not installed")
    file = io.BytesIO()
    Image.linear_gradient("L").save(file, "JPEG")
    (tmp_path / "shards").mkdir()
    other = io.BytesIO()
    Image.radial_gradient("L").save(other, "JPEG")
    write_tar(tmp_path / "shards" / "a.tar", [("k.jpg", file.getvalue()), ("other.jpg", other.getvalue())])
    write_tar(tmp_path / "test.tar", [("x.jpg", file.getvalue())])
    flags = ["--against", str(tmp_path / "test.tar"), "--workers", "1", "--out", str(tmp_path / "out")]
    assert main(["curate", "decontaminate", str(tmp_path / "shards"), *flags]) == 0
    assert json.loads(capsys.readouterr().out)["removed"] == 1
    assert (tmp_path / "out" / "removed.csv").read_text().splitlines()[1] == f"k,{tmp_path}/test.tar/x.jpg,0,phash,a"


@pytest.mark.parametrize(
    "words, message",
    [
        (["extract", "{}/none"], "none: no such file or folder"),
        (["deduplicate", "{}"], "no *.parquet or *.tar shards"),
        (["decontaminate", "{}", "--against", "{}"], "no *.parquet or *.tar shards"),
    ],
)
def test_bad_input_is_one_line(tmp_path, capsys, words, message):
    for package in ("fastwarc", "imagehash"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    assert main(["curate", *(word.format(tmp_path) for word in words), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1
