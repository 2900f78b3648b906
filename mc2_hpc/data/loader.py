"""Batches for training: lanes dealt to ranks and worker processes, pictures and captions as tensors, exact positions.

    loader = TrainLoader(config, global_batch=1024, image_size=224, tokenizer=tokenizer, rank=0, world_size=1)
    for batch in loader:  # endless
        ...

A step takes ``global_batch / lanes`` samples of every lane. Rank ``r`` of ``W`` owns lanes ``r*L//W`` up to
``(r+1)*L//W``, its workers share them likewise, and a batch has them in lane order: what it holds depends neither on
the number of ranks nor on that of workers.
"""

import logging
import multiprocessing
import signal
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from mc2_hpc.config import DataConfig
from mc2_hpc.data.balance import BalanceFolder
from mc2_hpc.data.decode import TrainTransform, one_torch_thread, resolve_backend
from mc2_hpc.data.stream import Example, Lane, Position, ShardPool
from mc2_hpc.data.tokenizer import Tokenizer
from mc2_hpc.errors import UserError
from mc2_hpc.storage import list_shards

WAIT_SECONDS = 300
"""Longest wait for one worker's share of a batch; then training stops with an error."""

# Workers are the fork server's children, so their death sends no signal here: it shows when a wait ends empty-handed.
_POLL_SECONDS = 5

_logger = logging.getLogger(__name__)


@dataclass
class Batch:
    """This rank's share of one step, in lane order.

    Attributes:
        images: uint8 ``(b, 3, S, S)``; pinned where there is a GPU.
        tokens: int64 ``(b, width)``, see :meth:`Tokenizer.encode`.
        keys, langs: of each sample; a language is empty where the data do not say.
        position: of every lane of this rank after this batch: what a checkpoint keeps.
        skipped: samples and shards skipped since the batch before, by reason (``mc2_hpc.data.skips``).
    """

    images: torch.Tensor
    tokens: torch.Tensor
    keys: list[str]
    langs: list[str]
    position: dict[int, Position]
    skipped: dict[str, int] = field(default_factory=dict)


class TrainLoader:
    """An endless iterator of this rank's :class:`Batch` es.

    Args:
        config: the ``data`` part of a run's config.
        global_batch: pairs a step over all ranks; a multiple of ``config.lanes``.
        image_size: side of the square pictures.
        tokenizer: encodes the captions.
        rank, world_size: of this process among those that train.
        position: of every lane, as batches and checkpoints have it (keys may be strings, values lists, as JSON makes
            them), or None to start. Lanes of other ranks are ignored, so one dict serves any number of ranks.

    Raises:
        UserError: bad sizes, no shards, no balance folder, a position of other lanes; and while iterating: data
            without a single usable sample, or with fewer samples than lanes.
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
        position: Mapping[int, Sequence[int]] | Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        lanes = config.lanes
        if global_batch % lanes:
            raise UserError(f"global_batch={global_batch} is not a multiple of data.lanes={lanes}: choose a divisor")
        if world_size > lanes:
            raise UserError(f"{world_size} ranks but data.lanes={lanes}: every rank needs a lane, so raise data.lanes")
        own = range(rank * lanes // world_size, (rank + 1) * lanes // world_size)
        self._source = _ChunkSource(
            config,
            backend=resolve_backend(config.decode, "train"),
            image_size=image_size,
            tokenizer=tokenizer,
            samples_a_lane=global_batch // lanes,
            positions=_own_positions(position, own, lanes),
        )
        self._rank = rank
        self._num_workers = min(config.workers, len(own))
        if self._num_workers < config.workers:
            _logger.info("rank %d: %d data workers, not %d: it has no more lanes", rank, len(own), config.workers)
        self._prefetch = config.prefetch
        self._pad_id = tokenizer.pad_id
        self._pin = torch.cuda.is_available()
        self._iterator: Iterator[Batch | _Failure] | None = None

    def __iter__(self) -> "TrainLoader":
        return self

    def __next__(self) -> Batch:
        if self._iterator is None:
            self._iterator = self._start()
        chunks = [self._next_chunk(worker) for worker in range(max(1, self._num_workers))]
        return _concatenate(chunks, pad_id=self._pad_id, pin=self._pin)

    def close(self) -> None:
        """Stop the workers. Iterating again would start from the original position."""
        self._iterator = None

    def _start(self) -> "Iterator[Batch | _Failure]":
        if self._num_workers == 0:
            return iter(self._source)
        # A process that has run torch threads, CUDA or DeepSpeed must not be forked. The fork server is a clean one,
        # which imports torch once; every worker is then forked from it in milliseconds.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        return iter(
            DataLoader(
                self._source,
                batch_size=None,
                num_workers=self._num_workers,
                prefetch_factor=self._prefetch,
                multiprocessing_context=context,
                timeout=min(_POLL_SECONDS, WAIT_SECONDS),
                collate_fn=_as_is,
                worker_init_fn=_prepare_worker,
            )
        )

    def _next_chunk(self, worker: int) -> Batch:
        assert self._iterator is not None
        deadline = time.monotonic() + WAIT_SECONDS
        while True:
            try:
                chunk = next(self._iterator)
                break
            except (RuntimeError, OSError, EOFError) as error:
                reason = (str(error) or type(error).__name__).splitlines()[0]
                if self._num_workers == 0 or "in DataLoader worker process" in reason:
                    raise  # the loading code's own error, with its traceback
                if "timed out" in reason:
                    if time.monotonic() < deadline:
                        continue
                    reason = f"waited {WAIT_SECONDS} s; is the storage of {self._source.name} reachable?"
                lanes = _share(sorted(self._source.positions), worker, self._num_workers)
                raise RuntimeError(
                    f"rank {self._rank}: no samples from data worker {worker} (lanes {lanes[0]}-{lanes[-1]}): {reason}"
                ) from error
        if isinstance(chunk, _Failure):
            raise UserError(chunk.message)
        return chunk


@dataclass(frozen=True)
class _Failure:
    """A UserError on its way from a worker; raised there, torch would wrap its message in a traceback."""

    message: str


class _ChunkSource(IterableDataset):
    """Shares of batches: those of all the lanes given, or in a worker process of that worker's part of them."""

    def __init__(
        self,
        config: DataConfig,
        *,
        backend: str,
        image_size: int,
        tokenizer: Tokenizer,
        samples_a_lane: int,
        positions: dict[int, Position],
    ) -> None:
        self.positions = positions
        self.name = f"data.train={config.train}"
        self._config = config
        self._paths = list_shards(config.train, ".tar")
        self._probs = BalanceFolder(config.balance) if config.balance is not None else None
        self._transform = TrainTransform(image_size, config.crop_scale, config.seed, backend)
        self._image_size = image_size
        self._tokenizer = tokenizer
        self._samples_a_lane = samples_a_lane

    def __iter__(self) -> Iterator[Batch | _Failure]:
        info = get_worker_info()
        worker, num_workers = (info.id, info.num_workers) if info is not None else (0, 1)
        pool = ShardPool(
            self._paths,
            lanes=self._config.lanes,
            seed=self._config.seed,
            probs=self._probs,
            transform=self._transform,
            name=self.name,
        )
        numbers = _share(sorted(self.positions), worker, num_workers)
        lanes = {number: Lane(pool, number, self.positions[number]) for number in numbers}
        try:
            while True:
                with one_torch_thread():
                    chunk = self._chunk(pool, lanes)
                yield chunk
        except UserError as error:
            yield _Failure(str(error))

    def _chunk(self, pool: ShardPool, lanes: dict[int, Lane]) -> Batch:
        size = self._image_size
        images = torch.empty((len(lanes) * self._samples_a_lane, 3, size, size), dtype=torch.uint8)
        examples: list[Example] = []
        for lane in lanes.values():
            for _ in range(self._samples_a_lane):
                example = next(lane)
                images[len(examples)] = example.image
                examples.append(example)
        skipped = dict(pool.skipped)
        pool.skipped.clear()
        return Batch(
            images=images,
            tokens=self._tokenizer.encode([example.pair.text for example in examples]),
            keys=[example.pair.key for example in examples],
            langs=[example.pair.lang for example in examples],
            position={number: lane.position for number, lane in lanes.items()},
            skipped=skipped,
        )


