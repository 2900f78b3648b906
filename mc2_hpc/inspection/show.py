"""``mc2 data show``: single samples as a run reads them."""

from collections.abc import Iterator
from dataclasses import dataclass

from mc2_hpc.data.locations import ShardSet, find_shards
from mc2_hpc.data.remote import CannotReach
from mc2_hpc.data.shards import Shard
from mc2_hpc.data.skips import ShardError
from mc2_hpc.data.stream import Deck
from mc2_hpc.draws import random_uint64
from mc2_hpc.drops import Dropped
from mc2_hpc.errors import UserError
from mc2_hpc.images import image_size, load_rgb, open_image, thumbnail
from mc2_hpc.samples import Caption, pairing_key
from mc2_hpc.shard_paths import Names

_THUMBNAIL = 480


@dataclass(frozen=True)
class ShownSample:
    """A sample with all its captions, and what keeps it from being used."""

    shard: str
    key: str
    captions: list[Caption]
    format: str = ""
    width: int = 0
    height: int = 0
    size: int = 0
    """Bytes."""
    problems: tuple[str, ...] = ()
    """Reasons (:data:`mc2_hpc.drops.MEANINGS`) with details."""
    jpeg: bytes = b""
    """A small copy of the image, if it can be decoded."""


def draw_samples(data: Names, count: int, *, seed: int = 0) -> Iterator[ShownSample]:
    """``count`` samples, good or bad, in an order drawn from ``seed``; the shards are drawn first.

    Raises:
        UserError: no shards, or none of them can be read, or remote storage cannot be reached.
    """
    shards = find_shards(data)
    order = Deck([name.rpartition("/")[2] for name in shards.names], lanes=1, seed=seed).order(0).tolist()
    left, errors = count, []
    for number in order:
        if left == 0:
            return
        try:
            shard = _open(shards, number)
        except ShardError as error:
            errors.append(f"{shards.names[number]}: {error}")
            continue
        words = random_uint64(shard.row_hashes(), seed=seed, epoch=0, purpose="show")
        rows = {shard.row_keys[row]: None for row in words.argsort(kind="stable")[: _enough(shard, left)].tolist()}
        index_of = _indices(shard)
        for key in list(rows)[:left]:
            left -= 1
            yield _sample(shard, key, index_of[key])
    if len(errors) == len(order):
        raise UserError(f"no shard can be read: {errors[0]}")


def _enough(shard: Shard, count: int) -> int:
    """Rows that surely have ``count`` distinct keys, or all rows."""
    return len(shard.row_keys) if len(shard.row_keys) > shard.num_keys else count


def find_samples(data: Names, key: str) -> list[ShownSample]:
    """The samples with a key, one for each shard that has it.

    Raises:
        UserError: no shards, or none of them has the key.
    """
    shards = find_shards(data)
    wanted = pairing_key(key)
    found, unreadable = [], 0
    for shard in _readable(shards):
        if shard is None:
            unreadable += 1
            continue
        for name, index in _indices(shard).items():
            if pairing_key(name) == wanted:
                found.append(_sample(shard, name, index))
    if not found:
        damaged = f"; {unreadable} of them cannot be read" if unreadable else ""
        raise UserError(f"none of {len(shards.names)} shards has the key {key!r}{damaged}")
    return found


def _readable(shards: ShardSet) -> Iterator[Shard | None]:
    for number in range(len(shards.names)):
        try:
            yield _open(shards, number)
        except ShardError:
            yield None


def _open(shards: ShardSet, number: int) -> Shard:
    try:
        return shards.open(number)
    except CannotReach as error:
        raise UserError(str(error)) from None


def _indices(shard: Shard) -> dict[str, int]:
    """The number of each key's image."""
    return {key: index for index, key in enumerate(dict.fromkeys(shard.row_keys))}


def _sample(shard: Shard, key: str, index: int) -> ShownSample:
    problems: list[str] = []
    captions: list[Caption] = []
    try:
        captions = shard.read_captions(index)
    except Dropped as dropped:
        problems.append(str(dropped))
    try:
        data = shard.read_image(index)
        image, (width, height) = open_image(data), image_size(data)
        facts = {"format": image.format or "", "width": width, "height": height, "size": len(data)}
        load_rgb(image)
        small = thumbnail(data, _THUMBNAIL)
    except Dropped as dropped:
        if str(dropped) not in problems:  # a missing image is found twice
            problems.append(str(dropped))
        return ShownSample(shard.name, key, captions, problems=tuple(problems))
    return ShownSample(shard.name, key, captions, problems=tuple(problems), jpeg=small, **facts)  # type: ignore[arg-type]
