"""Where samples come in the order of a source, recomputed without reading any sample: the reverse of a lane's walk."""

from collections.abc import Collection, Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mc2_hpc.data.shards import Shard
from mc2_hpc.data.stream import Deck, Part, Position, ShardPool


class Place(NamedTuple):
    """One occurrence of a sample: a lane that has gone beyond ``position`` in its source has come past it."""

    row: int
    lane: int
    position: Position


class Places:
    """The places of samples of one source.

    Args:
        pool: of the source; its samples are not read.
        lanes: of the run.
    """

    def __init__(self, pool: ShardPool, *, lanes: int) -> None:
        self._pool = pool
        self._deck: Deck = pool.deck
        self._lanes = lanes
        self._turns: dict[int, npt.NDArray[np.int64]] = {}

    def of_rows(self, number: int, shard: Shard, rows: Collection[int], *, epoch: int) -> Iterator[Place]:
        """The place of each of ``rows`` of shard ``number`` in ``epoch``; none for a row that balancing leaves out."""
        ordered = self._pool.rows(shard, Part(number), epoch)
        offsets = {int(ordered[offset]): int(offset) for offset in np.flatnonzero(np.isin(ordered, list(rows)))}
        for lane in self._lanes_of(number, epoch):
            for place, part in enumerate(self._deck.hand(epoch, lane)):
                if part.shard != number:
                    continue
                begin, end = (bound * len(ordered) // part.of for bound in (part.begin, part.end))
                for row, offset in offsets.items():
                    if begin <= offset < end:
                        yield Place(row, lane, Position(epoch, place, offset - begin))

    def _lanes_of(self, number: int, epoch: int) -> range:
        """The lanes that get some of a shard."""
        if epoch not in self._turns:
            self._turns[epoch] = np.argsort(self._deck.order(epoch), kind="stable")
        turn, num_shards = int(self._turns[epoch][number]), len(self._turns[epoch])
        return range(turn * self._lanes // num_shards, -(-(turn + 1) * self._lanes // num_shards))
