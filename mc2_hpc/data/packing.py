"""Writing image-text pairs as plain WebDataset shards."""

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from mc2_hpc.data.crop import Encoded
from mc2_hpc.data.shards import Pair
from mc2_hpc.storage import atomic_path
from mc2_hpc.tar import escapes, write_tar


def write_shard(path: str | Path, samples: Iterable[tuple[str, Mapping[str, Encoded]]]) -> None:
    """Write samples, each ``(key, {extension: payload})``, as a WebDataset tar, atomically.

    The same samples give the same bytes: there are no times or owners.

    Raises:
        ValueError: a key would lead out of its folder, or is too long for a tar header.
    """

    def members() -> Iterator[tuple[str, Encoded]]:
        for key, files in samples:
            for extension, payload in files.items():
                name = f"{key}.{extension}"
                if escapes(name):
                    raise ValueError(f"{name!r} is not a safe member name: it must not lead out of its folder")
                yield name, payload

    with atomic_path(path) as temporary:
        write_tar(temporary, members())


def pack_pairs(pairs: Iterable[Pair], folder: str | Path, *, pairs_per_shard: int = 1000) -> list[Path]:
    """Write pairs as plain WebDataset shards ``00000.tar`` ... in ``folder``, in order; returns their paths.

    The same pairs give the same bytes. Images are stored as they are, under the extension of their format.

    Raises:
        ValueError: a key cannot name a member, or has a dot in its last part, where readers would end it.
    """
    paths: list[Path] = []
    remaining = iter(pairs)
    while batch := list(itertools.islice(remaining, pairs_per_shard)):
        path = Path(folder) / f"{len(paths):05d}.tar"
        write_shard(path, ((pair.key, _files_of(pair)) for pair in batch))
        paths.append(path)
    return paths


def _files_of(pair: Pair) -> dict[str, Encoded]:
    if "." in pair.key.rpartition("/")[2]:
        raise ValueError(f"key {pair.key!r}: WebDataset readers end a key at its first dot")
    files: dict[str, Encoded] = {_image_extension(pair.image): pair.image, "txt": pair.text.encode("utf-8")}
    if pair.lang:
        files["json"] = json.dumps({"lang": pair.lang}).encode()
    return files


def _image_extension(data: Encoded) -> str:
    if data[:4] == b"\x89PNG":
        return "png"
    return "webp" if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else "jpg"
