"""The proof that a run saw no listed sample after the step at which its takedown list named it, from the order alone.

The order of samples follows from the config and the shards. So for each listed sample all its places in the order are
known without reading it, and the positions of the lanes in the run's record tell which of them the run came past before
and after the list was in force. Every place that it came past since must be one that it counted as ``taken_down``: a
sample that was trained on instead would be missing from that count.
"""

import bisect
import hashlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import methodcaller
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from mc2_hpc.config import config_from_dict
from mc2_hpc.data.mixing import from_plain, place_in
from mc2_hpc.data.places import Place, Places
from mc2_hpc.data.pools import OpenSource, make_pools, open_sources
from mc2_hpc.data.remote import CannotReach
from mc2_hpc.data.shards import Pair, Shard
from mc2_hpc.data.skips import ShardError
from mc2_hpc.data.stream import Position
from mc2_hpc.data.takedown import Entry, Takedown, entries_of
from mc2_hpc.drops import Drop, Dropped
from mc2_hpc.errors import UserError
from mc2_hpc.reading.files import shown
from mc2_hpc.training.checkpoint import read_trainer
from mc2_hpc.training.checkpoint_folders import complete_folders
from mc2_hpc.training.progress import other_shards
from mc2_hpc.training.takedown_record import FOLDER, TakedownRecord, Version


@dataclass(kw_only=True)
class ListedSample:
    """A sample that the list names, and what the run did with it."""

    key: str
    source: str
    """Empty if the run has a single one without a name."""
    shard: str
    in_force_after: int | None
    """The step after which the run's list named it; None: never."""
    seen: list[tuple[int, int]] = field(default_factory=list)
    """``(a, b)`` for each time that the run came past it before that: in a step after ``a`` and up to ``b``."""
    left_out: int = 0
    """How often the run came past it since."""


@dataclass(frozen=True, kw_only=True)
class Proof:
    """The outcome."""

    run: str
    step: int
    """The checkpoint's, up to which it is proved."""
    versions: list[tuple[int, int]]
    """Step and number of lines of each version of the list: in force after that step."""
    samples: list[ListedSample]
    """Those that the list names, by source and shard."""
    without_sample: list[str]
    """Entries that name no sample."""
    left_out: int
    """Places of all samples in the run's list that it came past after they were listed."""
    counted: int
    """Samples that the run counted as ``taken_down``."""
    unreadable: dict[str, str]
    """Shards that cannot be read now, so that their samples are unknown, and why."""

    @property
    def problems(self) -> list[str]:
        """Why it does not hold, one line each; none if it does."""
        never = sum(sample.in_force_after is None for sample in self.samples)
        found = [f"{never} of these samples were never in the run's list"] if never else []
        if self.left_out != self.counted:
            found.append(f"the order has {self.left_out} places to leave out, but the run counted {self.counted}")
        return found


def prove(run: Path, entries: bytes | None = None) -> Proof:
    """Prove it for the run in folder ``run``.

    Args:
        entries: lines of a takedown list to prove it for; None means the run's own list.

    Raises:
        UserError: no run or no checkpoint there, a record that is damaged, or shards that are not those of the run.
    """
    folders = complete_folders(run / "checkpoints")
    if not folders:
        raise UserError(f"{shown(run)}: has no checkpoint to prove anything for; name the `output` folder of a run")
    checkpoints = {trainer["step"]: trainer for trainer in map(read_trainer, folders)}
    end = max(checkpoints)
    record = TakedownRecord(run)
    versions = [version for version in record.versions if version.step <= end]
    if not versions:
        raise UserError(f"{shown(run / FOLDER)}: the run has had no takedown list up to step {end}: set data.takedown")
    config = config_from_dict(checkpoints[end]["config"], source=str(folders[-1])).data
    sources = open_sources(config, urls=True)
    for line in other_shards(checkpoints[end], sources):
        raise UserError(f"{folders[-1]} {line}: the order is unknown; restore the shards that the run was trained on")
    history = _History(checkpoints, versions, lanes=config.lanes)
    ends = [0, *(version.bytes for version in versions)]
    added = [record.content[begin:end] for begin, end in itertools.pairwise(ends)]
    search = _Search([version.step for version in versions], added, entries)
    pools = make_pools(sources, lanes=config.lanes, transform=_no_image, reading=lambda shard: None)
    for source, pool in zip(sources, pools, strict=True):
        places = Places(pool, lanes=config.lanes)
        for number, name in enumerate(source.shards.names):
            try:
                search.look_into(source, number, pool.open(number), places, history)
            except (ShardError, CannotReach) as error:
                search.unreadable[name] = str(error).removeprefix(f"{name}: ")
    return Proof(
        run=str(run),
        step=end,
        versions=[(version.step, version.lines) for version in versions],
        samples=search.samples,
        without_sample=search.without_sample(),
        left_out=search.left_out,
        counted=checkpoints[end]["skipped"].get(Drop.TAKEN_DOWN, 0),
        unreadable=search.unreadable,
    )


def _no_image(*_: Any) -> Any:
    raise AssertionError("a proof decodes no image")


