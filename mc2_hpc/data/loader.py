"""Batches for training: lanes assigned to ranks and workers, images and captions as tensors, exact positions.

    loader = TrainLoader(config, global_batch=1024, image_size=224, tokenizer=tokenizer, rank=0, world_size=1)
    for batch in loader:  # endless
        ...

A step takes ``global_batch / lanes`` samples from every lane. Rank ``r`` of ``W`` owns lanes ``r*L//W`` up to
``(r+1)*L//W``, its workers divide them in the same way, and a batch has its samples in lane order. So its content
depends neither on the number of ranks nor on the number of workers.

Worker processes make shares of batches (``source``), this process waits for them (``workers``), and they are joined
here or through DALI's pipeline (``dali_batches``).
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from mc2_hpc.config import DataConfig
from mc2_hpc.data.batches import Batch, join
from mc2_hpc.data.dali import DaliDecoder
from mc2_hpc.data.dali_batches import decoded_by_dali
from mc2_hpc.data.decode import resolve_backend
from mc2_hpc.data.features import StoredFeatures
from mc2_hpc.data.lanes import check_ranks, deal
from mc2_hpc.data.limits import check_memory, check_open_files, check_shared_memory
from mc2_hpc.data.mixing import LanePosition, from_plain, in_sources, place_in
from mc2_hpc.data.pools import open_sources
from mc2_hpc.data.source import ShareSource
from mc2_hpc.data.stream import Position
from mc2_hpc.data.takedown import Takedown
from mc2_hpc.data.teacher import TeacherNeeds
from mc2_hpc.data.tokenizer import Tokenizer
from mc2_hpc.data.watch import Board
from mc2_hpc.data.workers import DataStalled, WorkerShares
from mc2_hpc.errors import UserError

__all__ = ["Batch", "DataStalled", "TrainLoader"]

logger = logging.getLogger(__name__)


class TrainLoader:
    """An endless iterator of this rank's :class:`Batch` es.

    Args:
        config: the ``data`` part of a run's config.
        global_batch: pairs per step over all ranks; a multiple of ``config.lanes``.
        image_size: side of the square images.
        tokenizer: encodes the captions.
        rank, world_size: of this process among the training ranks.
        position: of every lane, as in batches or as in checkpoints (keys may be strings, as in JSON), or None to
            start. Lanes of other ranks are ignored, so one dict serves any number of ranks. Sources that it does not
            have begin at their start.
        takedown: list of samples to leave out; None: there will not be one.
        teacher: what it needs besides the student's images and token ids (:attr:`Samples.teacher`).

    Raises:
        UserError: bad sizes, no shards, no balance folder, no stored features, or a position with other lanes; while
            iterating: data without a single usable sample, or with fewer samples than lanes.
        DataStalled: while iterating.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        global_batch: int,
        image_size: int,
        tokenizer: Tokenizer,
        rank: int,
        world_size: int,
        position: Mapping[int, Any] | Mapping[str, Any] | None = None,
        takedown: Takedown | None = None,
        teacher: TeacherNeeds | None = None,
    ) -> None:
        lanes = config.lanes
        if global_batch % lanes:
            raise UserError(f"global_batch={global_batch} is not a multiple of data.lanes={lanes}: choose a divisor")
        check_ranks(world_size, lanes)
        own = deal(range(lanes), rank, world_size)
        num_workers = min(config.workers, len(own))
        if num_workers < config.workers:
            logger.info("rank %d: %d data workers, not %d: it has no more lanes", rank, len(own), config.workers)
        backend = resolve_backend(config.decode, "train")
        teacher_size = 0
        if teacher is not None:
            teacher.check(backend)
            teacher_size = teacher.image_size or 0
        self.sources = open_sources(config, urls=takedown is not None)
        """At least one; a single one has no name unless the config gives it one."""
        self._stored: StoredFeatures | None = None
        if config.features is not None:
            names = [name for source in self.sources for name in source.shards.names]
            self._stored = StoredFeatures(config.features, names)
        self._taught: dict[str, StoredFeatures] | None = None
        if teacher is not None and teacher.features is not None:
            self._taught = {
                source.name: StoredFeatures(teacher.features, source.shards.names, source.name)
                for source in self.sources
            }
        check_open_files(
            shards=len(own) * len(self.sources), workers=num_workers, prefetch=config.prefetch, world_size=world_size
        )
        if backend != "dali" and self._stored is None:  # the size of a JPEG is not known in advance
            image_bytes = 3 * (image_size**2 + teacher_size**2)
            share_bytes = -(-len(own) // max(1, num_workers)) * (global_batch // lanes) * image_bytes
            check_memory(share_bytes * max(1, num_workers))
            check_shared_memory(share_bytes, workers=num_workers, prefetch=config.prefetch)
        self._config, self._own, self._rank = config, own, rank
        self._tokenizer, self._image_size, self._backend = tokenizer, image_size, backend
        self._samples_per_lane, self._num_workers, self._teacher = global_batch // lanes, num_workers, teacher
        self._batches: Iterator[Batch] = iter(())
        self._begin(position, takedown)

    def _begin(self, position: Mapping[int, Any] | Mapping[str, Any] | None, takedown: Takedown | None) -> None:
        config = self._config
        source = ShareSource(
            config,
            self.sources,
            backend=self._backend,
            image_size=self._image_size,
            tokenizer=self._tokenizer,
            samples_per_lane=self._samples_per_lane,
            positions=_own_positions(position, self._own, config.lanes, [source.name for source in self.sources]),
            board=Board(max(1, self._num_workers)),
            stored=self._stored,
            taught=self._taught,
            takedown=takedown,
            teacher=self._teacher,
        )
        self._shares = WorkerShares(
            source,
            num_workers=self._num_workers,
            prefetch=config.prefetch,
            rank=self._rank,
            stall_seconds=config.stall_seconds,
        )
        pin = torch.cuda.is_available()
        pad_id = self._tokenizer.pad_id
        if self._backend == "dali":
            decoder = DaliDecoder(
                image_size=self._image_size,
                max_batch=len(self._own) * self._samples_per_lane,
                device=torch.device("cuda", torch.cuda.current_device()) if pin else torch.device("cpu"),
                num_threads=max(1, config.workers),
                hw_decoder_load=config.hw_decoder_load,
            )
            self._batches = decoded_by_dali(self._shares, decoder, pad_id=pad_id)
        else:
            self._batches = (join(shares, pad_id=pad_id, pin=pin) for shares in self._shares)

    def __iter__(self) -> "TrainLoader":
        return self

    def __next__(self) -> Batch:
        return next(self._batches)

    def restart(self, position: Mapping[int, LanePosition], takedown: Takedown) -> None:
        """Continue at ``position`` with another takedown list; batches that workers have prepared are discarded.

        If it raises, the loader has no more batches.
        """
        self._batches = iter(())
        self.close()
        self._begin(position, takedown)

    def close(self) -> None:
        """Stop the workers."""
        self._shares.close()


def _own_positions(
    position: Mapping[int, Any] | Mapping[str, Any] | None, own: Sequence[int], lanes: int, names: Sequence[str]
) -> dict[int, LanePosition]:
    known: dict[int, LanePosition] = {}
    if position is not None:
        known = {int(lane): from_plain(place) for lane, place in position.items()}
        if max(known, default=0) >= lanes or not set(own) <= set(known):
            raise UserError(
                f"the position to resume from has {max(known, default=-1) + 1} lanes, but data.lanes={lanes}: "
                f"lanes cannot change during a run"
            )
    if all(names):
        return {lane: in_sources(known.get(lane), names) for lane in own}
    return {lane: place_in(known.get(lane, Position()), "") for lane in own}
