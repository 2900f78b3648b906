"""Live tensor memory of a step: every storage from the operator that created it to the one after which it is gone.

Storages are known by identity and watched by weak references, so views, ``.data`` assignments and tensors saved by
autograd need no special care: a storage counts as long as anything holds it.
"""

import weakref
from collections.abc import Iterable

import torch

from mc2_hpc.planning.records import CATEGORIES, Moment

_MOST_MOMENTS = 400


class _Allocation:
    """One storage, with when it lived (in operators) and what it was for."""

    __slots__ = ("begin", "bytes", "category", "end", "is_known", "phase", "reference")

    def __init__(self, size: int, begin: int, phase: str, category: str) -> None:
        self.bytes, self.begin, self.phase, self.category = size, begin, phase, category
        self.end: int | None = None
        self.is_known = False  # whether the category was marked
        self.reference: object = None


class Allocations:
    """The tracker. :meth:`see` is called with the outputs of every operator."""

    def __init__(self) -> None:
        self.phase = ""
        """Of the step, for new allocations."""
        self.clock = 0
        self._live: dict[int, _Allocation] = {}
        self._ended: list[_Allocation] = []
        self._now = 0
        self._phases: list[tuple[int, str]] = []
        self.peak = 0
        """Most bytes so far, since :meth:`begin`."""

    def begin(self) -> None:
        """Start a step: forget what ended before it."""
        self._ended, self._phases, self.clock = [], [], 0
        for allocation in self._live.values():
            allocation.begin = 0
        self.peak = self._now

    def enter(self, phase: str) -> None:
        """Begin a phase of the step."""
        self.phase = phase
        self._phases.append((self.clock, phase))

    def see(self, tensors: Iterable[torch.Tensor], extra: int = 0) -> None:
        """Note the storages of an operator's outputs.

        Args:
            extra: bytes that the operator itself holds while it runs.
        """
        self.clock += 1
        for tensor in tensors:
            storage = tensor.untyped_storage()
            size, key = storage.nbytes(), id(storage)
            known = self._live.get(key)
            if known is None:
                self._add(key, storage, size)
            elif known.bytes != size:  # resized
                self._now += size - known.bytes
                known.bytes = size
        if extra:
            momentary = _Allocation(extra, self.clock, self.phase, "communication buffers")
            momentary.end = self.clock + 1
            self._ended.append(momentary)
        self.peak = max(self.peak, self._now + extra)

    def _add(self, key: int, storage: torch.UntypedStorage, size: int) -> None:
        allocation = _Allocation(size, self.clock, self.phase, _DEFAULT.get(self.phase, "temporary"))
        # The storage's Python object lives exactly as long as the storage itself.
        allocation.reference = weakref.ref(storage, lambda _: self._remove(key))
        self._live[key] = allocation
        self._now += size

    def _remove(self, key: int) -> None:
        allocation = self._live.pop(key, None)
        if allocation is None:
            return
        self._now -= allocation.bytes
        allocation.end = self.clock + 1
        if allocation.phase == self.phase and self.phase not in _OWN and not allocation.is_known:
            allocation.category = "temporary"
        self._ended.append(allocation)

    def mark(self, tensors: Iterable[torch.Tensor], category: str, *, unless_known: bool = False) -> None:
        """Say what live storages are for; with ``unless_known``, only of those that were not marked before."""
        for tensor in tensors:
            allocation = self._live.get(id(tensor.untyped_storage()))
            if allocation is not None and not (allocation.is_known and unless_known):
                allocation.category, allocation.is_known = category, True

    def by_category(self) -> dict[str, int]:
        """Bytes that are live now."""
        totals = dict.fromkeys(CATEGORIES, 0)
        for allocation in self._live.values():
            totals[allocation.category] += allocation.bytes
        return totals

    def timeline(self) -> tuple[Moment, tuple[Moment, ...]]:
        """The peak, and moments spread over the step with the peak among them."""
        changes: dict[int, list[tuple[str, int]]] = {}
        for allocation in (*self._ended, *self._live.values()):
            changes.setdefault(allocation.begin, []).append((allocation.category, allocation.bytes))
            if allocation.end is not None:
                changes.setdefault(allocation.end, []).append((allocation.category, -allocation.bytes))
        moments, totals = [], dict.fromkeys(CATEGORIES, 0)
        for clock in sorted(changes):
            for category, size in changes[clock]:
                totals[category] += size
            moments.append(Moment(operator=clock, phase=self._phase_at(clock), by_category=dict(totals)))
        peak = max(moments, key=lambda moment: moment.bytes)
        return peak, tuple(_thinned(moments))

    def _phase_at(self, clock: int) -> str:
        phase = ""
        for begin, name in self._phases:
            if begin >= clock:
                break
            phase = name
        return phase


_DEFAULT = {
    "forward": "activations",
    "loss": "loss workspace",
    "backward": "gradients",
    "update": "gradients",
    "look-up": "activations",
    "teacher": "teacher",
}
"""Category of what a phase allocates, unless it is freed within the phase."""
_OWN = ("loss", "teacher")
"""Phases whose memory has one category, whenever it is freed."""


def _thinned(moments: list[Moment]) -> list[Moment]:
    """At most :data:`_MOST_MOMENTS`: the fullest of each stretch of operators."""
    stretch = max(1, -(-len(moments) // _MOST_MOMENTS))
    return [
        max(moments[start : start + stretch], key=lambda moment: moment.bytes)
        for start in range(0, len(moments), stretch)
    ]
