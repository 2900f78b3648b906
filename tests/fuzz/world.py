"""A small valid input of every kind that commands read, in one folder; created by mc2 itself where it can write it."""

import csv
import gzip
import io
import json
import multiprocessing
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from safetensors.torch import load_file

from mc2_hpc.cli import main
from mc2_hpc.config import yaml_text
from mc2_hpc.data.tokenizer import train_tokenizer
from mc2_hpc.tar import write_tar

NUM_IMAGES = 8
COLOURS = ("red", "green", "blue", "white")
CAPTIONS = {"en": "a {} house by the sea", "de": "ein Haus am Meer, {}"}


def build(folder: Path, port: int) -> None:
    """Fill ``folder``, the working folder of every command of :data:`lane.COMMANDS`.

    Args:
        port: on this machine, where a web server serves ``folder / "images"``.
    """
    texts = [form.format(colour) for form in CAPTIONS.values() for colour in COLOURS]
    train_tokenizer(texts * 3 + ["0123456789?.,"], folder / "sp.model", vocab_size=70, style="xlmv")
    _images(folder / "images")
    _pools(folder, port)
    _own_data(folder / "own")
    _settings(folder)
    _crawl(folder / "crawl")
    _sources(folder / "sources")
    # DeepSpeed trains once per process; a fork must come before anything has threads.
    trained = multiprocessing.get_context("fork").Process(target=lambda: sys.exit(main(["train", "mix.yaml"])))
    trained.start()
    trained.join()
    if trained.exitcode != 0:
        raise SystemExit("the valid input of `mc2 train mix.yaml` is refused")
    for words in (
        "metadata build sources --out metadata --cap unigram_share=1 --cap bigram_share=1",
        "curate run pool --metadata metadata --t-en 2 --workers 1 --out curated",
        "curate filter pool --filter mc2_hpc.filters.Size least=8 --workers 1 --out filtered",
        "curate extract crawl --workers 1 --out extracted",
        "train run.yaml",
        "convert run --to open_clip --out oc",
        "convert run --to hf --out hf",
    ):
        if main(words.split()) != 0:
            raise SystemExit(f"the valid input of `mc2 {words}` is refused")
    _saved(folder)
    _evaluation_sets(folder / "sets")


def _saved(folder: Path) -> None:
    """The open_clip folder with its weights in a file of ``torch.save``, as older releases have them."""
    shutil.copytree(folder / "oc", folder / "oc-saved")
    (weights,) = (folder / "oc-saved").glob("*.safetensors")
    torch.save(load_file(weights), weights.with_name("open_clip_pytorch_model.bin"))
    weights.unlink()


def image(number: int, kind: str = "JPEG") -> bytes:
    """An encoded image of random blocks."""
    blocks = np.random.default_rng(number).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    data = io.BytesIO()
    Image.fromarray(blocks.repeat(8, 0).repeat(8, 1)).save(data, kind)
    return data.getvalue()


