"""A small worldwide pool of coloured squares, its metadata, evaluation set, base config, and ablation files."""

import io
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from mc2_hpc.data.packing import write_shard
from mc2_hpc.metadata.files import write_entries

NAMES = {
    "en": ["red", "green", "blue", "white"],
    "de": ["rot", "grün", "blau", "weiß"],
    "fr": ["rouge", "vert", "bleu", "blanc"],
}
FORMS = {"en": "a {} square number {}", "de": "ein Bild in {} Nummer {}", "fr": "une image en {} numéro {}"}
LANGUAGES = ["en", "en", "en", "de", "de", "fr"]


def _square(colour: str, seed: int) -> bytes:
    image = Image.new("RGB", (32, 32), "black")
    image.paste(colour, (4 + seed % 5, 4 + seed % 3, 28, 28))
    data = io.BytesIO()
    image.save(data, "JPEG")
    return data.getvalue()


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """``pool``, ``metadata``, ``test.parquet``, ``suite.yaml`` and ``base.yaml``; read-only."""
    folder = tmp_path_factory.mktemp("ablation")
    rng = random.Random(0)
    colours = NAMES["en"]
    for shard in range(2):
        rows, images = [], []
        for number in range(60):
            key, lang = f"{shard}-{number:03d}", LANGUAGES[number % len(LANGUAGES)]
            colour = rng.choices(range(4), weights=[8, 4, 2, 1])[0]
            text = "IMG_0001.JPG" if number % 10 == 9 else FORMS[lang].format(NAMES[lang][colour], number)
            images.append((key, {"jpg": _square(colours[colour], number)}))
            rows.append({"key": key, "text": text, "lang": lang})
        write_shard(folder / "pool" / f"{shard}.tar", images)
        pq.write_table(pa.Table.from_pylist(rows), folder / "pool" / f"{shard}.parquet")
    for lang, names in NAMES.items():
        write_entries(folder / "metadata" / f"{lang}.json", names)
    test = [{"key": f"t{n}", "label": colours[n % 4], "jpg": _square(colours[n % 4], n)} for n in range(20)]
    pq.write_table(pa.Table.from_pylist(test), folder / "test.parquet")
    options = {"classes": colours, "names": NAMES, "templates": {lang: ["{}"] for lang in NAMES}}
    colour_set = {"reader": "labelled_parquet", "path": "test.parquet", "options": options}
    _write(folder / "suite.yaml", {"root": str(folder), "sets": {"colours": colour_set}})
    _write(
        folder / "base.yaml",
        {
            "steps": 3,
            "global_batch": 16,
            "precision": "fp32",
            "model": {
                "preset": "ViT-S-16-worldwide",
                "embed_dim": 16,
                "vision": {"image_size": 32, "width": 32, "layers": 1, "head_width": 16},
                "text": {"context_length": 24, "width": 32, "heads": 2, "layers": 1},
            },
            "data": {"lanes": 4, "workers": 0},
            "optim": {"warmup": 1},
            "zero": {"stage": 0},
            "checkpoint": {"background": False},
        },
    )
    return folder


def _write(path: Path, values: dict[str, Any]) -> None:
    path.write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8")


@pytest.fixture
def ablation_file(data, tmp_path) -> Callable[..., Path]:
    """``ablation_file(name, rows, **changes)``: an ablation of the pool with one seed."""

    def make(name: str, rows: list[dict[str, Any]], **changes: Any) -> Path:
        values = {
            "title": f"The {name}",
            "mirrors": "table 9",
            "finding": "One row is better.",
            "data": {"root": str(data), "pool": "${data.root}/pool", "metadata": "${data.root}/metadata"},
            "suite": "${data.root}/suite.yaml",
            "base": str(data / "base.yaml"),
            "curation": {"t_en": 5},
            "tokenizer": {"style": "xlmv", "vocab_size": 90},
            "columns": {
                "English": {"set": "colours", "languages": ["en"]},
                "others": {"set": "colours", "without": ["en"]},
                "worst": {"set": "colours", "reduce": "min"},
            },
            "seeds": [0],
            "rows": rows,
            **changes,
        }
        _write(tmp_path / f"{name}.yaml", values)
        return tmp_path / f"{name}.yaml"

    return make
