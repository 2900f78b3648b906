"""Images for the report, copied from the shards to ``output/images``."""

from collections import Counter
from pathlib import Path
from typing import Any

from mc2_hpc.curation.matched import read_matched
from mc2_hpc.curation.pool.image_tars import TarIndex
from mc2_hpc.reading.parquet_file import open_parquet
from mc2_hpc.shard_paths import list_shards
from mc2_hpc.storage import atomic_path

_SAMPLES = 16


def draw_samples(output: Path) -> list[dict[str, Any]]:
    """Images of the pool with all of their captions, for the report; captions that curation dropped are ``noise``.

    They come from the first shard: images with several captions, chosen to show as many languages as possible.
    """
    captions = list_shards(output / "pool", ".parquet")[0]
    matched = read_matched(output / "curated" / "matched" / captions.name, ["key", "text"])
    kept = set(zip(matched["key"].to_pylist(), matched["text"].to_pylist(), strict=True))
    rows: dict[str, list[dict[str, Any]]] = {}
    with open_parquet(captions) as file:
        table = file.read()
    for row in table.to_pylist():
        noise = (row["key"], row["text"]) not in kept
        rows.setdefault(row["key"], []).append({"lang": row["lang"], "text": row["text"], "noise": noise})
    samples = [{"key": key, "captions": rows[key]} for key in _varied(rows)]
    save_images(output, output / "pool", samples)
    return samples


def save_images(output: Path, shards: Path, entries: list[dict[str, Any]]) -> None:
    """Copy the image of every entry's ``key`` to ``output/images`` and store its path under ``image``."""
    wanted = {f"{entry['key']}.jpg" for entry in entries}
    for path in list_shards(shards, ".tar"):
        with TarIndex(path) as tar:
            for member in (member for member in tar.members if member.name in wanted):
                with atomic_path(output / "images" / member.name) as temporary:
                    temporary.write_bytes(tar.read(member))
                wanted.discard(member.name)
        if not wanted:
            break
    for entry in entries:
        entry["image"] = f"images/{entry['key']}.jpg"


def _varied(rows: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Keys of images with at least three captions, each chosen for the languages shown least so far."""
    shown: Counter[str] = Counter()
    left = [key for key, captions in rows.items() if len(captions) >= 3]
    keys: list[str] = []
    while left and len(keys) < _SAMPLES:
        best = min(left, key=lambda key: max(shown[caption["lang"]] for caption in rows[key]))
        left.remove(best)
        keys.append(best)
        shown.update(caption["lang"] for caption in rows[best])
    return keys
