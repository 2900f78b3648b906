"""Mixing sources: which source each draw of a lane takes, and the position of a lane that draws from several.

Draw ``d`` of lane ``l`` is a pure function of (seed, l, d) and the weights. So the sequence is the same on any number
of ranks and workers, and nothing needs to be replayed to resume. A draw is a point in [0, 1), which the weights divide
among the sources. In each block of 1,024 draws, the points are the van der Corput sequence at ``d xor l``, scrambled by
hashes of (seed, block) as in Owen (1995, "Randomly permuted (t,m,s)-nets and (t,s)-sequences"). Consecutive draws of a
lane, and one draw over all lanes, are therefore spread evenly: batches have nearly the shares of the weights, where
independent draws would deviate by their binomial noise.

Every source keeps its own order and its own epochs: a lane's position in one source only moves when it is drawn.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mc2_hpc.data.stream import Example, Lane, Position
from mc2_hpc.draws import random_uint64, uniform

_BITS = 10
BLOCK = 1 << _BITS
_NUMBERS = np.arange(BLOCK, dtype=np.uint64)


class MixPosition(NamedTuple):
    """Where a lane of a mix continues."""

    draws: int
    """Samples drawn so far, from all sources."""
    sources: dict[str, Position]
    """The position in each source, by name."""


LanePosition = Position | MixPosition
"""Of a lane of a single source, or of a mix."""


def to_plain(position: LanePosition) -> Any:
    """A lane's position in the form of ``trainer.json``."""
    if isinstance(position, MixPosition):
        return {"draws": position.draws, "sources": {name: list(each) for name, each in position.sources.items()}}
    return list(position)


def from_plain(value: Any) -> LanePosition:
    """The position that :func:`to_plain` wrote; positions themselves are returned unchanged."""
    if isinstance(value, MixPosition):
        return value
    if isinstance(value, Mapping):
        places = {name: Position(*map(int, place)) for name, place in value["sources"].items()}
        return MixPosition(int(value["draws"]), places)
    return Position(*map(int, value))


def in_sources(position: LanePosition | None, names: Sequence[str]) -> MixPosition:
    """``position`` for a mix of the sources ``names``: those that it does not have begin at their start."""
    draws = position.draws if isinstance(position, MixPosition) else 0
    return MixPosition(draws, {name: place_in(position or Position(), name) for name in names})


def place_in(position: LanePosition, source: str) -> Position:
    """The position in one source, or its start if ``position`` does not have it; a single source has an empty name."""
    if isinstance(position, MixPosition):
        return position.sources.get(source, Position())
    return Position() if source else position


class SourceDraws:
    """The number of the source that each draw of a lane takes.

    Args:
        weights: of the sources, above 0; only their ratios matter.
        seed, lane: of the draws.
    """

    def __init__(self, weights: Sequence[float], *, seed: int, lane: int) -> None:
        edges = np.cumsum(np.asarray(weights, np.float64))
        self._edges = edges[:-1] / edges[-1]
        self._seed = seed
        self._lane = lane
        self._block = -1
        self._taken: npt.NDArray[np.int64] = np.zeros(0, np.int64)

    def __call__(self, draw: int) -> int:
        """The source of draw number ``draw``, counted from 0."""
        block, place = divmod(draw, BLOCK)
        if block != self._block:
            draws = {"seed": self._seed, "epoch": block}
            strata = _scrambled(random_uint64(_NUMBERS, purpose="source", **draws))
            inside = uniform(_NUMBERS, purpose=f"source, lane {self._lane}", **draws)
            points = (strata[_NUMBERS ^ np.uint64(self._lane % BLOCK)] + inside) / BLOCK
            self._taken = np.searchsorted(self._edges, points, side="right")
            self._block = block
        return int(self._taken[place])


def _scrambled(words: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
    """The first ``BLOCK`` numbers of the van der Corput sequence in units of ``1 / BLOCK``, scrambled.

    Owen's scrambling descends the binary tree of all intervals and swaps the halves of each at random.

    Args:
        words: random bits, ``(BLOCK,)``; word ``2**level + i`` decides about interval ``i`` of that level.
    """
    numbers = np.arange(BLOCK)
    swaps = (words & np.uint64(1)).astype(np.int64)
    plain, found = np.zeros(BLOCK, np.int64), np.zeros(BLOCK, np.int64)
    for level in range(_BITS):
        bit = (numbers >> level) & 1  # the sequence is the number with its bits reversed
        found = found << 1 | (bit ^ swaps[(1 << level) + plain])
        plain = plain << 1 | bit
    return found


class MixedLane:
    """One endless stream of good samples from several sources.

    Iteration raises what the lanes of the sources raise (:class:`mc2_hpc.data.stream.Lane`).

    Args:
        lanes: the same lane of every source, by name, each at its position.
        draws: numbers of the sources, in that order.
        num_draws: draws made before.
    """

    def __init__(self, lanes: Mapping[str, Lane], draws: SourceDraws, num_draws: int) -> None:
        self._lanes = lanes
        self._in_order = list(lanes.values())
        self._draws = draws
        self._num_draws = num_draws

    @property
    def position(self) -> MixPosition:
        """Where it continues."""
        return MixPosition(self._num_draws, {name: lane.position for name, lane in self._lanes.items()})

    def __iter__(self) -> "MixedLane":
        return self

    def __next__(self) -> Example:
        example = next(self._in_order[self._draws(self._num_draws)])
        self._num_draws += 1
        return example
