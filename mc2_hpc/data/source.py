"""The work of a worker process: take samples from its lanes and send its share of every batch."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.utils.data import IterableDataset, get_worker_info

from mc2_hpc.balancing.folder import BalanceFolder
from mc2_hpc.config import DataConfig
from mc2_hpc.data.batches import Share
from mc2_hpc.data.crop import EncodedCrop
from mc2_hpc.data.dali import Jpegs
from mc2_hpc.data.decode import TrainTransform, one_torch_thread
from mc2_hpc.data.lanes import deal
from mc2_hpc.data.limits import LARGER_SHARED_MEMORY, SHARED_MEMORY
from mc2_hpc.data.locations import find_shards
from mc2_hpc.data.remote import CannotReach
from mc2_hpc.data.stream import Example, Lane, Position, ShardPool
from mc2_hpc.data.teacher import TeacherNeeds, TwoSizes
from mc2_hpc.data.tokenizer import Tokenizer
from mc2_hpc.data.watch import Board
from mc2_hpc.errors import UserError
from mc2_hpc.models.packed_captions import caption_lengths

# Failing storage should be reported by its error before the watchdog reports only silence.
_PATIENCE_SHARE = 0.8


class NoSharedMemory(Exception):
    """A share does not fit into shared memory; the message says where it is and what to do."""


@dataclass(frozen=True)
class Failure:
    """A one-line error sent by a worker; if raised there, torch would wrap its message in a traceback."""

    error: UserError | CannotReach | NoSharedMemory


class ShareSource(IterableDataset[Share | Failure]):
    """An endless stream of shares: from all the given lanes or, in a worker process, from that worker's lanes."""

    def __init__(
        self,
        config: DataConfig,
        *,
        backend: str,
        image_size: int,
        tokenizer: Tokenizer,
        samples_per_lane: int,
        positions: dict[int, Position],
        board: Board,
        teacher: TeacherNeeds | None = None,
    ) -> None:
        """
        Args:
            samples_per_lane: that a batch takes.
            positions: where each lane begins.
            board: told which shard is being read.
            teacher: what it needs besides the student's images and token ids.
        """
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
        self._transform = TrainTransform(
            image_size,
            config.crop_scale,
            config.seed,
            backend,
            config.max_image_pixels,
            teacher_size=teacher.image_size if teacher is not None else None,
        )
        self._teacher = teacher
        self._image_size = image_size
        self._tokenizer = tokenizer
        self._samples_per_lane = samples_per_lane

    def __iter__(self) -> Iterator[Share | Failure]:
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
        numbers = deal(sorted(self.positions), worker, num_workers)
        lanes = {number: Lane(pool, number, self.positions[number]) for number in numbers}
        try:
            while True:
                with one_torch_thread():
                    share = self._share(pool, lanes)
                    if info is not None:
                        _to_shared_memory(share)
                reading(None)
                yield share
        except (UserError, CannotReach, NoSharedMemory) as error:
            while True:  # a worker that returned would look like a dead one
                yield Failure(error)

    def _share(self, pool: ShardPool, lanes: dict[int, Lane]) -> Share:
        size = self._image_size
        num = len(lanes) * self._samples_per_lane
        pixels: torch.Tensor | None = None
        num_decoded = 0
        examples: list[Example] = []
        encoded: dict[int, EncodedCrop] = {}
        for_teacher: list[torch.Tensor] = []
        for lane in lanes.values():
            for _ in range(self._samples_per_lane):
                example = next(lane)
                image = example.image
                if isinstance(image, TwoSizes):
                    for_teacher.append(image.teacher)
                    image = image.student
                if isinstance(image, EncodedCrop):
                    encoded[len(examples)] = image
                else:
                    if pixels is None:  # most batches are entirely pixels or entirely JPEGs
                        pixels = torch.empty((num - len(examples), 3, size, size), dtype=torch.uint8)
                    pixels[num_decoded] = image
                    num_decoded += 1
                examples.append(example)
        texts = [example.pair.text for example in examples]
        tokens = self._tokenizer.encode(texts)
        skipped = dict(pool.skipped)
        pool.skipped.clear()
        return Share(
            pixels=pixels[:num_decoded] if pixels is not None else torch.empty((0, 3, size, size), dtype=torch.uint8),
            jpegs=Jpegs.pack(encoded) if encoded else None,
            tokens=tokens,
            lengths=caption_lengths(tokens, self._tokenizer.eos_id),
            keys=[example.pair.key for example in examples],
            langs=[example.pair.lang for example in examples],
            position={number: lane.position for number, lane in lanes.items()},
            skipped=skipped,
            teacher=self._teacher.inputs(texts, for_teacher) if self._teacher is not None else None,
        )


def _to_shared_memory(share: Share) -> None:
    """Move the tensors to where the rank can see them. Sending them would do so too, but in a thread whose errors are
    lost.

    Raises:
        NoSharedMemory: there is no room.
    """
    jpegs = vars(share.jpegs).values() if share.jpegs is not None else ()
    for_teacher = share.teacher.tensors() if share.teacher is not None else ()
    try:
        for tensor in (share.pixels, share.tokens, *jpegs, *for_teacher):
            if tensor.numel():
                tensor.share_memory_()
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise NoSharedMemory(f"{SHARED_MEMORY} is full ({reason}): {LARGER_SHARED_MEMORY}") from None
