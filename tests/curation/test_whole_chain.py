"""From a web archive to a model in training: the commands of docs/own_data.md, with only what matches fetched."""

import gzip
import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from mc2_hpc.inspection.lint import lint
from tests.curation.image_server import ImageServer, encoded, running
from tests.faults.tiny_run import COLOURS, FARBEN

pytest.importorskip("fastwarc", reason="FastWARC is not installed (mc2_hpc[curation])")
pytest.importorskip("aiohttp", reason="aiohttp is not installed (mc2_hpc[fetch])")

COMMAND_S = 600
FETCH = "--allow-addresses 127.0.0.1 --timeout 5 --retries 0 --host-rate 0"


def blocks(number: int, side: int = 128, quality: int = 90) -> bytes:
    """An image of random blocks, which no other number has."""
    pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), np.uint8)
    data = io.BytesIO()
    kind = "JPEG" if number % 2 else "PNG"
    Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC).save(data, kind, quality=quality)
    return data.getvalue()


def page(images: list[tuple[str, str]], address: str) -> bytes:
    """A WARC record of a page with images and alt texts."""
    html = "".join(f'<img src="{url}" alt="{alt}">' for url, alt in images).encode()
    body = b"HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=utf-8\r\n\r\n" + html
    head = f"WARC/1.0\r\nWARC-Type: response\r\nWARC-Target-URI: {address}\r\n"
    head += f"Content-Type: application/http; msgtype=response\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body + b"\r\n\r\n"


def write_archives(folder: Path, server: ImageServer) -> None:
    """Two archives of 64 good images with English and German captions, some of them twice; of 4 that cannot be fetched,
    a thumbnail, and a copy of an image."""
    images: list[tuple[str, str]] = []
    for number in range(64):
        url = server.image(f"/{number}.jpg", blocks(number))
        images.append((url, f"a {COLOURS[number % 8]} square on {COLOURS[number // 8]} ground"))
        images.append((url, f"ein {FARBEN[number % 8]} Quadrat auf dem Grund einer Farbe"))
    bad = [server.url("/gone.jpg"), server.image("/page.jpg", b"<html>"), server.image("/cut.jpg", encoded()[:200])]
    bad.append(server.image("/no.jpg", encoded(), X_Robots_Tag="noai"))
    images += [(url, "a red square that is not there") for url in bad]
    images.append((server.image("/small.jpg", blocks(65, side=24)), "a white square"))
    images.append((server.image("/copy.jpg", blocks(1, quality=60)), "a blue square"))
    images += [(images[0][0], "IMG_2041"), (images[2][0], images[2][1])]
    folder.mkdir()
    (folder / "a.warc.gz").write_bytes(gzip.compress(page(images[:70], "http://site.com/a")))
    (folder / "b.warc").write_bytes(page(images[66:], "http://site.com/b"))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_from_an_archive_to_a_model(tmp_path, fork_server):
    def mc2(words: str) -> str:
        command = [sys.executable, "-m", "mc2_hpc.cli", *words.split()]
        done = fork_server.run(command, cwd=tmp_path, timeout=COMMAND_S)
        assert done.returncode == 0, f"mc2 {words}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    for lang, words in (("en", COLOURS), ("de", FARBEN)):
        (tmp_path / "sources" / lang).mkdir(parents=True)
        (tmp_path / "sources" / lang / "wordnet.txt").write_text(
            "\n".join([*words, "square", "Quadrat"]), encoding="utf-8"
        )
    mc2("metadata build sources --out metadata")
    with running(ImageServer()) as server:
        write_archives(tmp_path / "crawl", server)
        extracted = json.loads(mc2("curate extract crawl --workers 1 --out pool"))
        assert extracted["images"] == 2 * 64 + 4 + 2 + 2 + 4, "every <img>, and those that both archives have"
        distinct = json.loads(mc2("curate deduplicate pool --shards 2 --workers 1 --out distinct"))
        assert distinct["kept"] == 2 * 64 + 4 + 2 + 1
        matched = json.loads(mc2("curate match distinct --metadata metadata --workers 1 --out matched"))
        assert matched["images"] == 64 + 4 + 2 and sum(matched["drops"].values()) == 1, "the file name"
        fetched = json.loads(mc2(f"curate fetch matched {FETCH} --workers 1 --out images"))
    assert fetched["images"] == 64 + 2 and sum(fetched["drops"].values()) == 4
    judged = json.loads(
        mc2("curate filter images --filter mc2_hpc.filters.shape.Size least=32 --workers 1 --out judged")
    )
    assert judged["images"] == 64 + 1, "without the thumbnail"
    unique = json.loads(mc2("curate dedup-images judged --workers 1 --out unique"))
    assert unique["images"] == 64, "without the copy"
    balance = json.loads(mc2("curate balance matched --metadata metadata --t-en auto --workers 1 --out balance"))
    assert set(balance["t"]) == {"de", "en"}
    packed = json.loads(mc2("curate pack unique --matched matched --workers 1 --out shards"))
    assert packed["images"] == 64 and packed["drops"] == {"image_missing": 4 + 2}
    found = lint(tmp_path / "shards").findings
    assert (found.kept, +found.skipped) == (64, {}) and set(found.captions) == {"en", "de"}
    assert found.captions.total() == packed["texts"] == 2 * 64, "of the copy, the larger file stays"

    mc2("tokenizer train shards --style xlmv --vocab-size 200 --out tokenizer.model")
    config = {
        "output": "run",
        "steps": 20,
        "global_batch": 16,
        "precision": "fp32",
        "log_every": 1,
        "model": {
            "preset": "ViT-S-16-worldwide",
            "embed_dim": 32,
            "vision": {"image_size": 32, "width": 64, "layers": 1, "head_width": 32},
            "text": {"vocab_size": 256, "context_length": 24, "width": 48, "heads": 3, "layers": 1},
        },
        "data": {"train": "shards", "balance": "balance", "tokenizer": "tokenizer.model", "lanes": 4, "workers": 0},
        "optim": {"lr": 1e-3, "warmup": 5},
        "zero": {"stage": 1},
        "checkpoint": {"every": 20},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    mc2("train run.yaml")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 20 and rows[-1]["loss"] < rows[0]["loss"] and rows[-1]["skipped"] == {}
