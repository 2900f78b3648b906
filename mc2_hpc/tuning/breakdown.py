"""Where the time of a step goes, from a trial's own metrics and profile: data, host, compute, network.

The rate and the wait for data are those of steps without a profiler (``metrics.jsonl``). How the rest divides is read
from the profile of two more steps. A communication kernel counts only while nothing is computed: what computation hides
costs nothing.

On a GPU the profile has the kernels themselves, whose durations a profiler does not change. What remains of the
unprofiled step is a device without work: it waits for data, or for the host to launch. On a CPU computing is host work,
so ``host`` is the time in which no operator runs: Python, and waiting for a core.
"""

import gzip
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import msgspec

from mc2_hpc.errors import UserError
from mc2_hpc.reading.files import open_regular
from mc2_hpc.reading.json_file import File, Foreign
from mc2_hpc.training.throughput import DATA_WAIT

Cause = Literal["data", "host", "compute", "network"]
CAUSES: tuple[Cause, ...] = ("data", "host", "compute", "network")

_MOST_BYTES = 1 << 30
_ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
"""Categories of the events of a GPU."""

Range = tuple[float, float]


class Breakdown(File):
    """Seconds of a step by what they were spent on; their sum is the step."""

    data: float
    """Nothing to do but wait for the batch."""
    host: float
    compute: float
    network: float
    """Messages between ranks, and waiting for slower ranks, that no computation hides."""

    @property
    def seconds(self) -> float:
        """Of the step."""
        return self.data + self.host + self.compute + self.network

    @property
    def limit(self) -> Cause:
        """The cause that takes most of the step."""
        return max(CAUSES, key=lambda cause: float(getattr(self, cause)))


class _Event(Foreign):
    name: str = ""
    cat: str | None = None
    ts: float | None = None
    dur: float | None = None


class _Trace(Foreign):
    traceEvents: list[_Event]


class Profile(File):
    """What a profile says about its steps, in seconds per step."""

    seconds: float
    compute: float
    network: float
    data: float
    on_gpu: bool


def read_profile(path: Path) -> Profile:
    """Read a Chrome trace that :class:`~mc2_hpc.training.profiling.StepProfiler` wrote.

    Raises:
        UserError: not such a file, or no step in it.
    """
    try:
        with open_regular(path) as raw, gzip.open(raw) as stream:
            data = stream.read(_MOST_BYTES + 1)
        events = msgspec.json.decode(data, type=_Trace).traceEvents
    except (OSError, EOFError, zlib.error, msgspec.MsgspecError) as error:
        raise UserError(f"{path}: not a whole profile: {error}") from None
    ranges = [(each, (each.ts, each.ts + each.dur)) for each in events if each.ts is not None and each.dur is not None]
    steps = [span for each, span in ranges if each.cat == "user_annotation" and each.name.startswith("step ")]
    if not steps:
        raise UserError(f"{path}: has no steps")
    begin, end = min(span[0] for span in steps), max(span[1] for span in steps)
    on_gpu = any(each.cat == "kernel" for each, _ in ranges)
    compute, network, waits = [], [], []
    for each, span in ranges:
        if each.name == DATA_WAIT and each.cat == "user_annotation":
            waits.append(span)
        elif _is_network(each, on_gpu):
            network.append(span)
        elif each.cat in (_ON_DEVICE if on_gpu else ("cpu_op",)) and not each.name.startswith("c10d::"):
            compute.append(span)
    computing = _union(_within(compute, begin, end))
    exposed = _without(_union(_within(network, begin, end)), computing)
    waiting = _without(_union(_within(waits, begin, end)), _union([*computing, *exposed]))
    scale = 1e-6 / len(steps)
    return Profile(
        seconds=(end - begin) * scale,
        compute=_length(computing) * scale,
        network=_length(exposed) * scale,
        data=_length(waiting) * scale,
        on_gpu=on_gpu,
    )


def _is_network(event: _Event, on_gpu: bool) -> bool:
    if on_gpu:
        return event.cat == "kernel" and event.name.startswith("nccl")
    return event.name.startswith("gloo:")


def split_step(seconds: float, data_wait: float, profile: Profile) -> Breakdown:
    """Divide an unprofiled step.

    Args:
        seconds: of the step.
        data_wait: the share of it that the host waited for data.
    """
    if profile.on_gpu:
        busy = profile.compute + profile.network
        scale = min(1.0, seconds / busy) if busy else 1.0
        idle = max(0.0, seconds - busy)
        data = min(data_wait * seconds, idle)
        return Breakdown(data=data, host=idle - data, compute=profile.compute * scale, network=profile.network * scale)
    data = data_wait * seconds
    rest = profile.seconds - profile.data
    scale = (seconds - data) / rest if rest > 0 else 0.0
    compute, network = profile.compute * scale, profile.network * scale
    return Breakdown(data=data, host=max(0.0, seconds - data - compute - network), compute=compute, network=network)


def _within(spans: Iterable[Range], begin: float, end: float) -> list[Range]:
    return [(max(a, begin), min(b, end)) for a, b in spans if a < end and b > begin]


def _union(spans: Sequence[Range]) -> list[Range]:
    """The same moments as ranges that do not overlap, in order."""
    found: list[Range] = []
    for a, b in sorted(spans):
        if found and a <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], b))
        else:
            found.append((a, b))
    return found


def _without(spans: Sequence[Range], removed: Sequence[Range]) -> list[Range]:
    """The moments of ``spans`` that are not in ``removed``; both are unions."""
    found: list[Range] = []
    first = 0
    for a, b in spans:
        while first < len(removed) and removed[first][1] <= a:
            first += 1
        number = first
        while a < b and number < len(removed) and removed[number][0] < b:
            if removed[number][0] > a:
                found.append((a, removed[number][0]))
            a = max(a, removed[number][1])
            number += 1
        if a < b:
            found.append((a, b))
    return found


def _length(spans: Sequence[Range]) -> float:
    return sum(b - a for a, b in spans)
