"""Features in files, computed once: of images, read in place of them where the image tower is frozen; or a teacher's,
of images and captions, read beside them.

    features.json                   what they were computed with (:class:`FeatureFacts`), and their width
    <shard>.tar.safetensors         one for each shard, in a folder of the source's name if the data is a mix:
        hashes                      int64 (n,): bits of each image's key hash, in ascending order as uint64
        features                    float32 (n, E), of unit length; 0 for an image that cannot be used
        reasons                     uint8: JSON, reason why an image cannot be used by its row here
        text_hashes                 int64 (m,): bits of the hash of each different caption, in the same order
        text_features               (m, E), of unit length
        images                      int64 (): digest of the images' keys, places and sizes
        stamp                       int64 (): digest of the shard's files' sizes and times, and of the caption fields

Captions are a teacher's alone, and its features have the type in which they enter the loss: float32 or, if the run
computes in bf16, bfloat16.

Shards are known by their file names, as for the order of samples, so a folder of shards may move. Another data set
often has the same names and keys; the digest of the images tells it apart.
"""

import functools
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mc2_hpc.config import DataConfig
from mc2_hpc.data.decode import AUTO, resolve_backend
from mc2_hpc.data.shards import Shard
from mc2_hpc.drops import Drop, Dropped
from mc2_hpc.errors import UserError, first_line
from mc2_hpc.models.weights import write_tensors
from mc2_hpc.precision import Precision
from mc2_hpc.reading.json_file import File, Sha256, Size, read_json
from mc2_hpc.reading.tensors import read_header
from mc2_hpc.storage import write_json

FACTS = "features.json"
_OPEN = 512
"""Shards whose features a process keeps open."""
_TYPES = {torch.float32: "F32", torch.bfloat16: "BF16"}
_AGAIN = "run mc2 features again, which computes what is missing or has changed"


@dataclass(frozen=True, kw_only=True)
class FeatureFacts:
    """All that features depend on besides images and captions."""

    image_tower: str | None = None
    """SHA-256 of its weights; None: features are a teacher's or, in a comparison, anyone's."""
    teacher: str | None = None
    """SHA-256 of its weights, tokenizer and preprocessing; None: features are an image tower's or anyone's."""
    image_size: int | None = None
    """None in a comparison: any."""
    decode: str
    crop_scale: tuple[float, float]
    seed: int
    """``data.seed``: features are those of the crops of the first epoch."""
    max_image_pixels: int
    precision: str

    @classmethod
    def of(cls, data: DataConfig, precision: str, **model: Any) -> "FeatureFacts":
        """Those of a run.

        Args:
            model: ``image_tower`` or ``teacher``, and ``image_size``; without them, of any model.
        """
        return cls(
            # Images that a GPU decodes for the student are decoded on the CPU for the features.
            decode=AUTO["train"] if data.decode == "dali" else resolve_backend(data.decode, "train"),
            crop_scale=data.crop_scale,
            seed=data.seed,
            max_image_pixels=data.max_image_pixels,
            precision=Precision(precision).untrained,
            **model,
        )


class _Facts(File):
    """``features.json``."""

    image_size: Size
    decode: Literal["turbo", "turbo_exact", "pil"]
    crop_scale: tuple[float, float]
    seed: int
    max_image_pixels: Size
    precision: Literal["fp32", "bf16"]
    width: Size
    image_tower: Sha256 | None = None
    teacher: Sha256 | None = None


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
        if expected is not None and found[key] != expected:
            raise UserError(
                f"{folder}: features with {key} {_shown(found[key])}, but this run has {_shown(expected)}; "
                f"compute them with this run's settings (mc2 features), in another folder"
            )


def teacher_of(folder: Path) -> str:
    """SHA-256 of the teacher whose features are in ``folder``.

    Raises:
        UserError: there are none.
    """
    facts = _read_facts(folder) if (folder / FACTS).is_file() else None
    if facts is None or facts.teacher is None:
        raise UserError(
            f"distill.features={folder}: no features of a teacher there; compute them with mc2 features --teacher MODEL"
        )
    return facts.teacher


