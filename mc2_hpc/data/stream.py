"""The order of samples: a fixed number of lanes, each an endless stream that any process can resume at any position.

In every epoch, the shards are permuted by a hash of (seed, epoch, shard name), laid end to end, and cut into equal
lengths, one per lane; a cut may fall inside a shard. Inside a shard, the samples are permuted by a hash of (seed,
epoch, key). Lane, epoch, place in the lane's hand of parts and offset therefore identify a sample without any history.
So the lanes can be reassigned to ranks and workers at every start, and nothing is read to find a position.

Bad samples are skipped by advancing the offset. Which samples are good is a property of the data, so a lane's good
samples are the same whoever reads it. Each good sample comes exactly once per epoch over all lanes.
"""

import logging
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from mc2_hpc.data.crop import Encoded, EncodedCrop
from mc2_hpc.data.features import StoredFeatures
from mc2_hpc.data.locations import ShardSet
from mc2_hpc.data.shards import Pair, Probabilities, Shard
from mc2_hpc.data.skips import ShardError
from mc2_hpc.data.takedown import Takedown
from mc2_hpc.data.teacher import TwoSizes
from mc2_hpc.draws import hash_keys, random_uint64
from mc2_hpc.drops import Drop, Dropped, log_skip
from mc2_hpc.errors import UserError

_PROBE_SAMPLES = 4096
_PROBE_SHARDS = 64
logger = logging.getLogger(__name__)

Transform = Callable[[Encoded, np.uint64, int], torch.Tensor | EncodedCrop | TwoSizes]
"""Maps (encoded image, key hash, epoch) to the batch's image; raises Dropped."""


class Position(NamedTuple):
    """Where a lane continues: the next sample is at ``offset`` in shard ``shard`` of the lane's hand in ``epoch``."""

    epoch: int = 0
    shard: int = 0
    offset: int = 0


@dataclass(frozen=True)
class Part:
    """The samples of shard number ``shard`` from ``begin / of`` to ``end / of`` of its permuted order."""

    shard: int
    begin: int = 0
    end: int = 1
    of: int = 1


@dataclass(frozen=True)
class Example:
    """One good sample, with caption and image ready for the batch."""

    pair: Pair
    image: torch.Tensor | EncodedCrop | TwoSizes
    source: str = ""
    """Name of the source that it is from; empty if the run has a single one without a name."""
    taught: torch.Tensor | None = None
    """(2, E): a teacher's stored features of image and caption."""


class Deck:
    """Which shards each lane gets in each epoch; a pure function of the shard names and the seed."""

    def __init__(self, names: list[str], *, lanes: int, seed: int) -> None:
        self._hashes = hash_keys(names)
        self._lanes = lanes
        self._seed = seed
        self._orders: dict[int, npt.NDArray[np.int64]] = {}

    def order(self, epoch: int) -> npt.NDArray[np.int64]:
        """The permutation of shard numbers in ``epoch``."""
        if epoch not in self._orders:
            if len(self._orders) > 3:  # lanes of a process are rarely more than an epoch apart
                self._orders.pop(min(self._orders))
            words = random_uint64(self._hashes, seed=self._seed, epoch=epoch, purpose="shard order")
            self._orders[epoch] = np.argsort(words, kind="stable")
        return self._orders[epoch]

    def hand(self, epoch: int, lane: int) -> list[Part]:
        """The parts of ``lane``, in reading order; over all lanes they cover every shard exactly once."""
        order, lanes = self.order(epoch), self._lanes
        first, last = lane * len(order), (lane + 1) * len(order)  # in units of 1/lanes of a shard
        return [
            Part(int(order[place]), max(first - place * lanes, 0), min(last - place * lanes, lanes), lanes)
            for place in places_of_hand(len(order), lanes=lanes, lane=lane)
        ]