def _caption(number: int) -> tuple[str, str]:
    lang = ("en", "de")[number % 2]
    return lang, CAPTIONS[lang].format(COLOURS[number // 2 % 4])


def _images(folder: Path) -> None:
    folder.mkdir()
    for number in range(NUM_IMAGES):
        kind, ending = (("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp"))[number % 3]
        (folder / f"{number:02d}.{ending}").write_bytes(image(number, kind))
        (folder / f"{number:02d}.jpg").write_bytes(image(number))


def _pools(folder: Path, port: int) -> None:
    for shard in range(2):
        numbers = range(8 * shard, 8 * shard + 8)
        plain = []
        for number in numbers:
            lang, text = _caption(number)
            plain += [
                (f"{number:05d}.jpg", image(number)),
                (f"{number:05d}.txt", text.encode()),
                (f"{number:05d}.json", json.dumps({"lang": lang, "caption": text}).encode()),
            ]
        (folder / "plain").mkdir(exist_ok=True)
        write_tar(folder / "plain" / f"{shard}.tar", plain)
        (folder / "pool").mkdir(exist_ok=True)
        write_tar(folder / "pool" / f"{shard}.tar", ((f"{number:05d}.jpg", image(number)) for number in numbers))
        rows = {
            "key": [f"{number:05d}" for number in numbers],
            "text": [_caption(number)[1] for number in numbers],
            "lang": [_caption(number)[0] for number in numbers],
        }
        pq.write_table(pa.table(rows), folder / "pool" / f"{shard}.parquet")
        rows["source"] = [f"http://127.0.0.1:{port}/{number % NUM_IMAGES:02d}.jpg" for number in numbers]
        (folder / "addresses").mkdir(exist_ok=True)
        pq.write_table(pa.table(rows), folder / "addresses" / f"{shard}.parquet")


def _own_data(folder: Path) -> None:
    """Tables that name the files in ``images``, a folder with caption files, and files as ``datasets`` saves them."""
    (folder / "captioned").mkdir(parents=True)
    (folder / "saved").mkdir()
    rows = []
    for number in range(NUM_IMAGES):
        lang, text = _caption(number)
        rows.append({"image": f"{number:02d}.jpg", "caption": text, "lang": lang})
        (folder / "captioned" / f"{number}.png").write_bytes(image(number, "PNG"))
        (folder / "captioned" / f"{number}.txt").write_text(text)
        (folder / "captioned" / f"{number}.json").write_text(json.dumps({"lang": lang}))
    _write_csv(folder / "captions.csv", rows)
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), folder / "captions.parquet")
    inline = [{**row, "image": {"bytes": image(number), "path": None}} for number, row in enumerate(rows)]
    table = pa.Table.from_pylist(inline)
    pq.write_table(table, folder / "rows.parquet")
    with pa.ipc.new_stream(folder / "saved" / "data.arrow", table.schema) as stream:
        stream.write_table(table, max_chunksize=3)
    (folder / "saved" / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data.arrow"}]}))


def _settings(folder: Path) -> None:
    run: dict[str, Any] = {
        "output": "run",
        "steps": 1,
        "global_batch": 4,
        "precision": "fp32",
        "log_every": 1,
        "model": {
            "preset": "ViT-S-16-worldwide",
            "embed_dim": 8,
            "vision": {"image_size": 16, "patch_size": 16, "width": 16, "layers": 1, "head_width": 8},
            "text": {"vocab_size": 80, "context_length": 24, "width": 16, "heads": 2, "layers": 1},
        },
        "data": {"train": "plain", "tokenizer": "sp.model", "lanes": 2, "workers": 0},
        "optim": {"lr": 1e-3, "warmup": 1},
    }
    (folder / "run.yaml").write_text(yaml_text(run))
    curated = {
        **run,
        "output": "run2",
        "data": {**run["data"], "train": "curated/shards", "balance": "curated/balance"},
    }
    (folder / "curated.yaml").write_text(yaml_text(curated))
    first: dict[str, Any] = {"name": "a", "path": "plain/0.tar", "captions": {"txt": 0.5, "json.caption": 0.5}}
    mix = [first, {"name": "b", "path": "plain/1.tar", "weight": 2}]
    takedown: dict[str, Any] = {"train": mix, "takedown": "takedown.jsonl", "takedown_seconds": 0.1}
    (folder / "mix.yaml").write_text(yaml_text({**run, "output": "mixed", "data": {**run["data"], **takedown}}))
    entries = [{"key": "00003"}, {"sha256": "0" * 64, "note": "17"}, {"url": "https://example.com/*"}]
    (folder / "takedown.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    sets = {
        "xm3600": {"reader": "xm3600", "path": "xm3600", "options": {"images": "../../images"}},
        "lines": {"reader": "caption_lines", "path": "lines", "options": {"images": "../../images"}},
        "coco": {"reader": "coco", "path": "coco.json", "options": {"images": "images"}},
        "folders": {"reader": "class_folders", "path": "folders"},
        "labelled": {
            "reader": "labelled_parquet",
            "path": "labelled.parquet",
            "options": {"classes": ["cat", "dog"], "names": {"en": ["cat", "dog"]}, "templates": {"en": ["a {}"]}},
        },
        "clip": {"reader": "clip_benchmark", "path": "clip"},
        "cvqa": {"reader": "cvqa", "path": "cvqa"},
        "street": {"reader": "dollar_street", "path": "street"},
        "geode": {"reader": "geode", "path": "geode"},
        "gldv2": {"reader": "gldv2", "path": "gldv2"},
    }
    for name, entry in sets.items():
        (folder / f"suite-{name}.yaml").write_text(yaml_text({"root": "sets", "sets": {name: entry}}))
    row = {"name": "plain", "train": ["steps=1"]}
    ablation = {
        **{"title": "t", "mirrors": "m", "finding": "f", "base": "run.yaml", "suite": "suite-folders.yaml"},
        "data": {"root": ".", "pool": "${data.root}/pool", "metadata": "${data.root}/metadata"},
        "columns": {"top": {"set": "folders"}},
        "curation": {"t_en": 2},
        "tokenizer": {"vocab_size": 70},
        "seeds": [0],
        "rows": [row],
    }
    (folder / "ablation.yaml").write_text(yaml_text(ablation))


def _crawl(folder: Path) -> None:
    folder.mkdir()
    links = [{"path": "IMG@/src", "url": f"{number}.jpg", "alt": _caption(number)[1]} for number in range(4)]
    page = {"HTML-Metadata": {"Head": {"Title": "t"}, "Links": links}}
    envelope = {
        "WARC-Header-Metadata": {"WARC-Target-URI": "http://site.com/x"},
        "Payload-Metadata": {"HTTP-Response-Metadata": page},
    }
    html = b"".join(b"<p><img src='%d.jpg' alt='a red house'>" % number for number in range(4))
    http = b"HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=utf-8\r\n"
    packed = http + b"Content-Encoding: gzip\r\n\r\n" + gzip.compress(html)
    wat = _record("metadata", "application/json", json.dumps({"Envelope": envelope}).encode())
    warc = _record("response", "application/http; msgtype=response", http + b"\r\n" + html)
    (folder / "a.wat.gz").write_bytes(gzip.compress(wat))
    (folder / "b.warc").write_bytes(warc + _record("response", "application/http; msgtype=response", packed))


def _record(kind: str, content_type: str, payload: bytes) -> bytes:
    head = f"WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Target-URI: http://site.com/x\r\nContent-Type: {content_type}\r\n"
    return f"{head}Content-Length: {len(payload)}\r\n\r\n".encode() + payload + b"\r\n\r\n"


def _sources(folder: Path) -> None:
    for lang, form in CAPTIONS.items():
        (folder / lang).mkdir(parents=True)
        text = "".join(form.format(colour) + "\n" for colour in COLOURS * 3)
        (folder / lang / "corpus.txt").write_text(text, encoding="utf-8")


def _write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _evaluation_sets(folder: Path) -> None:
    numbers = range(NUM_IMAGES)
    for name in ("xm3600", "lines", "clip/test", "cvqa", "gldv2"):
        (folder / name).mkdir(parents=True)
    lines = [
        {"image/key": f"{n:02d}", "image/locale": "de", "de": {"caption": [f"ein {n}"]}, "en": {"caption": [f"a {n}"]}}
        for n in numbers
    ]
    (folder / "xm3600" / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "lines" / "filenames.txt").write_text("".join(f"{n:02d}.jpg\n" for n in numbers))
    (folder / "lines" / "en.txt").write_text("".join(f"house {n}\n" for n in numbers))
    record = {
        "images": [{"id": n, "file_name": f"{n:02d}.jpg"} for n in numbers],
        "annotations": [{"image_id": n, "caption": f"house {n}"} for n in numbers],
    }
    (folder / "coco.json").write_text(json.dumps(record))
    for label in ("cat", "dog"):
        (folder / "folders" / label).mkdir(parents=True)
        for n in range(3):
            (folder / "folders" / label / f"{n}.jpg").write_bytes(image(n))
    table = {"key": [str(n) for n in numbers], "label": ["cat", "dog"] * 4, "jpg": [image(n) for n in numbers]}
    pq.write_table(pa.table(table), folder / "labelled.parquet")
    _clip_benchmark(folder / "clip")
    cvqa = {
        "image": [{"bytes": image(n), "path": f"{n}.jpg"} for n in range(2)],
        "ID": ["1_0", "2_0"],
        "Subset": ["('Spanish', 'Argentina')", "('Igbo', 'Nigeria')"],
        "Question": ["which", "what"],
        "Translated Question": ["which", "what"],
        "Options": [["a", "b"], ["c", "d"]],
        "Translated Options": [["a", "b"], ["c", "d"]],
        "Label": [1, 0],
    }
    pq.write_table(pa.table(cvqa), folder / "cvqa" / "test-0.parquet")
    _tables(folder)


def _clip_benchmark(folder: Path) -> None:
    files = [(f"s{n}.{kind}", data) for n in range(4) for kind, data in (("jpg", image(n)), ("cls", b"%d" % (n % 2)))]
    write_tar(folder / "test" / "0.tar", files)
    (folder / "test" / "nshards.txt").write_text("1")
    (folder / "classnames.txt").write_text("cat\ndog\n")
    (folder / "zeroshot_classification_templates.txt").write_text("a photo of a {c}.\n")


def _tables(folder: Path) -> None:
    street = [
        {"id": n, "country.name": "Peru", "imageRelPath": f"images/{n:02d}.jpg", "imagenet_sysnet_id": f"[{n}, 697]"}
        for n in range(4)
    ]
    for part, rows in (("train", street[:2]), ("test", street[2:])):
        _write_csv(folder / "street" / f"images_v2_imagenet_{part}.csv", rows)
    geode = [
        {"file_path": f"{n:02d}.jpg", "object": ("stove", "bag")[n % 2], "region": "Africa", "ip_country": "Ghana"}
        for n in range(4)
    ]
    _write_csv(folder / "geode" / "index.csv", geode)
    for name in ("street", "geode"):
        (folder / name / "images").symlink_to("../../images")
    keys = ["0a1b2c3d4e5f6a7b", "ff00aa11bb22cc33"]
    for number, key in enumerate(keys):
        place = folder / "gldv2" / "test" / key[0] / key[1] / key[2]
        place.mkdir(parents=True)
        (place / f"{key}.jpg").write_bytes(image(number))
    solution = [
        {"id": key, "landmarks": marks, "Usage": "Public"} for key, marks in zip(keys, ["12 3", "3"], strict=True)
    ]
    _write_csv(folder / "gldv2" / "recognition_solution_v2.1.csv", solution)
    commons = "http://commons.wikimedia.org/wiki/Category:"
    names = [{"landmark_id": n, "category": f"{commons}Haus_{n}"} for n in (3, 12)]
    _write_csv(folder / "gldv2" / "train_label_to_category.csv", names)
