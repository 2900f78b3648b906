"""Which settings fit the ranks' memory, by the plan (:mod:`mc2_hpc.planning`): what cannot fit is never tried."""

import logging
from collections.abc import Sequence
from typing import Any

from mc2_hpc.config import RunConfig, config_to_dict, with_settings
from mc2_hpc.data.lanes import rank_batches
from mc2_hpc.errors import UserError
from mc2_hpc.planning.plan import check_planned, planned_architecture, trace_drawn
from mc2_hpc.planning.processes import TraceError, in_processes
from mc2_hpc.tuning.machines import Machine
from mc2_hpc.tuning.space import Settings, fattest, is_valid, leaner, name_of

logger = logging.getLogger(__name__)

_GIB = 1 << 30
_ROOMY = 0.8
"""Share of the memory within which nothing is traced but what needs most: the rest differs by buckets and copies."""
_SIZE_FREE = ("output", "steps", "seed", "log_every", "data", "checkpoint", "eval", "profile", "log")
"""Parts of a config without effect on a rank's memory, lanes aside."""


class Fitting:
    """Answers whether settings fit, tracing each step at most once."""

    def __init__(self, config: RunConfig, machine: Machine, *, caption_tokens: float) -> None:
        self._config, self._machine = config, machine
        self._caption_tokens = caption_tokens
        self._peaks: dict[str, int] = {}
        self._roomy: bool | None = None
        self.unknown = self._why_unknown()
        """Why the plan cannot tell, so that nothing is left out and running out of memory is a result; or empty."""

    def _why_unknown(self) -> str:
        if self._machine.memory_bytes is None:
            return "the memory of the ranks is not known"
        try:
            check_planned(self._config)
            planned_architecture(self._config)
        except UserError as error:
            return str(error)
        return ""

    def peaks(self, settings: Sequence[Settings]) -> list[int]:
        """Peak bytes of a rank with each of the settings."""
        configs = [with_settings(self._config, each) for each in settings]
        keys = [_decisive(config) for config in configs]
        new = {key: config for key, config in zip(keys, configs, strict=True) if key not in self._peaks}
        calls = [
            {
                "config": config,
                "ranks": self._machine.ranks,
                "per_node": self._machine.ranks_per_node,
                "caption_tokens": self._caption_tokens,
                "device_type": self._machine.device_type,
            }
            for config in new.values()
        ]
        traces = in_processes(trace_drawn, calls) if calls else []
        self._peaks |= {key: trace.peak.bytes for key, trace in zip(new, traces, strict=True)}
        return [self._peaks[key] for key in keys]

    def that_fit(self, settings: Sequence[Settings]) -> list[Settings]:
        """Those that fit, in order; all of them if the plan cannot tell."""
        if self.unknown or not settings:
            return list(settings)
        try:
            peaks = [0 for _ in settings] if self._all_fit() else self.peaks(settings)
        except TraceError as error:
            self.unknown = str(error)
            logger.warning("memory is no longer planned: %s", error)
            return list(settings)
        kept = []
        for each, peak in zip(settings, peaks, strict=True):
            if peak <= self._room():
                kept.append(each)
            else:
                logger.info("not tried, because it needs %.1f GiB per rank: %s", peak / _GIB, name_of(each))
        return kept

    def first_that_fits(self) -> Settings:
        """No change if the config fits as it is; otherwise the first of :func:`~mc2_hpc.tuning.space.leaner` that does.

        Raises:
            UserError: even the leanest does not; the message says what would.
        """
        if self.unknown or self.that_fit([{}]):
            return {}
        lean = leaner(self._config, self._machine)
        if lean and self.that_fit(lean[-1:]):
            return next(each for each in lean if self.that_fit([each]))
        raise UserError(self._cure(lean[-1] if lean else {}))

    def _all_fit(self) -> bool:
        if self._roomy is None:
            most = [each for each in fattest(self._machine) if is_valid(self._config, each, self._machine)]
            self._roomy = max(self.peaks(most)) <= _ROOMY * self._room()
        return self._roomy

    def _room(self) -> int:
        assert self._machine.memory_bytes is not None
        return self._machine.memory_bytes

    def _cure(self, leanest: Settings) -> str:
        """One line about a batch that cannot fit, with the largest one of a line through two traces that would."""
        config, ranks = with_settings(self._config, leanest), self._machine.ranks
        pairs = max(rank_batches(config.global_batch, lanes=config.data.lanes, num_ranks=ranks))
        smaller: list[Settings] = []
        if pairs > 1:
            half_of = {"global_batch": pairs // 2 * ranks, "data.lanes": ranks}
            half_of["micro_batch"] = -(-config.micro_batch // 2)
            smaller.append({**leanest, **half_of})
        (whole,) = self.peaks([leanest])
        needs = f"needs {whole / _GIB:.2f} GiB per rank, and a rank has {self._room() / _GIB:.2f}"
        start = f"global_batch={self._config.global_batch} does not fit {ranks} rank(s): {name_of(leanest)}"
        try:
            half = self.peaks(smaller)
        except TraceError as error:
            return f"{start} {needs}; what would fit is not known: {error}"
        slope = (whole - half[0]) / (pairs - pairs // 2) if half else 0.0
        fit = int(pairs - (whole - self._room()) / slope) if slope > 0 else 0
        if fit < 1:
            return f"{start} {needs}, whatever the batch: use a smaller model, ranks with more memory, or more of them"
        more = -(-self._config.global_batch // fit)
        return f"{start} {needs}: about global_batch={fit * ranks} fits, or this one on {more} ranks"


def _decisive(config: RunConfig) -> str:
    values: dict[str, Any] = config_to_dict(config)
    return repr(({key: value for key, value in values.items() if key not in _SIZE_FREE}, config.data.lanes))
