"""``profile.steps=[a,b]``: a trace of some steps by torch.profiler, and on GPUs a snapshot of the memory allocator.

Per profiled rank, ``<output>/profile/`` gets

    rank-00000.steps-3-5.trace.json.gz      operators, kernels, allocations: a Chrome trace, for ui.perfetto.dev
    rank-00000.steps-3-5.memory.pickle      CUDA only: every allocation with its stack, for pytorch.org/memory_viz

Profiling observes: the trained weights are the same to the bit.
"""

import logging
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from mc2_hpc.config import RunConfig
from mc2_hpc.distributed import Ranks
from mc2_hpc.errors import UserError
from mc2_hpc.storage import atomic_path

logger = logging.getLogger(__name__)

_MOST_EVENTS = 1_000_000
"""Of the allocator, in a snapshot: some hundred bytes each, with their stacks."""


class StepProfiler:
    """Profiles steps a to b (counted from 1, both included) on the ranks of the config."""

    def __init__(self, config: RunConfig, ranks: Ranks) -> None:
        """
        Raises:
            UserError: ``profile.ranks`` names a rank that the run does not have.
        """
        settings = config.profile
        if settings.steps is not None and max(settings.ranks) >= ranks.world_size:
            raise UserError(f"profile.ranks={settings.ranks}: the last rank of this run is {ranks.world_size - 1}")
        self._folder = Path(config.output) / "profile"
        self._rank = ranks.rank
        self._device = ranks.device
        self._steps = settings.steps if ranks.rank in settings.ranks else None
        self._first = 0
        """The first step that is really profiled: later than a if the run resumed in between."""
        self._last = 0
        """The last step that has begun."""
        self._profile: profile | None = None
        self._marker: record_function | None = None

    def begin(self, step: int) -> None:
        """Call before each step, from waiting for its data on."""
        if self._steps is None or step < self._steps[0]:
            return
        if step > self._steps[1]:
            logger.warning("profile.steps=%s: the run is already at step %d", list(self._steps), step)
            self._steps = None
            return
        if self._profile is None:
            self._start(step)
        self._last = step
        self._marker = record_function(f"step {step}")
        self._marker.__enter__()

    def end(self, step: int) -> None:
        """Call after each step; writes the files after the last one."""
        if self._steps is None or self._profile is None:
            return
        self._end_marker()
        if step == self._steps[1]:
            self.close()

    def close(self) -> None:
        """Write what has been profiled, if the run ends before the last of the steps."""
        if self._profile is not None:
            self._end_marker()
            self._write(self._profile)
            self._profile = self._steps = None

    def _end_marker(self) -> None:
        if self._marker is not None:
            self._marker.__exit__(None, None, None)
            self._marker = None

    def _start(self, step: int) -> None:
        self._first = step
        activities = [ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history(max_entries=_MOST_EVENTS)
        self._profile = profile(activities=activities, record_shapes=True, profile_memory=True)
        self._profile.start()

    def _write(self, profiled: profile) -> None:
        """A full disk or a profiler that fails is logged: the run does not need it."""
        name = f"rank-{self._rank:05d}.steps-{self._first}-{self._last}"
        try:
            profiled.stop()
            with atomic_path(self._folder / f"{name}.trace.json.gz") as path:
                profiled.export_chrome_trace(str(path))
            if self._device.type == "cuda":
                with atomic_path(self._folder / f"{name}.memory.pickle") as path:
                    torch.cuda.memory._dump_snapshot(str(path))
        except (OSError, RuntimeError) as error:
            logger.error("no profile of steps %d to %d: %s", self._first, self._last, error)
        else:
            logger.info("profile of steps %d to %d: %s", self._first, self._last, self._folder / name)
        finally:
            if self._device.type == "cuda":
                torch.cuda.memory._record_memory_history(enabled=None)
