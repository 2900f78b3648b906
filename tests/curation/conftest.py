"""A small pool with images and metadata, and the output of a stage."""

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mc2_hpc.storage import write_json
from mc2_hpc.tar import write_tar


@pytest.fixture
def make_pool(tmp_path) -> Callable[[int], Path]:
    """``make_pool(shards)``: a folder of shards with 30 English and German captions each, beside ``metadata``."""

    def make(shards: int) -> Path:
        write_json(tmp_path / "metadata" / "en.json", ["dog", "cat", "big dog"])
        write_json(tmp_path / "metadata" / "de.json", ["Hund", "Katze"])
        (tmp_path / "pool").mkdir()
        for shard in range(shards):
            keys = [f"{shard}-{n:03d}" for n in range(30)]
            texts = [f"a big dog {n}" if n % 3 else f"Hund und Katze {n}" for n in range(30)]
            langs = ["en" if n % 3 else "de" for n in range(30)]
            path = tmp_path / "pool" / f"{shard}.parquet"
            pq.write_table(pa.table({"key": keys, "text": texts, "lang": langs}), path)
            write_tar(path.with_suffix(".tar"), ((f"{key}.jpg", key.encode()) for key in keys))
        return tmp_path / "pool"

    return make
