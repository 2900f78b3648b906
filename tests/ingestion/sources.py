"""Small sources, and reading back what was packed."""

import io
from collections.abc import Mapping
from pathlib import Path

from PIL import Image

from mc2_hpc import jobs
from mc2_hpc.data.shards import open_shard
from mc2_hpc.images import load_rgb, open_image
from mc2_hpc.ingestion.pack import plan_pack
from mc2_hpc.ingestion.samples import PackOptions

COLOURS = ("red", "lime", "blue", "yellow", "cyan", "magenta", "white", "black")
ENGLISH = PackOptions(lang="en")


def picture(number: int = 0, kind: str = "JPEG", mode: str = "RGB", size: tuple[int, int] = (40, 30), **save) -> bytes:
    image = Image.new("RGB", size, COLOURS[number % 8])
    image.paste(COLOURS[number // 8 % 8], (8, 8, 24, 24))
    data = io.BytesIO()
    image.convert(mode).save(data, kind, **save)
    return data.getvalue()


def write_files(folder: Path, files: Mapping[str, bytes | str]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def pack(source, out, options=ENGLISH, **more):
    """The counters of packing a source."""
    return jobs.run(plan_pack(source, out, options=options, **more))


def read_back(folder: Path) -> dict[str, tuple[bytes, list[tuple[str, str]]]]:
    """Key -> (image, captions with languages) of packed shards, through the loader's own reader."""
    found = {}
    for path in sorted(folder.rglob("*.tar")):
        shard = open_shard(path)
        assert not shard.drops
        for index in range(shard.num_keys):
            image = bytes(shard.read_image(index))
            load_rgb(open_image(image))
            key = shard.read(shard_row(shard, index), seed=0, epoch=0).key
            assert key not in found
            found[key] = (image, [tuple(caption) for caption in shard.read_captions(index)])
    return found


def shard_row(shard, index: int) -> int:
    """The first row of an image: captions of an image are adjacent."""
    row = 0
    for before in range(index):
        row += len(shard.read_captions(before))
    return row