def _read_facts(folder: Path) -> _Facts:
    return read_json(folder / FACTS, _Facts, what="facts about features")


def _shown(value: object) -> str:
    return f"{value[:12]}..." if isinstance(value, str) and len(value) == 64 else str(value)


def feature_file(folder: Path, shard: str) -> Path:
    """Where the features of a shard are, by the shard's name, path or address.

    Args:
        folder: with the files of its source.
    """
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
    path: Path,
    hashes: npt.NDArray[np.uint64],
    features: Tensor,
    reasons: Mapping[int, Drop],
    *,
    texts: tuple[Sequence[str], Tensor] | None = None,
    images_digest: int,
    stamp: str,
) -> None:
    """Write a shard's features atomically.

    Args:
        hashes: of the images' keys, in any order, each once.
        features: (n, E) in the same order.
        reasons: why images cannot be used, by their row.
        texts: different captions, and their features (m, E); None: not a teacher's.
        images_digest: of the shard.
        stamp: of the shard's files (:meth:`mc2_hpc.data.locations.ShardSet.stamp`) and of the caption fields.

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
        "images": torch.tensor(images_digest),
        "stamp": torch.tensor(_stamp_digest(stamp)),
    }
    if texts is not None:
        text_hashes = hash_texts(texts[0])
        order = np.argsort(text_hashes)
        tensors["text_hashes"] = torch.from_numpy(text_hashes[order].view(np.int64))
        tensors["text_features"] = texts[1][torch.from_numpy(order)].contiguous()
    try:
        write_tensors(path, tensors)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: cannot be written ({first_line(error)})") from None


def hash_texts(texts: Sequence[str]) -> npt.NDArray[np.uint64]:
    """The hashes by which captions are known, uint64 ``(len(texts),)``: BLAKE2b, because captions are anyone's."""
    digests = (hashlib.blake2b(text.encode(), digest_size=8).digest() for text in texts)
    return np.frombuffer(b"".join(digests), "<u8")


def _stamp_digest(stamp: str) -> int:
    return int(hash_texts([stamp]).view(np.int64)[0])


class StoredFeatures:
    """The features of a source's images, and of its captions if they are a teacher's; picklable."""

    def __init__(self, folder: str | Path, shards: Sequence[str], source: str = "") -> None:
        """
        Args:
            shards: names, paths or addresses of those that the run reads.
            source: their name in a mix.

        Raises:
            UserError: there are no features, those of a shard are missing, or two shards have the same file name.
        """
        check_shard_names(shards)
        if not (Path(folder) / FACTS).is_file():
            raise UserError(f"data.features={folder}: no image features there; compute them with mc2 features")
        facts = _read_facts(Path(folder))
        self.folder = Path(folder) / source
        self.width = facts.width
        self._dtype = Precision(facts.precision).dtype if facts.teacher is not None else None
        """Of a teacher's features; None for an image tower's."""
        try:
            there = set(os.listdir(self.folder))
        except FileNotFoundError:  # of a source that was added later
            there = set()
        except OSError as error:
            raise UserError(f"{self.folder}: cannot be listed ({error.strerror or error})") from None
        missing = [name for name in shards if feature_file(self.folder, name).name not in there]
        if missing:
            raise UserError(f"{self.folder}: no features of {len(missing)} shards, such as {missing[0]}; {_AGAIN}")

    def read(self, shard: Shard, key_hash: np.uint64) -> Tensor:
        """The feature (E,) of an image of ``shard``, by the hash of its key.

        Raises:
            Dropped: the image cannot be used.
            UserError: its features are missing, damaged, or those of another shard of the same name.
        """
        stored = self._open(shard.name)
        if shard.images_digest != stored.images_digest:
            raise UserError(
                f"{shard.name}: its features are those of other images; name a folder of its own for each data set or, "
                f"if it has changed, {_AGAIN}"
            )
        row = _place_of(key_hash, stored.hashes)
        if row is None:
            raise UserError(f"{shard.name}: has an image without features, so it has changed since; {_AGAIN}")
        if (reason := stored.reasons.get(row)) is not None:
            raise Dropped(reason, "when its features were computed")
        return stored.features[row]

    def read_pair(self, shard: Shard, key_hash: np.uint64, text: str) -> Tensor:
        """A teacher's features (2, E) of an image, as in :meth:`read`, and of one of its captions."""
        image, stored = self.read(shard, key_hash), self._open(shard.name)
        row = _place_of(hash_texts([text])[0], stored.text_hashes)
        if row is None:
            raise UserError(
                f"{shard.name}: has a caption without features: it has changed since, or the run draws captions from "
                f"other fields; {_AGAIN}"
            )
        return torch.stack([image, stored.text_features[row]])

    def _open(self, name: str) -> "ShardFeatures":
        return _open(feature_file(self.folder, name), self.width, self._dtype)


