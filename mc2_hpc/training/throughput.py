"""Speed and utilisation of a run: samples per second, model flops utilisation (MFU), data wait.

Each rank counts its own share of an interval; once per logged row the first rank gathers the counts of all ranks.
Nothing is exchanged in between.
"""

import logging
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import record_function

from mc2_hpc.config import RunConfig
from mc2_hpc.data.batches import Batch
from mc2_hpc.distributed import Ranks
from mc2_hpc.models.clip import flops_per_pair
from mc2_hpc.models.presets import ClipArchitecture
from mc2_hpc.precision import Precision
from mc2_hpc.training.freezing import adapters_of, frozen_depths
from mc2_hpc.training.patch_dropout import num_patches

logger = logging.getLogger(__name__)

DATA_WAIT = "data wait"
"""Name of the ranges in a profile in which the step waits for its batch."""
_MOST_LANGUAGES = 20
"""Largest number of languages in a row."""

# Dense bf16 matrix products, flops per second, from the vendor's data sheets (no sparsity).
_BF16_PEAKS = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
}


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Peak flops per second, the denominator of MFU.

    For bf16 on a GPU in the table, this is the data sheet's figure. Otherwise it is the measured and logged rate of a
    square matrix product, which takes about 0.1 s.
    """
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        for prefix, peak in _BF16_PEAKS.items():
            if name.startswith(prefix):
                return peak
    peak = _measured_peak(device, dtype)
    logger.info("MFU is relative to a measured matrix product: %.3g flop/s in %s", peak, dtype)
    return peak


def _measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    size = 4096 if device.type == "cuda" else 768
    matrix = torch.randn(size, size, device=device).to(dtype)
    best = float("inf")
    for _ in range(6):  # the first rounds warm up
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        torch.mm(matrix, matrix)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def peak_memory(device: torch.device) -> int | None:
    """Most bytes of tensors on the device at a time since :func:`reset_peak_memory`; ``None`` where none is counted."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def reset_peak_memory(device: torch.device) -> None:
    """Count the peak anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


@dataclass(frozen=True, kw_only=True)
class Interval:
    """One rank's counts since the previous row."""

    steps: int
    seconds: float
    """Without stalls and pauses."""
    flops: int
    peak: float
    """Peak flops per second of this rank's device."""
    wait_seconds: float
    """Time spent waiting for data."""
    stall_seconds: float
    """Time spent waiting for checkpoints."""
    languages: Counter[str]
    """Samples by language."""
    skipped: Counter[str]
    """Skipped samples by reason, since the run began."""
    sources: Counter[str] = field(default_factory=Counter)
    """Samples by source, in a mix."""
    fields: Counter[str] = field(default_factory=Counter)
    """Samples by ``<source>/<caption field>``, where there are several."""
    epochs: Mapping[str, float] = field(default_factory=dict)
    """Epochs since the run began, by source of a mix, summed over this rank's lanes."""
    caption_tokens: int
    """Of all captions, with begin and end and without padding."""
    peak_memory: int | None
    """Most bytes of tensors on the device at a time (:func:`peak_memory`)."""


def gather(own: Interval, ranks: Ranks) -> list[Interval] | None:
    """The intervals of all ranks, on the first rank only. Collective."""
    every: list[Any] | None = [None] * ranks.world_size if ranks.is_first else None
    dist.gather_object(own, every, dst=0)
    return every


def rates(intervals: Sequence[Interval], *, global_batch: int, lanes: int = 1) -> dict[str, Any]:
    """Columns of a row for the interval, from all ranks' counts; ``lanes`` are those of all ranks.

    Steps are synchronous, so rates use the first rank's clock. MFU and data wait are means over ranks, the stall is the
    longest, and samples are summed.
    """
    first = intervals[0]
    languages: Counter[str] = sum((each.languages for each in intervals), Counter())
    skipped: Counter[str] = sum((each.skipped for each in intervals), Counter())
    return {
        "samples_per_second": first.steps * global_batch / first.seconds,
        "steps_per_second": first.steps / first.seconds,
        "mfu": sum(each.flops for each in intervals) / first.seconds / sum(each.peak for each in intervals),
        "data_wait": sum(each.wait_seconds / each.seconds for each in intervals) / len(intervals),
        "checkpoint_stall_seconds": max(each.stall_seconds for each in intervals),
        "caption_tokens": sum(each.caption_tokens for each in intervals) / (first.steps * global_batch),
        "language_share": {
            lang: count / languages.total()
            for lang, count in sorted(languages.items(), key=lambda item: (-item[1], item[0]))[:_MOST_LANGUAGES]
        },
        "skipped": dict(sorted(skipped.items())),
        **_memory(intervals),
        **_of_mix(intervals, lanes),
    }


