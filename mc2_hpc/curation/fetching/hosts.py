"""Requests waiting for their host: a limit on connections and on requests per second for each, and holding one back."""

import asyncio
import heapq
import time
from collections import deque
from dataclasses import dataclass, field
from itertools import count
from typing import Generic, TypeVar

Item = TypeVar("Item")


@dataclass
class _Host(Generic[Item]):
    waiting: deque[Item] = field(default_factory=deque)
    num_open: int = 0
    not_before: float = 0.0
    is_queued: bool = False


class HostQueue(Generic[Item]):
    """Gives out items so that no host gets too many at a time, and a slow host does not delay the others.

    One task takes items; any task may put, release and hold.

    Args:
        connections: items of a host that are given out and not released, at most.
        rate: items of a host per second, at most; 0 for no limit.
    """

    def __init__(self, connections: int, rate: float) -> None:
        self._connections = connections
        self._interval = 1 / rate if rate else 0.0
        self._hosts: dict[str, _Host[Item]] = {}
        self._ready: list[tuple[float, int, str]] = []
        """Heap of (earliest time, turn, host): the hosts with an item waiting and a connection free."""
        self._turns = count()
        self._changed = asyncio.Event()
        self._num_waiting = 0
        self._num_open = 0

    def put(self, host: str, item: Item, *, first: bool = False) -> None:
        """Add an item, after or before the host's others."""
        one = self._hosts.setdefault(host, _Host())
        if first:
            one.waiting.appendleft(item)
        else:
            one.waiting.append(item)
        self._num_waiting += 1
        self._queue(host, one)

    def release(self, host: str) -> None:
        """End the connection of an item that :meth:`get` returned."""
        one = self._hosts[host]
        one.num_open -= 1
        self._num_open -= 1
        self._queue(host, one)
        self._changed.set()

    def hold(self, host: str, seconds: float) -> None:
        """Give out no more items of the host for so long."""
        one = self._hosts[host]
        one.not_before = max(one.not_before, time.monotonic() + seconds)

    def take_all(self, host: str) -> list[Item]:
        """Remove the items of a host that still wait."""
        items = list(self._hosts[host].waiting)
        self._hosts[host].waiting.clear()
        self._num_waiting -= len(items)
        return items

    async def get(self) -> tuple[str, Item] | None:
        """The next item with its host, once there is one; None once none is waiting or unreleased.

        The wait ends, because every connection has a time limit and :meth:`hold` is called with a bounded time.
        """
        while True:
            delay = None
            while self._ready and delay is None:
                ready_at, _, host = self._ready[0]
                one, now = self._hosts[host], time.monotonic()
                if ready_at > now:
                    delay = ready_at - now
                    break
                heapq.heappop(self._ready)
                one.is_queued = False
                if not one.waiting:
                    continue
                if one.not_before > now:  # held since it was queued
                    self._queue(host, one)
                    continue
                one.not_before = now + self._interval
                one.num_open += 1
                self._num_open += 1
                self._num_waiting -= 1
                item = one.waiting.popleft()
                self._queue(host, one)
                return host, item
            if not self._num_waiting and not self._num_open:
                return None
            self._changed.clear()
            try:
                await asyncio.wait_for(self._changed.wait(), delay)
            except TimeoutError:
                pass

    def _queue(self, host: str, one: _Host[Item]) -> None:
        if one.waiting and one.num_open < self._connections and not one.is_queued:
            one.is_queued = True
            heapq.heappush(self._ready, (one.not_before, next(self._turns), host))
            self._changed.set()
