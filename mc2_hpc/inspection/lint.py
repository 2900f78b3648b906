"""``mc2 data lint``: what a run would skip of its data, and what the rest is like."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from typing import Any

import numpy as np
import numpy.typing as npt

from mc2_hpc.data.locations import ShardSet, find_shards
from mc2_hpc.data.tokenizer import Tokenizer
from mc2_hpc.data.workers import prepare_worker
from mc2_hpc.errors import UserError
from mc2_hpc.inspection.shard import PICTURES, Findings, LintOptions, ShardReader
from mc2_hpc.shard_paths import Names
from mc2_hpc.terminal import log_to_stderr

_REPEATED_SHOWN = 10

KeyHashes = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class RepeatedKey:
    """A key that several shards have."""

    key: str
    shards: list[str]


@dataclass(frozen=True)
class Lint:
    """What was found in all shards."""

    findings: Findings
    num_repeated: int
    """Distinct keys that occur in more than one shard."""
    repeated: list[RepeatedKey]
    """The first of them."""
    options: LintOptions
    room: int
    """Tokens that fit in a caption; 0 without a tokenizer."""

    def truncated(self, lang: str) -> float:
        """The share of a language's captions that do not fit."""
        lengths = self.findings.tokens[lang]
        return sum(count for length, count in lengths.items() if length > self.room) / lengths.total()

    def to_dict(self) -> dict[str, Any]:
        """The figures by name, for JSON; without pictures."""
        found = self.findings
        return {
            **{name: getattr(found, name) for name in ("shards", "images", "kept", "turned")},
            **{name: dict(getattr(found, name)) for name in ("skipped", "bad_captions", "formats", "unreadable")},
            "captions": {lang or "(none)": count for lang, count in found.captions.items()},
            "short_side": {str(share): quantile(found.short_sides, share) for share in (0, 0.05, 0.5, 0.95, 1)},
            "smaller_than_image_size": sum(
                n for side, n in found.short_sides.items() if side < self.options.image_size
            ),
            "tokens": {
                lang or "(none)": {
                    "median": quantile(lengths, 0.5),
                    "longest": max(lengths),
                    "truncated": self.truncated(lang),
                }
                for lang, lengths in sorted(found.tokens.items())
            },
            "repeated_keys": self.num_repeated,
            "repeated": [asdict(repeated) for repeated in self.repeated],
            "skips": [asdict(skip) for skip in found.skips],
        }


def quantile(counts: dict[int, int], share: float) -> int:
    """The smallest value that at least ``share`` of all do not exceed; 0 if there are none."""
    wanted = share * sum(counts.values())
    seen = 0
    for value in sorted(counts):
        seen += counts[value]
        if seen >= wanted:
            return value
    return 0


def lint(
    data: Names,
    options: LintOptions | None = None,
    *,
    workers: int = 1,
    with_pictures: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
) -> Lint:
    """Read every sample as the first epoch of a run without balancing would, and every other caption too.

    In memory: counters, a bounded number of examples, and 8 bytes per key.

    Args:
        data: like ``data.train``, see :mod:`mc2_hpc.data.locations`.
        workers: processes.
        with_pictures: keep pictures for a page.
        progress: called as ``progress(shards read, all shards, name)``.

    Raises:
        UserError: no shards, a bad tokenizer, or a worker was killed.
    """
    options = options or LintOptions()
    shards = find_shards(data)
    num_shards = len(shards.names)
    room = 0
    if options.tokenizer is not None:
        room = Tokenizer(options.tokenizer, options.tokenizer_style, options.context_length).room
    if with_pictures:
        options = replace(options, pictures=-(-PICTURES // num_shards))
    waiting: dict[int, Findings] = {}
    hashes: dict[int, KeyHashes] = {}
    total = Findings()
    for number, findings, keys in _read_all(shards, options, min(workers, num_shards)):
        waiting[number], hashes[number] = findings, keys
        while total.shards in waiting:  # in order, so that the result does not depend on the workers
            total.add(waiting.pop(total.shards))
        if progress:
            progress(len(hashes), num_shards, shards.names[number].rpartition("/")[2])
    repeated_hashes, examples = _repeated(shards, [hashes[number] for number in range(num_shards)])
    return Lint(total, repeated_hashes, examples, options, room)


def _read_all(shards: ShardSet, options: LintOptions, workers: int) -> Iterator[tuple[int, Findings, KeyHashes]]:
    numbers = range(len(shards.names))
    if workers <= 1:
        reader = ShardReader(shards, options)
        for number in numbers:
            yield number, *reader.read(number)
        return
    context = get_context("spawn")
    with ProcessPoolExecutor(workers, context, _start_worker, (shards, options)) as pool:
        futures = {pool.submit(_read_one, number): number for number in numbers}
        try:
            for future in as_completed(futures):
                yield futures.pop(future), *future.result()  # which holds what was found as long as it exists
        except BrokenProcessPool:
            raise UserError("a worker was killed, perhaps for lack of memory; use fewer --workers") from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


_reader: ShardReader | None = None


def _start_worker(shards: ShardSet, options: LintOptions) -> None:
    global _reader
    prepare_worker(0)  # it ends with this process, however that ends
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends that process, which waits for the shards being read
    log_to_stderr()
    logging.getLogger("mc2_hpc").setLevel(logging.WARNING)  # what every worker would repeat
    _reader = ShardReader(shards, options)


def _read_one(number: int) -> tuple[Findings, KeyHashes]:
    assert _reader is not None
    return _reader.read(number)


def _repeated(shards: ShardSet, hashes: list[KeyHashes]) -> tuple[int, list[RepeatedKey]]:
    """The number of keys in several shards, and the first of them by name."""
    values, counts = np.unique(np.concatenate(hashes), return_counts=True)
    repeated = values[counts > 1]
    if len(repeated) == 0:
        return 0, []
    wanted = repeated[:_REPEATED_SHOWN]
    places: dict[str, list[str]] = {}
    for number, of_shard in enumerate(hashes):
        if not np.isin(wanted, of_shard).any():
            continue
        shard = shards.open(number)
        rows = np.flatnonzero(np.isin(shard.row_hashes(), wanted))
        for key in dict.fromkeys(shard.row_keys[row] for row in rows):
            places.setdefault(key, []).append(shard.name)
    found = [RepeatedKey(key, names) for key, names in sorted(places.items()) if len(names) > 1]
    return len(repeated), found
