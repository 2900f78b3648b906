"""Image features in files, for training with a frozen image tower: computed once, read in place of images.

    features.json                   what they were computed with (:class:`FeatureFacts`), and their width
    <shard>.tar.safetensors         one for each shard:
        hashes                      int64 (n,): bits of each image's key hash, in ascending order as uint64
        features                    float32 (n, E), of unit length; 0 for an image that cannot be used
        reasons                     uint8: JSON, reason why an image cannot be used by its row here
        num_bytes                   int64 (): size of the tar

Shards are known by their file names, as for the order of samples, so a folder of shards may move. Another data set
often has the same names and keys; the sizes of the tars tell it apart.
"""

import functools
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mc2_hpc.data.shards import Shard
from mc2_hpc.drops import Drop, Dropped
from mc2_hpc.errors import UserError, first_line
from mc2_hpc.models.weights import write_tensors
from mc2_hpc.reading.json_file import File, Sha256, Size, read_json
from mc2_hpc.reading.tensors import read_header
from mc2_hpc.storage import write_json

FACTS = "features.json"
_OPEN = 512
"""Shards whose features a process keeps open."""


@dataclass(frozen=True, kw_only=True)
class FeatureFacts:
    """All that image features depend on besides the images."""

    image_tower: str
    """SHA-256 of its weights."""
    image_size: int
    decode: str
    crop_scale: tuple[float, float]
    seed: int
    """``data.seed``: features are those of the crops of the first epoch."""
    max_image_pixels: int
    precision: str


class _Facts(File):
    """``features.json``."""

    image_tower: Sha256
    image_size: Size
    decode: Literal["turbo", "turbo_exact", "pil"]
    crop_scale: tuple[float, float]
    seed: int
    max_image_pixels: Size
    precision: Literal["fp32", "bf16"]
    width: Size


def write_facts(folder: Path, facts: FeatureFacts, width: int) -> None:
    """Write ``features.json``, or check that the one there says the same.

    Raises:
        UserError: the folder cannot be written, or has features of another model or preprocessing.
    """
    if (folder / FACTS).is_file():
        check_facts(folder, facts)
    else:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / FACTS, {**asdict(facts), "width": width})
        except OSError as error:
            raise UserError(f"{folder}: cannot be written ({error.strerror or error}); name a folder") from None


def check_facts(folder: Path, facts: FeatureFacts) -> None:
    """
    Raises:
        UserError: the features in ``folder`` are those of another model or preprocessing.
    """
    found = msgspec.structs.asdict(_read_facts(folder))
    for key, expected in asdict(facts).items():
        if found[key] != expected:
            raise UserError(
                f"{folder}: features with {key} {_shown(found[key])}, but this run has {_shown(expected)}; "
                f"compute them with this run's settings (mc2 features), in another folder"
            )


def _read_facts(folder: Path) -> _Facts:
    return read_json(folder / FACTS, _Facts, what="facts about image features")


def _shown(value: object) -> str:
    return f"{value[:12]}..." if isinstance(value, str) and len(value) == 64 else str(value)


def feature_file(folder: Path, shard: str) -> Path:
    """Where the features of a shard are, by the shard's name, path or address."""
    return folder / f"{shard.rpartition('/')[2]}.safetensors"


def check_shard_names(shards: Sequence[str]) -> None:
    """
    Args:
        shards: names, paths or addresses.

    Raises:
        UserError: two have the same file name, so that their features would be in one file.
    """
    found: dict[str, str] = {}
    for name in shards:
        own = name.rpartition("/")[2]
        if own in found:
            raise UserError(f"{found[own]} and {name}: features are stored by the shards' file names; rename one")
        found[own] = name