def _share(lanes: Sequence[int], index: int, count: int) -> Sequence[int]:
    return lanes[index * len(lanes) // count : (index + 1) * len(lanes) // count]


def _own_positions(
    position: Mapping[int, Sequence[int]] | Mapping[str, Sequence[int]] | None, own: range, lanes: int
) -> dict[int, Position]:
    if position is None:
        return {lane: Position() for lane in own}
    known = {int(lane): Position(*map(int, place)) for lane, place in position.items()}
    if max(known, default=0) >= lanes or not set(own) <= set(known):
        raise UserError(
            f"the position to resume from is of {max(known, default=-1) + 1} lanes, but data.lanes={lanes}: "
            f"lanes cannot change during a run"
        )
    return {lane: known[lane] for lane in own}


def _concatenate(chunks: list[Batch], *, pad_id: int, pin: bool) -> Batch:
    """One batch of the workers' chunks; images and tokens are pinned if asked, so that copies to the GPU overlap."""
    if len(chunks) == 1 and not pin:
        return chunks[0]
    num = sum(len(chunk.images) for chunk in chunks)
    width = max(chunk.tokens.shape[1] for chunk in chunks)
    images = torch.empty((num, *chunks[0].images.shape[1:]), dtype=torch.uint8, pin_memory=pin)
    tokens = torch.full((num, width), pad_id, dtype=torch.int64, pin_memory=pin)
    batch = Batch(images, tokens, keys=[], langs=[], position={}, skipped={})
    skipped: Counter[str] = Counter()
    for chunk in chunks:
        rows = slice(len(batch.keys), len(batch.keys) + len(chunk.keys))
        images[rows] = chunk.images
        tokens[rows, : chunk.tokens.shape[1]] = chunk.tokens
        batch.keys += chunk.keys
        batch.langs += chunk.langs
        batch.position |= chunk.position
        skipped.update(chunk.skipped)
    batch.skipped = dict(skipped)
    return batch


def _as_is(chunk: Any) -> Any:
    return chunk


def _prepare_worker(worker: int) -> None:
    # Slurm sends its warning to every process of a step; it is the trainer's to act upon.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