def places_of_hand(num_shards: int, *, lanes: int, lane: int) -> range:
    """The places in an epoch's order of the shards that ``lane`` gets, whole or in part; the same in every epoch."""
    return range(lane * num_shards // lanes, -(-(lane + 1) * num_shards // lanes))


class ShardPool:
    """A run's data in one process: shards are opened when a lane needs them and shared while lanes read them.

    Args:
        shards: of the run.
        lanes, seed: as in the config.
        probs: entry probabilities for online balancing; None keeps one text of every image.
        transform: decodes an image.
        stored: features in place of decoded images.
        taught: a teacher's features beside them.
        name: of the data, for errors.
        source: name of the source that its samples are from.
        takedown: list of samples to leave out.
        reading: called with the number of a shard before anything in it is read.
    """

    def __init__(
        self,
        shards: ShardSet,
        *,
        lanes: int,
        seed: int,
        probs: Probabilities | None,
        transform: Transform,
        stored: StoredFeatures | None = None,
        taught: StoredFeatures | None = None,
        name: str,
        source: str = "",
        takedown: Takedown | None = None,
        reading: Callable[[int], None] = lambda shard: None,
    ) -> None:
        self.deck = Deck([name.rpartition("/")[2] for name in shards.names], lanes=lanes, seed=seed)
        self.skipped: Counter[str] = Counter()
        """Skips since it was last cleared. Skips of a whole shard are counted only with its beginning, so that sums
        over lanes are correct."""
        self._shards = shards
        self._num_shards = len(shards.names)
        self._lanes = lanes
        self._seed = seed
        self._probs = probs
        self._transform = transform
        self._stored = stored
        self._taught = taught
        self._name = name
        self._source = source
        self._takedown = takedown
        self._reading = reading
        self._open: weakref.WeakValueDictionary[int, Shard] = weakref.WeakValueDictionary()
        self._good_lately = False
        self._enough = False
        self._logged: set[int] = set()

    def open(self, number: int) -> Shard:
        """Shard ``number``; ShardError if it cannot be used. Counts and logs that it was rewritten."""
        shard = self._open.get(number)
        if shard is None:
            self._reading(number)
            shard = self._open[number] = self._shards.open(number)
            # Here and not with the other counts: whoever opens it first lists it anew, and no one sees a change again.
            if shard.changed:
                log_skip(Drop.SHARD_CHANGED, shard.name)
                self.skipped[Drop.SHARD_CHANGED] += 1
        return shard

    def expect(self, number: int) -> None:
        """Shard ``number`` is a lane's next shard."""
        if number not in self._open:
            self._shards.expect(number)

    def rows(self, shard: Shard, part: Part, epoch: int) -> npt.NDArray[np.int64]:
        """Rows of a part in the order of ``epoch``."""
        rows = shard.select_rows(self._probs, seed=self._seed, epoch=epoch)
        words = random_uint64(shard.row_hashes()[rows], seed=self._seed, epoch=epoch, purpose="sample order")
        ordered = rows[np.argsort(words, kind="stable")]
        return ordered[part.begin * len(rows) // part.of : part.end * len(rows) // part.of]

    def load(self, number: int, shard: Shard, row: int, epoch: int) -> Example:
        """Read and decode row ``row`` of shard ``number``; Dropped (logged, not counted) if the sample is bad."""
        self._reading(number)
        try:
            pair = self._read(shard, row, epoch)
            key_hash = shard.row_hashes()[row]
            if self._stored is not None:
                image: torch.Tensor | EncodedCrop | TwoSizes = self._stored.read(shard, key_hash)
            else:
                image = self._transform(pair.image, key_hash, epoch)
            taught = self._taught.read_pair(shard, key_hash, pair.text) if self._taught is not None else None
        except Dropped as skip:
            log_skip(skip.reason, f"{shard.name}, row {row}", skip.detail)
            raise
        self._good_lately = True
        return Example(pair, image, self._source, taught)

    def count_shard(self, shard: Shard) -> None:
        """Count and log the members of a shard's tar that are skipped."""
        for reason, number in shard.drops.items():
            log_skip(Drop(reason), shard.name, f"{number} members")
            self.skipped[reason] += number

    def _read(self, shard: Shard, row: int, epoch: int) -> Pair:
        takedown = self._takedown
        if takedown is not None and takedown.lists_key(shard.row_hashes()[row]):
            raise Dropped(Drop.TAKEN_DOWN)
        pair = shard.read(row, seed=self._seed, epoch=epoch)
        if takedown is not None and takedown.lists_content(pair.image, pair.url):
            raise Dropped(Drop.TAKEN_DOWN)
        return pair

    def log_unreadable(self, number: int, error: ShardError) -> None:
        """Log a skipped shard, the first time."""
        if number not in self._logged:
            self._logged.add(number)
            logger.warning("skipped, shard_unreadable: %s: %s", self._shards.names[number], error)

    def check_enough_samples(self) -> None:
        """Raise UserError if there are fewer images than lanes, good or bad."""
        if self._enough or self._num_shards >= self._lanes:
            return  # every shard that opens has images
        self._enough = True
        total = 0
        for number in range(self._num_shards):
            try:
                total += self.open(number).num_keys
            except ShardError:
                continue  # counted where it is read
        if 0 < total < self._lanes:
            raise UserError(f"{self._name}: {total} samples are too few for data.lanes={self._lanes}: set fewer lanes")

    def check_something_good(self) -> None:
        """Called by a lane that found nothing good in a whole epoch: raise UserError if that holds for all the data.

        Looks at up to 4,096 samples spread over the shards, so that it takes bounded time; the result depends only on
        the data, not on the lanes of this process.
        """
        if self._good_lately:
            self._good_lately = False  # check again after the next empty epoch: the data may be gone by then
            return
        skipped: Counter[str] = Counter()
        budget = _PROBE_SAMPLES
        a_shard = -(-budget // min(self._num_shards, _PROBE_SHARDS))
        for number in self.deck.order(0)[:_PROBE_SAMPLES].tolist():
            if budget <= 0:
                break
            try:
                shard = self.open(number)
            except ShardError as error:
                self.log_unreadable(number, error)
                skipped[Drop.SHARD_UNREADABLE] += 1
                budget -= 1
                continue
            rows = self.rows(shard, Part(number), 0)
            skipped[Drop.BALANCED] += shard.num_keys - len(rows)
            for row in rows[:a_shard].tolist():
                try:
                    self.load(number, shard, row, 0)
                    return
                except Dropped as skip:
                    skipped[skip.reason] += 1
            budget -= max(1, min(a_shard, len(rows)))
        counts = ", ".join(f"{reason} {count}" for reason, count in skipped.most_common() if count)
        raise UserError(f"{self._name}: no sample can be used; everything was skipped: {counts}")


class Lane:
    """One endless stream of good samples, starting at ``position``.

    Iteration raises UserError if the data has no good sample, or fewer samples than there are lanes.
    """

    def __init__(self, pool: ShardPool, lane: int, position: Position) -> None:
        self.position = position
        self._pool = pool
        self._lane = lane
        self._hand: list[Part] | None = None
        self._shard: Shard | None = None
        self._rows: npt.NDArray[np.int64] | None = None
        self._from_start = position.shard == 0 and position.offset == 0
        self._found = False

    def __iter__(self) -> "Lane":
        return self

    def __next__(self) -> Example:
        while True:
            epoch, place, offset = self.position
            if self._hand is None:
                self._hand = self._pool.deck.hand(epoch, self._lane)
            if place >= len(self._hand):
                self._finish_epoch()
                continue
            if self._rows is None:
                self._open_part(self._hand[place])
            if self._shard is None or self._rows is None or offset >= len(self._rows):
                self._leave_part()
                continue
            self.position = Position(epoch, place, offset + 1)
            try:
                example = self._pool.load(self._hand[place].shard, self._shard, int(self._rows[offset]), epoch)
            except Dropped as skip:
                self._pool.skipped[skip.reason] += 1
                continue
            self._found = True
            return example

    def _open_part(self, part: Part) -> None:
        # A part that is resumed in the middle was already counted when its beginning was read.
        counts = part.begin == 0 and self.position.offset == 0
        try:
            self._shard = self._pool.open(part.shard)
        except ShardError as error:
            self._pool.log_unreadable(part.shard, error)
            self._pool.skipped[Drop.SHARD_UNREADABLE] += counts
            return
        if counts:
            self._pool.count_shard(self._shard)
        self._rows = self._pool.rows(self._shard, part, self.position.epoch)
        if len(self._rows) == 0:
            self._pool.check_enough_samples()
        self._expect_next(part)

    def _expect_next(self, part: Part) -> None:
        assert self._hand is not None
        epoch, place, _ = self.position
        following = self._hand[place + 1 :] or self._pool.deck.hand(epoch + 1, self._lane)
        if following[0].shard != part.shard:
            self._pool.expect(following[0].shard)

    def _leave_part(self) -> None:
        self._shard = self._rows = None
        self.position = Position(self.position.epoch, self.position.shard + 1)

    def _finish_epoch(self) -> None:
        if self._from_start and not self._found:
            self._pool.check_something_good()
        self.position = Position(self.position.epoch + 1)
        self._hand = None
        self._from_start, self._found = True, False
