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
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from mc2_hpc.balancing.folder import BalanceFolder
from mc2_hpc.config import DataConfig
from mc2_hpc.data.crop import EncodedCrop
from mc2_hpc.data.dali import IN_FLIGHT, DaliDecoder, Jpegs
from mc2_hpc.data.decode import TrainTransform, one_torch_thread, resolve_backend
from mc2_hpc.data.locations import find_shards
from mc2_hpc.data.remote import CannotReach
from mc2_hpc.data.stream import Example, Lane, Position, ShardPool
from mc2_hpc.data.tokenizer import Tokenizer
from mc2_hpc.data.watch import Board, Patient
from mc2_hpc.data.workers import obituary, prepare_worker, worker_context
from mc2_hpc.errors import UserError

_POLL_S = 1.0
_CLOSE_S = 10.0
# Storage that fails is to be named by its error before the watchdog sees nothing but silence.
_PATIENCE_SHARE = 0.8

_logger = logging.getLogger(__name__)


class DataStalled(RuntimeError):
    """No samples came for ``data.stall_seconds``, a worker died, or the storage cannot be reached; one line says which
    rank, worker and shard. The run can be resumed."""


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
        position: Mapping[int, Sequence[int]] | Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        lanes = config.lanes
        if global_batch % lanes:
            raise UserError(f"global_batch={global_batch} is not a multiple of data.lanes={lanes}: choose a divisor")
        if world_size > lanes:
            raise UserError(f"{world_size} ranks but data.lanes={lanes}: every rank needs a lane, so raise data.lanes")
        own = range(rank * lanes // world_size, (rank + 1) * lanes // world_size)
        self._num_workers = min(config.workers, len(own))
        if self._num_workers < config.workers:
            _logger.info("rank %d: %d data workers, not %d: it has no more lanes", rank, len(own), config.workers)
        backend = resolve_backend(config.decode, "train")
        self._source = _ChunkSource(
            config,
            backend=backend,
            image_size=image_size,
            tokenizer=tokenizer,
            samples_a_lane=global_batch // lanes,
            positions=_own_positions(position, own, lanes),
            board=Board(max(1, self._num_workers)),
        )
        self._rank = rank
        self._config = config
        self._pad_id = tokenizer.pad_id
        self._pin = torch.cuda.is_available()
        self._decoder: DaliDecoder | None = None
        if backend == "dali":
            self._decoder = DaliDecoder(
                image_size=image_size,
                max_batch=len(own) * (global_batch // lanes),
                device=torch.device("cuda", torch.cuda.current_device()) if self._pin else torch.device("cpu"),
                num_threads=max(1, config.workers),
                hw_decoder_load=config.hw_decoder_load,
            )
        self._decoding: deque[Batch] = deque()
        self._chunks: Patient[_Chunk | _Failure] | None = None
        self._workers: list[BaseProcess] = []

    @property
    def shard_names(self) -> list[str]:
        """The shards in the order that epochs permute, without their folder, which may move."""
        return [name.rpartition("/")[2] for name in self._source.shards.names]

    def __iter__(self) -> "TrainLoader":
        return self

    def __next__(self) -> Batch:
        if self._decoder is None:
            return _concatenate([chunk.batch for chunk in self._next_chunks()], pad_id=self._pad_id, pin=self._pin)
        while len(self._decoding) < IN_FLIGHT:
            self._submit(self._decoder)
        batch = self._decoding.popleft()
        batch.images, skipped = self._decoder.receive()
        batch.skipped = dict(skipped + Counter(batch.skipped))
        return batch

    def close(self) -> None:
        """Stop the workers. Iterating again would start from the original position."""
        if self._chunks is not None:
            self._chunks.close(_CLOSE_S)
        for worker in self._workers:  # those that hang
            worker.kill()
        self._chunks, self._workers = None, []
        self._decoding.clear()

    def _submit(self, decoder: DaliDecoder) -> None:
        chunks = self._next_chunks()
        batch = _concatenate([chunk.batch for chunk in chunks], pad_id=self._pad_id, pin=False)
        parts, first = [], 0
        for chunk in chunks:
            if chunk.jpegs is not None:
                parts.append((first, chunk.jpegs))
            first += len(chunk.batch.keys)
        decoder.submit(len(batch.keys), batch.images, parts)
        self._decoding.append(batch)

    def _start(self) -> "Patient[_Chunk | _Failure]":
        if self._num_workers == 0:
            return Patient(iter(self._source))
        context = worker_context(preload=__name__)
        loader = DataLoader(
            self._source,
            batch_size=None,
            num_workers=self._num_workers,
            prefetch_factor=self._config.prefetch,
            multiprocessing_context=context,
            collate_fn=_as_is,
            worker_init_fn=prepare_worker,
        )
        others = set(multiprocessing.active_children())
        chunks = Patient(iter(loader))
        self._workers = [child for child in multiprocessing.active_children() if child not in others]
        return chunks

    def _next_chunks(self) -> "list[_Chunk]":
        if self._chunks is None:
            self._chunks = self._start()
        return [self._next_chunk(self._chunks, worker) for worker in range(max(1, self._num_workers))]

    def _next_chunk(self, chunks: "Patient[_Chunk | _Failure]", worker: int) -> "_Chunk":
        deadline = time.monotonic() + self._config.stall_seconds
        chunk: _Chunk | _Failure | None = None
        while chunk is None:
            try:
                chunk = chunks.next(max(0.0, min(_POLL_S, deadline - time.monotonic())))
            except TimeoutError:
                # Workers are the fork server's children, so their death sends no signal here. One that is killed while
                # it writes leaves its share half sent and the others waiting for their turn to send.
                if dead := self._dead_workers():
                    raise self._stalled(worker, obituary(dead)) from None
                if time.monotonic() >= deadline:
                    raise self._stalled(worker, f"none for {self._config.stall_seconds:g} s") from None
            except (RuntimeError, OSError, EOFError) as error:
                if not isinstance(error, RuntimeError):
                    time.sleep(_POLL_S)  # a connection may break before its end is seen to be dead
                if dead := self._dead_workers():
                    raise self._stalled(worker, obituary(dead)) from error
                raise  # the loading code's own error, with its traceback
        if isinstance(chunk, _Failure):
            if isinstance(chunk.error, UserError):
                raise chunk.error
            raise self._stalled(worker, str(chunk.error))
        return chunk

    def _dead_workers(self) -> list[BaseProcess]:
        return [process for process in self._workers if not process.is_alive()]

    def _stalled(self, worker: int, reason: str) -> DataStalled:
        lanes = _share(sorted(self._source.positions), worker, max(1, self._num_workers))
        where = f"rank {self._rank}: no samples from data worker {worker} (lanes {lanes[0]}-{lanes[-1]})"
        reading = self._source.board.reading(worker)
        if reading is not None:
            shard, seconds = reading
            where += f", which has been at {self._source.shards.names[shard]} for {seconds:.0f} s"
        for process in self._workers:
            process.kill()
        self._chunks = None  # nothing more can come of it, so nobody need wait for its thread
        return DataStalled(f"{where}: {reason}; mend it and start the run again, it resumes from its last checkpoint")


@dataclass
class _Chunk:
    """A worker's share of a batch. With JPEGs, the batch's images are the other pictures alone."""

    batch: Batch
    jpegs: Jpegs | None


@dataclass(frozen=True)
class _Failure:
    """An error of one line on its way from a worker; raised there, torch would wrap its message in a traceback."""

    error: UserError | CannotReach


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
        board: Board,
    ) -> None:
        self.positions = positions
        self.board = board
        self.shards = find_shards(
            config.train,
            cache=config.cache_dir,
            cache_gb=config.cache_gb,
            patience_s=_PATIENCE_SHARE * config.stall_seconds,
        )
        self._config = config
        self._probs = BalanceFolder(config.balance) if config.balance is not None else None
        self._transform = TrainTransform(image_size, config.crop_scale, config.seed, backend)
        self._image_size = image_size
        self._tokenizer = tokenizer
        self._samples_a_lane = samples_a_lane

    def __iter__(self) -> Iterator[_Chunk | _Failure]:
        info = get_worker_info()
        worker, num_workers = (info.id, info.num_workers) if info is not None else (0, 1)
        reading = self.board.writer(worker)
        pool = ShardPool(
            self.shards,
            lanes=self._config.lanes,
            seed=self._config.seed,
            probs=self._probs,
            transform=self._transform,
            name=f"data.train={self._config.train}",
            reading=reading,
        )
        numbers = _share(sorted(self.positions), worker, num_workers)
        lanes = {number: Lane(pool, number, self.positions[number]) for number in numbers}
        try:
            while True:
                with one_torch_thread():
                    chunk = self._chunk(pool, lanes)
                reading(None)
                yield chunk
        except (UserError, CannotReach) as error:
            while True:  # a worker that ended would look like one that died
                yield _Failure(error)

    def _chunk(self, pool: ShardPool, lanes: dict[int, Lane]) -> _Chunk:
        size = self._image_size
        num = len(lanes) * self._samples_a_lane
        images: torch.Tensor | None = None
        num_ready = 0
        examples: list[Example] = []
        encoded: dict[int, EncodedCrop] = {}
        for lane in lanes.values():
            for _ in range(self._samples_a_lane):
                example = next(lane)
                if isinstance(example.image, EncodedCrop):
                    encoded[len(examples)] = example.image
                else:
                    if images is None:  # most batches are all pixels or all JPEGs
                        images = torch.empty((num - len(examples), 3, size, size), dtype=torch.uint8)
                    images[num_ready] = example.image
                    num_ready += 1
                examples.append(example)
        skipped = dict(pool.skipped)
        pool.skipped.clear()
        batch = Batch(
            images=images[:num_ready] if images is not None else torch.empty((0, 3, size, size), dtype=torch.uint8),
            tokens=self._tokenizer.encode([example.pair.text for example in examples]),
            keys=[example.pair.key for example in examples],
            langs=[example.pair.lang for example in examples],
            position={number: lane.position for number, lane in lanes.items()},
            skipped=skipped,
        )
        return _Chunk(batch, Jpegs.pack(encoded) if encoded else None)


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
    num = sum(len(chunk.keys) for chunk in chunks)
    width = max(chunk.tokens.shape[1] for chunk in chunks)
    num_images = sum(len(chunk.images) for chunk in chunks)
    images = torch.empty((num_images, *chunks[0].images.shape[1:]), dtype=torch.uint8, pin_memory=pin)
    torch.cat([chunk.images for chunk in chunks], out=images)
    tokens = torch.full((num, width), pad_id, dtype=torch.int64, pin_memory=pin)
    batch = Batch(images, tokens, keys=[], langs=[], position={}, skipped={})
    skipped: Counter[str] = Counter()
    for chunk in chunks:
        rows = slice(len(batch.keys), len(batch.keys) + len(chunk.keys))
        tokens[rows, : chunk.tokens.shape[1]] = chunk.tokens
        batch.keys += chunk.keys
        batch.langs += chunk.langs
        batch.position |= chunk.position
        skipped.update(chunk.skipped)
    batch.skipped = dict(skipped)
    return batch


def _as_is(chunk: Any) -> Any:
    return chunk