def _place_of(wanted: np.uint64, hashes: npt.NDArray[np.uint64]) -> int | None:
    """The place of a hash among ascending ones, or None."""
    place = int(np.searchsorted(hashes, wanted))
    return place if place < len(hashes) and hashes[place] == wanted else None


@dataclass(frozen=True)
class ShardFeatures:
    """Contents of a shard's file; n images, m captions."""

    hashes: npt.NDArray[np.uint64]
    features: Tensor
    reasons: Mapping[int, Drop]
    text_hashes: npt.NDArray[np.uint64]
    text_features: Tensor
    images_digest: int
    stamp: int

    def has_stamp(self, stamp: str) -> bool:
        """Whether they were computed with this stamp."""
        return self.stamp == _stamp_digest(stamp)

    def are_of(self, shard: Shard, hashes: npt.NDArray[np.uint64], texts: Sequence[str]) -> bool:
        """Whether they are of ``shard``: of its images, with keys of these hashes, and of all these captions."""
        return (
            shard.images_digest == self.images_digest
            and np.array_equal(np.sort(hashes), self.hashes)
            and bool(np.isin(hash_texts(texts), self.text_hashes).all())
        )


def load_features(path: Path, width: int, dtype: torch.dtype | None) -> ShardFeatures:
    """A shard's features, backed by the file's memory map.

    Args:
        dtype: of a teacher's features; None: there are no captions, and features are float32.

    Raises:
        UserError: the file is damaged or of another kind.
    """
    kind = _TYPES[dtype or torch.float32]
    try:
        header = read_header(path)
        num, num_texts = (header[name].shape[0] if name in header else 0 for name in ("hashes", "text_hashes"))
        expected = {"hashes": ("I64", (num,)), "features": (kind, (num, width))}
        expected |= {"images": ("I64", ()), "stamp": ("I64", ())}
        if dtype is not None:
            expected |= {"text_hashes": ("I64", (num_texts,)), "text_features": (kind, (num_texts, width))}
        found = {name: (header[name].dtype, header[name].shape) for name in expected if name in header}
        if found != expected:
            raise UserError(f"{path}: has other tensors than these features have")
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in (*expected, "reasons")}
        named = msgspec.json.decode(bytes(tensors["reasons"].numpy()), type=dict[str, Drop])
        rows = {int(row): reason for row, reason in named.items()}
    except (UserError, SafetensorError, OSError, RuntimeError, TypeError, ValueError) as error:
        reason = first_line(error).removeprefix(f"{path}: ")
        raise UserError(f"{path}: damaged features ({reason}); {_AGAIN}") from None
    return ShardFeatures(
        hashes=tensors["hashes"].numpy().view(np.uint64),
        features=tensors["features"],
        reasons=rows,
        text_hashes=tensors.get("text_hashes", torch.zeros(0, dtype=torch.int64)).numpy().view(np.uint64),
        text_features=tensors.get("text_features", torch.zeros(0, width)),
        images_digest=int(tensors["images"]),
        stamp=int(tensors["stamp"]),
    )


_open = functools.lru_cache(maxsize=_OPEN)(load_features)
