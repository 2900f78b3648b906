"""The sources of a run, opened: their shards, settings and seeds, and the pools and lanes that a process reads them by.

A single source has an empty name, and its order follows from ``data.seed`` alone. The order of a named source follows
from its name too: shards of the same names in two sources, such as one set of images with two sets of captions, must
not come in the same order, or an image would often meet itself in a batch.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from mc2_hpc.balancing.folder import BalanceFolder
from mc2_hpc.config import DataConfig
from mc2_hpc.data.caption_fields import CaptionFields
from mc2_hpc.data.features import StoredFeatures
from mc2_hpc.data.locations import ShardSet, find_shards
from mc2_hpc.data.mixing import LanePosition, MixedLane, SourceDraws
from mc2_hpc.data.shards import PLAIN, Extras, Probabilities
from mc2_hpc.data.stream import Lane, Position, ShardPool, Transform, places_of_hand
from mc2_hpc.data.takedown import Takedown
from mc2_hpc.train_sources import TrainSource

# Failing storage should be reported by its error before the watchdog reports only silence.
_PATIENCE_SHARE = 0.8


@dataclass(frozen=True, kw_only=True)
class OpenSource:
    """One source; picklable."""

    name: str
    """Empty if the run has only this one and its config does not name it."""
    label: str
    """For messages."""
    shards: ShardSet
    probs: Probabilities | None
    """For online balancing; None keeps everything."""
    weight: float
    seed: int
    first: int
    """Number of shards in the sources before it."""

    @property
    def shard_names(self) -> list[str]:
        """The shard names in the order that epochs permute, without their folder, which may move."""
        return [name.rpartition("/")[2] for name in self.shards.names]


def open_sources(config: DataConfig, *, urls: bool = False) -> list[OpenSource]:
    """The sources of ``config.train``, at least one, by name: their order in the config means nothing.

    Args:
        urls: read the addresses of images.

    Raises:
        UserError: one has no shards, or no balance folder where it names one.
    """
    in_order: list[TrainSource | None] = [*sorted(config.sources, key=lambda source: source.name)]
    found: list[OpenSource] = []
    for source in in_order or [None]:
        first = found[-1].first + len(found[-1].shards.names) if found else 0
        found.append(_open_source(config, source, first, urls))
    return found


def _open_source(config: DataConfig, source: TrainSource | None, first: int, urls: bool) -> OpenSource:
    """A source of a mix, or (None) the only one."""
    path = config.train if source is None else source.path
    balance = config.balance if source is None else source.balance
    shards = find_shards(
        _shard_names(path),
        cache=config.cache_dir,
        cache_gb=config.cache_gb,
        patience_s=_PATIENCE_SHARE * config.stall_seconds,
        extras=_extras(source, urls),
    )
    return OpenSource(
        name=source.name if source is not None else "",
        label=f"data.train={path}" if source is None else f"data.train: source {source.name} ({path})",
        shards=shards,
        probs=BalanceFolder(balance) if balance is not None else None,
        weight=source.weight if source is not None else 1.0,
        seed=_seed(config.seed, source),
        first=first,
    )


def _extras(source: TrainSource | None, urls: bool) -> Extras:
    captions = source.captions if source is not None else {}
    return Extras(CaptionFields(captions) if captions else None, urls) if captions or urls else PLAIN


def _shard_names(path: str | list[str] | list[TrainSource]) -> str | list[str]:
    return path if isinstance(path, str) else [name for name in path if isinstance(name, str)]


def _seed(seed: int, source: TrainSource | None) -> int:
    if source is None:
        return seed
    digest = hashlib.blake2b(f"{seed}/{source.name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def make_pools(
    sources: Sequence[OpenSource],
    *,
    lanes: int,
    transform: Transform,
    reading: Callable[[int | None], None],
    stored: StoredFeatures | None = None,
    taught: Mapping[str, StoredFeatures] | None = None,
    takedown: Takedown | None = None,
) -> list[ShardPool]:
    """A pool for each source; ``reading`` is called with shard numbers counted over all sources.

    Args:
        taught: a teacher's features, by source.
    """

    def pool(source: OpenSource) -> ShardPool:
        return ShardPool(
            source.shards,
            lanes=lanes,
            seed=source.seed,
            probs=source.probs,
            transform=transform,
            stored=stored,
            taught=taught[source.name] if taught is not None else None,
            name=source.label,
            source=source.name,
            takedown=takedown,
            reading=lambda shard: reading(source.first + shard),
        )

    return [pool(source) for source in sources]


def make_lane(
    sources: Sequence[OpenSource], pools: Sequence[ShardPool], lane: int, position: LanePosition, *, seed: int
) -> Lane | MixedLane:
    """Lane number ``lane`` of a run, from its ``position``."""
    if isinstance(position, Position):
        (pool,) = pools
        return Lane(pool, lane, position)
    named = zip(sources, pools, strict=True)
    lanes = {source.name: Lane(pool, lane, position.sources[source.name]) for source, pool in named}
    draws = SourceDraws([source.weight for source in sources], seed=seed, lane=lane)
    return MixedLane(lanes, draws, position.draws)


def epochs_in(sources: Sequence[OpenSource], position: Mapping[int, LanePosition], *, lanes: int) -> dict[str, float]:
    """Epochs of each source of a mix, summed over the lanes in ``position``; fractions are in whole shards."""
    epochs = {source.name: 0.0 for source in sources if source.name}
    for lane, place in position.items():
        if isinstance(place, Position):
            continue
        for source in sources:
            own = place.sources[source.name]
            epochs[source.name] += own.epoch + own.shard / len(
                places_of_hand(len(source.shards.names), lanes=lanes, lane=lane)
            )
    return epochs