class _History:
    """Positions of all lanes after the steps of which the run has a record."""

    def __init__(self, checkpoints: Mapping[int, Any], versions: Sequence[Version], *, lanes: int) -> None:
        found = {step: trainer["position"] for step, trainer in checkpoints.items()}
        found |= {version.step: msgspec.to_builtins(version.position) for version in versions}
        found[0] = []
        self.steps = sorted(found)
        self._lanes = {step: [from_plain(lane) for lane in found[step]] or [Position()] * lanes for step in self.steps}

    def passed(self, source: str, place: Place, step: int) -> bool:
        """Whether the run had come past ``place`` after ``step``."""
        return place.position < place_in(self._lanes[step][place.lane], source)

    def when(self, source: str, place: Place) -> tuple[int, int]:
        """``(a, b)``: the run came past ``place`` in a step after ``a`` and up to ``b``."""
        after = bisect.bisect_left(self.steps, True, key=lambda step: self.passed(source, place, step))
        return self.steps[after - 1], self.steps[after]

    def epochs(self, source: str) -> range:
        """The epochs that some lane has begun."""
        return range(max(place_in(lane, source).epoch for lane in self._lanes[self.steps[-1]]) + 1)


@dataclass(frozen=True)
class _Listed:
    """A listed row of a shard."""

    step: int | None
    """After which the run's list named it; None: never."""
    asked: bool
    """Whether it is to be reported."""
    by_key: bool


class _Search:
    """Listed samples, found shard by shard.

    Args:
        steps: after which lines came into force.
        added: the lines that came into force after each of them.
        asked: lines of a list of the samples to report; None means the run's.
    """

    def __init__(self, steps: Sequence[int], added: Sequence[bytes], asked: bytes | None) -> None:
        self.samples: list[ListedSample] = []
        self.left_out = 0
        self.unreadable: dict[str, str] = {}
        self._by_step = list(zip(steps, map(Takedown.of, added), strict=True))
        self._asked = Takedown.of(asked) if asked is not None else None
        self._asked_lines = asked if asked is not None else b"".join(added)
        self._lists = [takedown for _, takedown in self._by_step] + ([self._asked] if self._asked is not None else [])
        self._key_hashes = np.unique(np.concatenate([takedown.key_hashes for takedown in self._lists]))
        self._looks_inside = any(takedown.looks_inside for takedown in self._lists)
        self._named_keys: set[int] = set()
        self._named_digests: set[str] = set()
        """SHA-256 of the images that were found by this or by their address."""
        self._named_addresses: set[str] = set()
        """Where they are from, in lower case."""

    def look_into(self, source: OpenSource, number: int, shard: Shard, places: Places, history: _History) -> None:
        """Find the listed samples of a shard, and all their places in the order that the run came past."""
        rows = self._listed_rows(source, shard)
        samples: dict[str, ListedSample] = {}
        for row, listed in rows.items():
            key = shard.row_keys[row]
            if key not in samples:
                samples[key] = ListedSample(key=key, source=source.name, shard=shard.name, in_force_after=listed.step)
                self.samples += [samples[key]] if listed.asked else []
        for epoch in history.epochs(source.name) if rows else ():
            for place in places.of_rows(number, shard, rows, epoch=epoch):
                listed, sample = rows[place.row], samples[shard.row_keys[place.row]]
                if not history.passed(source.name, place, history.steps[-1]):
                    continue
                if listed.step is None or history.passed(source.name, place, listed.step):
                    sample.seen.append(history.when(source.name, place))
                elif listed.by_key or _read(source, shard, place.row, epoch) is not None:
                    sample.left_out += 1
                    self.left_out += 1

    def _listed_rows(self, source: OpenSource, shard: Shard) -> dict[int, _Listed]:
        hashes = shard.row_hashes()
        by_key = np.isin(hashes, self._key_hashes)
        found = {
            row: self._listed(methodcaller("lists_key", hashes[row]), by_key=True)
            for row in np.flatnonzero(by_key).tolist()
        }
        self._named_keys.update(hashes[by_key].tolist())
        for row in np.flatnonzero(~by_key).tolist() if self._looks_inside else []:
            pair = _read(source, shard, row, 0)
            if pair is None:
                continue
            listed = self._listed(methodcaller("lists_content", pair.image, pair.url), by_key=False)
            if listed.step is not None or listed.asked:
                found[row] = listed
                self._named_digests.add(hashlib.sha256(pair.image).hexdigest())
                self._named_addresses.add(pair.url.lower())
        return found

    def _listed(self, lists: Callable[[Takedown], bool], *, by_key: bool) -> _Listed:
        step = next((step for step, takedown in self._by_step if lists(takedown)), None)
        return _Listed(step, step is not None if self._asked is None else lists(self._asked), by_key)

    def without_sample(self) -> list[str]:
        """Entries to report that name no sample."""
        entries = entries_of(self._asked_lines, "takedown list")
        return [str(entry) for entry in entries if not self._names(entry)]

    def _names(self, entry: Entry) -> bool:
        if entry.sha256 is not None:
            return entry.sha256 in self._named_digests
        if entry.url is not None and "*" not in entry.url:
            return entry.url.lower() in self._named_addresses
        alone = Takedown.of(msgspec.json.encode(entry) + b"\n")
        if entry.key is not None:
            return not self._named_keys.isdisjoint(alone.key_hashes.tolist())
        return any(alone.lists_content(b"", address) for address in self._named_addresses)


def _read(source: OpenSource, shard: Shard, row: int, epoch: int) -> Pair | None:
    """A sample as the run reads it in ``epoch``; None if it is dropped before its content is looked at."""
    try:
        return shard.read(row, seed=source.seed, epoch=epoch)
    except Dropped:
        return None
