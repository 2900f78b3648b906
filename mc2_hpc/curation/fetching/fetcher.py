"""Fetches the images of a shard: from the addresses of its keys to an outcome for each in a :class:`Ledger`."""

import asyncio
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import pyarrow as pa

from mc2_hpc.curation.fetching.client import Busy, Client, Moved, host_of
from mc2_hpc.curation.fetching.hosts import HostQueue
from mc2_hpc.curation.fetching.ledger import Ledger
from mc2_hpc.curation.fetching.options import FetchOptions
from mc2_hpc.curation.fetching.stored import FORMATS, StoredImage, kept_jpeg, store
from mc2_hpc.curation.pool.urls import absolute_url
from mc2_hpc.drops import Drop, Dropped
from mc2_hpc.errors import UserError
from mc2_hpc.tar import fits_tar_name

_STRIKES = 10
"""A host that is unreachable, silent or busy so often in a row gets no more requests: its other images would each cost
a time limit."""
_STRIKE_REASONS = frozenset({Drop.HOST_UNREACHABLE, Drop.TIMEOUT, Drop.HTTP_BUSY})
_WAIT_S = 2.0
"""The first wait for a busy server that does not say how long; doubled each time."""
_OFFLINE_HOSTS = 100
"""If so many hosts are unreachable and none answers, the fault is here."""
_DECODERS = 1
"""Threads of a worker that decode, beside the one that fetches. By default there is a worker per core, so more of them
would only take turns."""
_LONGEST_EXTENSION = max(FORMATS, key=len)


class _Request(NamedTuple):
    row: int
    url: str
    redirects: int = 0
    retries: int = 0


class Fetcher:
    """Fetches the pending rows of one shard."""

    def __init__(self, options: FetchOptions, ledger: Ledger) -> None:
        self._options = options
        self._ledger = ledger
        self._queue: HostQueue[_Request]
        self._strikes: Counter[str] = Counter()
        self._unreachable: set[str] = set()
        self._has_answer = False

    def run(self, keys: pa.Array, sources: pa.Array) -> None:
        """Fetch until every row has an outcome.

        Args:
            keys: of each row; an image's name in a tar is its key and an extension.
            sources: the address of each row; may be null or no address.

        Raises:
            UserError: no host at all can be reached, so it is this machine that has no network.
        """
        asyncio.run(self._run(keys, sources))

    async def _run(self, keys: pa.Array, sources: pa.Array) -> None:
        options = self._options
        self._queue = HostQueue(options.host_connections, options.host_rate)
        for row in self._ledger.pending():
            self._enter(row, keys[row].as_py(), sources[row].as_py())
        slots = asyncio.Semaphore(options.connections)
        async with Client(options) as client:
            with ThreadPoolExecutor(_DECODERS, "decode") as decoders:
                try:
                    async with asyncio.TaskGroup() as tasks:
                        while True:
                            await slots.acquire()  # released within the time limits of a request and its decoding
                            ready = await self._queue.get()
                            if ready is None:
                                break
                            tasks.create_task(self._do(client, decoders, slots, *ready))
                except* UserError as errors:
                    raise errors.exceptions[0] from None

    def _enter(self, row: int, key: str, source: str | None) -> None:
        try:
            if not fits_tar_name(f"{key}.{_LONGEST_EXTENSION}"):
                raise Dropped(Drop.NAME_TOO_LONG, key)
            url = absolute_url(source or "", "")
        except Dropped as dropped:
            self._ledger.add_drop(row, dropped.reason)
        else:
            self._queue.put(host_of(url), _Request(row, url))

    async def _do(
        self, client: Client, decoders: ThreadPoolExecutor, slots: asyncio.Semaphore, host: str, request: _Request
    ) -> None:
        """Make one request and record its outcome, or queue the request that follows from it."""
        try:
            try:
                answer = await client.request(request.url)
            finally:
                self._queue.release(host)
            self._has_answer = True
            if isinstance(answer, Busy):
                self._wait(host, request, answer)
                return
            self._strikes.pop(host, None)
            if isinstance(answer, Moved):
                self._follow(request, answer)
            else:
                self._ledger.add_image(request.row, await self._store(decoders, answer))
        except Dropped as dropped:
            self._drop(host, request.row, dropped.reason)
        finally:
            slots.release()

    async def _store(self, decoders: ThreadPoolExecutor, body: bytes) -> StoredImage:
        longest = self._options.resize
        kept = kept_jpeg(body, longest)
        if kept is not None:
            return kept
        return await asyncio.get_running_loop().run_in_executor(decoders, partial(store, body, longest))

    def _follow(self, request: _Request, answer: Moved) -> None:
        if request.redirects == self._options.max_redirects:
            raise Dropped(Drop.TOO_MANY_REDIRECTS, answer.url)
        following = request._replace(url=answer.url, redirects=request.redirects + 1)
        self._queue.put(host_of(answer.url), following, first=True)

    def _wait(self, host: str, request: _Request, answer: Busy) -> None:
        wait_s = answer.wait_s if answer.wait_s is not None else _WAIT_S * 2**request.retries
        if wait_s > self._options.max_wait:
            self._strikes[host] = _STRIKES  # longer than we may wait: do not ask again
            raise Dropped(Drop.HTTP_BUSY, f"asks to wait {wait_s:.0f} s")
        self._queue.hold(host, wait_s)
        if request.retries == self._options.retries:
            raise Dropped(Drop.HTTP_BUSY, f"asked {request.retries + 1} times")
        self._queue.put(host, request._replace(retries=request.retries + 1), first=True)

    def _drop(self, host: str, row: int, reason: Drop) -> None:
        self._ledger.add_drop(row, reason)
        if reason not in _STRIKE_REASONS:
            self._has_answer = self._has_answer or reason != Drop.ADDRESS_REFUSED
            self._strikes.pop(host, None)
            return
        if reason == Drop.HOST_UNREACHABLE:
            self._unreachable.add(host)
            if not self._has_answer and len(self._unreachable) >= _OFFLINE_HOSTS:
                raise UserError(
                    f"none of the first {_OFFLINE_HOSTS} hosts can be reached, such as {min(self._unreachable)}: is "
                    "this machine online? Nothing was fetched; run the same command again"
                )
        self._strikes[host] += 1
        if self._strikes[host] >= _STRIKES:
            for request in self._queue.take_all(host):
                self._ledger.add_drop(request.row, reason)
