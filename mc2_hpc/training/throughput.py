"""How fast a run is and how much of the machine it uses: samples a second, model flops utilisation, data wait."""

import logging
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from mc2_hpc.config import RunConfig
from mc2_hpc.data.batches import Batch
from mc2_hpc.models.clip import flops_per_pair
from mc2_hpc.models.presets import ClipArchitecture
from mc2_hpc.precision import Precision

logger = logging.getLogger(__name__)

# Dense bf16 matrix products, flops a second, from the vendor's data sheets (no sparsity).
_BF16_PEAKS = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
}


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Flops a second that MFU divides by.

    bf16 on a GPU of the table: the data sheet's figure. Anything else: the rate of a square matrix product timed here,
    about 0.1 s, logged as such.
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


class ThroughputMeter:
    """Rates of the interval since the last call of :meth:`rates`, as this rank sees them: steps are synchronous, so
    every rank's clock shows the same; MFU, data wait and languages are of this rank's own share."""

    def __init__(self, config: RunConfig, arch: ClipArchitecture, device: torch.device) -> None:
        self._global_batch = config.global_batch
        self._arch = arch
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
        self._languages: Counter[str] = Counter()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time spent inside counts as waiting for data."""
        begin = time.perf_counter()
        yield
        self._wait += time.perf_counter() - begin

    @contextmanager
    def stalled(self) -> Iterator[None]:
        """Time spent inside (the part of a save that training waits for) counts in no rate, but as stall."""
        begin = time.perf_counter()
        yield
        self._stall += time.perf_counter() - begin

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent inside (an evaluation) counts nowhere."""
        begin = time.perf_counter()
        yield
        self._paused += time.perf_counter() - begin

    def count(self, batch: Batch) -> None:
        """Account for one step's local batch."""
        self._steps += 1
        self._flops += len(batch.keys) * flops_per_pair(self._arch, batch.tokens.shape[1])
        self._languages.update(batch.langs)

    def rates(self) -> dict[str, Any]:
        """Metric columns of the interval that ends here; begins the next."""
        elapsed = time.perf_counter() - self._since - self._stall - self._paused
        seen = sum(self._languages.values())
        rates = {
            "samples_per_second": self._steps * self._global_batch / elapsed,
            "steps_per_second": self._steps / elapsed,
            "mfu": self._flops / elapsed / self._peak,
            "data_wait": self._wait / elapsed,
            "checkpoint_stall_seconds": self._stall,
            "language_share": {lang: count / seen for lang, count in self._languages.most_common(20)},
        }
        self.start()
        return rates