def _memory(intervals: Sequence[Interval]) -> dict[str, int]:
    """The column that only devices with a measured peak have: that of the fullest rank."""
    measured = [each.peak_memory for each in intervals if each.peak_memory is not None]
    return {"peak_memory_bytes": max(measured)} if measured else {}


def _of_mix(intervals: Sequence[Interval], lanes: int) -> dict[str, Any]:
    """Columns that only a mix has."""
    sources: Counter[str] = sum((each.sources for each in intervals), Counter())
    fields: Counter[str] = sum((each.fields for each in intervals), Counter())
    names = sorted(intervals[0].epochs)
    if not names:
        return {}
    columns: dict[str, Any] = {
        "source_share": {name: sources[name] / sources.total() for name in names},
        "source_epochs": {name: sum(each.epochs[name] for each in intervals) / lanes for name in names},
    }
    if fields:
        columns["caption_share"] = {
            name: count / sources[name.partition("/")[0]] for name, count in sorted(fields.items())
        }
    return columns


class ThroughputMeter:
    """This rank's counts since the last call of :meth:`interval`."""

    def __init__(self, config: RunConfig, arch: ClipArchitecture, device: torch.device) -> None:
        self._arch = arch
        self._frozen = frozen_depths(arch, config.freeze)
        self._num_patches = num_patches(config, arch)
        adapters = adapters_of(config)
        self._ranks = {} if adapters is None else dict.fromkeys(adapters.towers, adapters.rank)
        self._text_packing = config.model.text_packing
        self._device = device
        self._peak = peak_flops(device, Precision(config.precision).dtype)
        self.start()

    def start(self) -> None:
        """Begin an interval."""
        self._since = time.perf_counter()
        self._steps = 0
        self._flops = 0
        self._wait = 0.0
        self._stall = 0.0
        self._paused = 0.0
        self._caption_tokens = 0
        reset_peak_memory(self._device)
        self._languages: Counter[str] = Counter()
        self._sources: Counter[str] = Counter()
        self._fields: Counter[str] = Counter()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time spent inside counts as waiting for data, in a profile too (as :data:`DATA_WAIT`)."""
        begin = time.perf_counter()
        with record_function(DATA_WAIT):
            yield
        self._wait += time.perf_counter() - begin

    @contextmanager
    def stalled(self) -> Iterator[None]:
        """Time spent inside (the part of a save that training waits for) counts as stall, not in any rate."""
        begin = time.perf_counter()
        yield
        self._stall += time.perf_counter() - begin

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent inside (an evaluation) is not counted."""
        begin = time.perf_counter()
        yield
        self._paused += time.perf_counter() - begin

    def count(self, batch: Batch) -> None:
        """Count one step's local batch."""
        self._steps += 1
        lengths = batch.lengths if self._text_packing else [batch.tokens.shape[1]] * len(batch.keys)
        for length, num in Counter(lengths).items():
            each = flops_per_pair(self._arch, length, self._frozen, num_patches=self._num_patches, ranks=self._ranks)
            self._flops += each * num
        self._caption_tokens += sum(batch.lengths)
        self._languages.update(batch.langs)
        self._sources.update(batch.sources)
        self._fields.update(batch.fields)

    def interval(self, skipped: Counter[str], epochs: Mapping[str, float]) -> Interval:
        """End the interval and return it, with this rank's skips and epochs so far; begins the next one."""
        found = Interval(
            steps=self._steps,
            seconds=time.perf_counter() - self._since - self._stall - self._paused,
            flops=self._flops,
            peak=self._peak,
            wait_seconds=self._wait,
            stall_seconds=self._stall,
            languages=self._languages,
            skipped=Counter(skipped),
            sources=self._sources,
            fields=self._fields,
            epochs=epochs,
            caption_tokens=self._caption_tokens,
            peak_memory=peak_memory(self._device),
        )
        self.start()
        return found
