"""Bounded waiting: what each data worker reads, visible to every process of a rank, and items with a deadline."""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt
import torch

_NOTHING = -1
_T = TypeVar("_T")


class Board:
    """The shard that each worker is reading, in shared memory, because a stuck worker cannot answer.

    Args:
        num_workers: each writes its own row.
    """

    def __init__(self, num_workers: int) -> None:
        self._cells = torch.full((num_workers, 2), _NOTHING, dtype=torch.int64).share_memory_()

    def writer(self, worker: int) -> Callable[[int | None], None]:
        """Called with the number of the shard about to be read, and with None when the batch is ready."""
        row: npt.NDArray[np.int64] = self._cells[worker].numpy()

        def write(shard: int | None) -> None:
            row[1] = time.monotonic_ns()
            row[0] = _NOTHING if shard is None else shard

        return write

    def reading(self, worker: int) -> tuple[int, float] | None:
        """The shard that ``worker`` is reading and for how many seconds, or None if it is not reading."""
        shard, since = self._cells[worker].tolist()
        return None if shard == _NOTHING else (shard, (time.monotonic_ns() - since) / 1e9)


class Patient(Generic[_T]):
    """An iterator that runs in its own thread, so that callers can stop waiting.

    A read that never returns leaves its thread behind until the process ends.
    """

    def __init__(self, iterator: Iterator[_T]) -> None:
        self._wanted: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._given: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
        self._asked = False
        # Only the thread holds the iterator: when it ends, so do the iterator's workers.
        arguments = (iterator, self._wanted, self._given)
        self._thread = threading.Thread(target=_serve, args=arguments, name="batches", daemon=True)
        self._thread.start()

    def next(self, seconds: float) -> _T:
        """The next item.

        Raises:
            TimeoutError: it is not ready yet; call again for the same item.
        """
        if not self._asked:
            self._asked = True
            self._wanted.put(True)
        try:
            item, error = self._given.get(timeout=seconds)
        except queue.Empty:
            raise TimeoutError from None
        self._asked = False
        if error is not None:
            raise error
        return item

    def close(self, seconds: float) -> None:
        """Release the iterator, waiting no longer than ``seconds``."""
        self._wanted.put(False)
        self._thread.join(seconds)


def _serve(
    iterator: Iterator[Any],
    wanted: "queue.SimpleQueue[bool]",
    given: "queue.SimpleQueue[tuple[Any, BaseException | None]]",
) -> None:
    while wanted.get():
        try:
            given.put((next(iterator), None))
        except BaseException as error:  # raised again in the thread that wants the item
            given.put((None, error))