def write_features(
    path: Path, hashes: npt.NDArray[np.uint64], features: Tensor, reasons: Mapping[int, Drop], *, num_bytes: int
) -> None:
    """Write a shard's features atomically.

    Args:
        hashes: of the images' keys, in any order, each once.
        features: (n, E) in the same order.
        reasons: why images cannot be used, by their row.
        num_bytes: size of the shard's tar.

    Raises:
        UserError: the file cannot be written.
    """
    order = np.argsort(hashes)
    place = {int(row): new for new, row in enumerate(order)}
    named = {place[row]: str(reason) for row, reason in reasons.items()}
    tensors = {
        "hashes": torch.from_numpy(hashes[order].view(np.int64)),
        "features": features[torch.from_numpy(order)].contiguous(),
        "reasons": torch.frombuffer(bytearray(json.dumps(named, sort_keys=True).encode()), dtype=torch.uint8),
        "num_bytes": torch.tensor(num_bytes),
    }
    try:
        write_tensors(path, tensors)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: cannot be written ({first_line(error)})") from None


class StoredFeatures:
    """The features of a run's images; picklable."""

    def __init__(self, folder: str | Path, shards: Sequence[str]) -> None:
        """
        Args:
            shards: names, paths or addresses of those that the run reads.

        Raises:
            UserError: there are no features, those of a shard are missing, or two shards have the same file name.
        """
        check_shard_names(shards)
        self.folder = Path(folder)
        if not (self.folder / FACTS).is_file():
            raise UserError(f"data.features={folder}: no image features there; compute them with mc2 features")
        self.width = _read_facts(self.folder).width
        try:
            there = set(os.listdir(self.folder))
        except OSError as error:
            raise UserError(f"{self.folder}: cannot be listed ({error.strerror or error})") from None
        missing = [name for name in shards if feature_file(self.folder, name).name not in there]
        if missing:
            raise UserError(
                f"{self.folder}: no features of {len(missing)} shards, such as {missing[0]}; "
                f"run mc2 features again, which computes only what is missing"
            )

    def read(self, shard: Shard, key_hash: np.uint64) -> Tensor:
        """The feature (E,) of an image of ``shard``, by the hash of its key.

        Raises:
            Dropped: the image cannot be used.
            UserError: its features are missing, damaged, or those of another shard of the same name.
        """
        path = feature_file(self.folder, shard.name)
        stored = _open(path, self.width)
        if shard.num_bytes != stored.num_bytes:
            raise UserError(
                f"{shard.name}: has {shard.num_bytes:,} bytes, but its features are those of a shard of "
                f"{stored.num_bytes:,} bytes; name a folder of its own for each data set or, if it has changed, "
                f"{_again(path)}"
            )
        row = int(np.searchsorted(stored.hashes, key_hash))
        if row == len(stored.hashes) or stored.hashes[row] != key_hash:
            raise UserError(f"{shard.name}: has an image without features, so it has changed since; {_again(path)}")
        if (reason := stored.reasons.get(row)) is not None:
            raise Dropped(reason, "when its features were computed")
        return stored.features[row]


@dataclass(frozen=True)
class _OfShard:
    hashes: npt.NDArray[np.uint64]
    features: Tensor
    reasons: Mapping[int, Drop]
    num_bytes: int


@functools.lru_cache(maxsize=_OPEN)
def _open(path: Path, width: int) -> _OfShard:
    """A shard's features, backed by the file's memory map."""
    header = read_header(path)
    num = header["hashes"].shape[0] if "hashes" in header else 0
    expected = {"hashes": ("I64", (num,)), "features": ("F32", (num, width)), "num_bytes": ("I64", ())}
    if any(name not in header or (header[name].dtype, header[name].shape) != what for name, what in expected.items()):
        raise UserError(f"{path}: damaged image features; {_again(path)}")
    try:
        with safe_open(path, framework="pt") as file:
            names = ("hashes", "features", "reasons", "num_bytes")
            hashes, features, reasons, num_bytes = map(file.get_tensor, names)
        named = msgspec.json.decode(bytes(reasons.numpy()), type=dict[str, Drop])
        rows = {int(row): reason for row, reason in named.items()}
    except (SafetensorError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"{path}: damaged image features ({first_line(error)}); {_again(path)}") from None
    return _OfShard(hashes.numpy().view(np.uint64), features, rows, int(num_bytes))


def _again(path: Path) -> str:
    return f"remove {path.name} and run mc2 features again"
