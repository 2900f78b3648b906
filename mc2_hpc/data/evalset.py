"""Every picture of a set of shards once, in order, with all of its captions: what retrieval and classification read."""

import itertools
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from mc2_hpc.data.decode import EvalTransform, one_torch_thread
from mc2_hpc.data.locations import find_shards
from mc2_hpc.data.shards import CaptionedImage, Shard
from mc2_hpc.data.skips import ShardError, log_skip
from mc2_hpc.drops import Drop, Dropped
from mc2_hpc.errors import UserError

_Loaded = tuple[CaptionedImage, torch.Tensor]


@dataclass
class EvalBatch:
    """Some pictures of this rank.

    Attributes:
        images: uint8 ``(b, 3, S, S)``.
        keys: of each picture.
        texts, langs: all captions of each picture, and their languages (empty where the data do not say).
    """

    images: torch.Tensor
    keys: list[str]
    texts: list[list[str]]
    langs: list[list[str]]


class EvalBatches:
    """The pictures of ``shards`` in order, ``batch`` at a time; every iteration is a pass over all of them.

    Args:
        shards: curated or plain ones; a folder, file or pattern, local or remote (``mc2_hpc.data.locations``).
        image_size: side of the square pictures.
        batch: pictures a batch; the last one may have fewer.
        rank, world_size: picture ``i`` of the set goes to rank ``i % world_size``. Ranks differ by one picture at most,
            and by those they skip; a rank may have none.
        transform: ``shortest`` (resize the shortest side, crop the centre) or ``squash``.
        decode: ``turbo_exact``, ``pil`` or ``auto``.
        threads: that decode.

    Attributes:
        skipped: what the passes so far left out, by reason (``mc2_hpc.data.skips``); rank 0 counts whole shards.

    Raises:
        UserError: no shards, an unknown transform or backend; and while iterating: not one picture is there, or with
            one rank, not one is usable.
    """

    def __init__(
        self,
        shards: str | Path,
        *,
        image_size: int,
        batch: int,
        rank: int = 0,
        world_size: int = 1,
        transform: str = "shortest",
        decode: str = "auto",
        threads: int = 1,
    ) -> None:
        self.skipped: Counter[str] = Counter()
        self._shards = find_shards(shards)
        self._name = str(shards)
        self._transform = EvalTransform(image_size, transform, decode)
        self._batch = batch
        self._rank = rank
        self._world_size = world_size
        self._threads = threads

    def __iter__(self) -> Iterator[EvalBatch]:
        ready: list[_Loaded] = []
        num_good = 0
        with ThreadPoolExecutor(self._threads) as executor:
            places = self._places()
            while group := list(itertools.islice(places, self._batch)):
                with one_torch_thread():
                    loaded = list(executor.map(self._load, group))
                for one in loaded:
                    if isinstance(one, Dropped):
                        self.skipped[one.reason] += 1
                    else:
                        ready.append(one)
                        num_good += 1
                while len(ready) >= self._batch:
                    yield _assemble(ready[: self._batch])
                    ready = ready[self._batch :]
        if ready:
            yield _assemble(ready)
        if num_good == 0 and self._world_size == 1:
            raise self._nothing()

    def _places(self) -> Iterator[tuple[Shard, int]]:
        number = 0
        for position, name in enumerate(self._shards.names):
            try:
                shard = self._shards.open(position)
            except ShardError as error:
                log_skip(Drop.SHARD_UNREADABLE, name, str(error))
                self.skipped[Drop.SHARD_UNREADABLE] += self._rank == 0
                continue
            for reason, count in shard.drops.items():
                self.skipped[reason] += count * (self._rank == 0)
            for index in range(shard.num_keys):
                if (number + index) % self._world_size == self._rank:
                    yield shard, index
            number += shard.num_keys
        if number == 0:
            raise self._nothing()

    def _load(self, place: tuple[Shard, int]) -> _Loaded | Dropped:
        shard, index = place
        try:
            picture = shard.read_image(index)
            return picture, self._transform(picture.image)
        except Dropped as skip:
            log_skip(skip.reason, f"{shard.name}, picture {index}", skip.detail)
            return skip

    def _nothing(self) -> UserError:
        counts = ", ".join(f"{reason} {count}" for reason, count in self.skipped.most_common())
        return UserError(f"{self._name}: not one picture can be used; everything was skipped: {counts or 'unreadable'}")


def _assemble(loaded: list[_Loaded]) -> EvalBatch:
    return EvalBatch(
        images=torch.stack([image for _, image in loaded]),
        keys=[picture.key for picture, _ in loaded],
        texts=[picture.texts for picture, _ in loaded],
        langs=[picture.langs for picture, _ in loaded],
    )
