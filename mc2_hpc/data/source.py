"""The work of a worker process: take samples from its lanes and send its share of every batch."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.utils.data import IterableDataset, get_worker_info

from mc2_hpc.config import DataConfig
from mc2_hpc.data.batches import Share
from mc2_hpc.data.crop import EncodedCrop
from mc2_hpc.data.dali import Jpegs
from mc2_hpc.data.decode import TrainTransform
from mc2_hpc.data.features import StoredFeatures
from mc2_hpc.data.lanes import deal
from mc2_hpc.data.limits import LARGER_SHARED_MEMORY, SHARED_MEMORY
from mc2_hpc.data.mixing import LanePosition, MixedLane
from mc2_hpc.data.pools import OpenSource, make_lane, make_pools
from mc2_hpc.data.remote import CannotReach
from mc2_hpc.data.stream import Example, Lane, ShardPool
from mc2_hpc.data.takedown import Takedown
from mc2_hpc.data.teacher import TeacherNeeds, TwoSizes
from mc2_hpc.data.tokenizer import Tokenizer
from mc2_hpc.data.watch import Board
from mc2_hpc.errors import UserError, first_line
from mc2_hpc.models.packed_captions import caption_lengths
from mc2_hpc.threads import one_torch_thread


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
        sources: Sequence[OpenSource],
        *,
        backend: str,
        image_size: int,
        tokenizer: Tokenizer,
        samples_per_lane: int,
        positions: dict[int, LanePosition],
        board: Board,
        stored: StoredFeatures | None = None,
        taught: Mapping[str, StoredFeatures] | None = None,
        takedown: Takedown | None = None,
        teacher: TeacherNeeds | None = None,
    ) -> None:
        """
        Args:
            sources: of the run.
            samples_per_lane: that a batch takes.
            positions: where each lane begins.
            board: told which shard is being read.
            stored: features in place of decoded images.
            taught: a teacher's features, by source.
            takedown: list of samples to leave out.
            teacher: what it needs besides the student's images and token ids.
        """
        self.positions = positions
        self.board = board
        self._config = config
        self._sources = sources
        self._transform = TrainTransform(
            image_size,
            config.crop_scale,
            config.seed,
            backend,
            config.max_image_pixels,
            teacher_size=teacher.image_size if teacher is not None else None,
        )
        self._teacher = teacher
        self._stored = stored
        self._taught = taught
        self._image = torch.empty((3, image_size, image_size), dtype=torch.uint8)
        """What one looks like."""
        if stored is not None:
            self._image = torch.empty(stored.width, dtype=torch.float32)
        self._tokenizer = tokenizer
        self._samples_per_lane = samples_per_lane
        self._takedown = takedown

    def __iter__(self) -> Iterator[Share | Failure]:
        info = get_worker_info()
        worker, num_workers = (info.id, info.num_workers) if info is not None else (0, 1)
        reading = self.board.writer(worker)
        pools = make_pools(
            self._sources,
            lanes=self._config.lanes,
            transform=self._transform,
            stored=self._stored,
            taught=self._taught,
            reading=reading,
            takedown=self._takedown,
        )
        lanes = {
            lane: make_lane(self._sources, pools, lane, self.positions[lane], seed=self._config.seed)
            for lane in deal(sorted(self.positions), worker, num_workers)
        }
        try:
            while True:
                with one_torch_thread():
                    share = self._share(pools, lanes)
                    if info is not None:
                        _to_shared_memory(share)
                reading(None)
                yield share
        except (UserError, CannotReach, NoSharedMemory) as error:
            while True:  # a worker that returned would look like a dead one
                yield Failure(error)

    def shard_name(self, number: int) -> str:
        """The path or address of a shard by its number on the board, which counts over all sources."""
        source = next(each for each in reversed(self._sources) if each.first <= number)
        return source.shards.names[number - source.first]

    def _share(self, pools: Sequence[ShardPool], lanes: Mapping[int, Lane | MixedLane]) -> Share:
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
                if example.taught is not None:
                    for_teacher.append(example.taught)
                if isinstance(image, TwoSizes):
                    for_teacher.append(image.teacher)
                    image = image.student
                if isinstance(image, EncodedCrop):
                    encoded[len(examples)] = image
                else:
                    if pixels is None:  # most batches are entirely pixels or entirely JPEGs
                        pixels = self._image.new_empty(num - len(examples), *self._image.shape)
                    pixels[num_decoded] = image
                    num_decoded += 1
                examples.append(example)
        texts = [example.pair.text for example in examples]
        tokens = self._tokenizer.encode(texts)
        skipped: Counter[str] = Counter()
        for pool in pools:
            skipped.update(pool.skipped)
            pool.skipped.clear()
        return Share(
            pixels=pixels[:num_decoded] if pixels is not None else self._image.new_empty(0, *self._image.shape),
            jpegs=Jpegs.pack(encoded) if encoded else None,
            tokens=tokens,
            lengths=caption_lengths(tokens, self._tokenizer.eos_id),
            keys=[example.pair.key for example in examples],
            langs=[example.pair.lang for example in examples],
            sources=[example.source for example in examples],
            position={number: lane.position for number, lane in lanes.items()},
            fields=dict(Counter(f"{each.source}/{each.pair.field}" for each in examples if each.pair.field)),
            skipped=dict(skipped),
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
        reason = first_line(error)
        raise NoSharedMemory(f"{SHARED_MEMORY} is full ({reason}): {LARGER_SHARED_MEMORY}") from None
