"""Work spread over processes, with results in input order and a bounded number of inputs in memory."""

import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType
from typing import Self, TypeVar

from mc2_hpc.errors import UserError

_Input = TypeVar("_Input")
_Output = TypeVar("_Output")


class Workers:
    """Processes that start when first needed and run until the ``with`` block ends; 1 means this process."""

    def __init__(self, number: int = 1) -> None:
        if number < 1:
            raise UserError(f"workers={number}: must be at least 1")
        self.number = number
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def map(self, function: Callable[[_Input], _Output], inputs: Iterable[_Input]) -> Iterator[_Output]:
        """``function`` of each input, in order; at most two inputs per worker are in progress.

        Raises:
            UserError: a worker process died.
        """
        if self.number == 1:
            yield from map(function, inputs)
            return
        if self._pool is None:
            # Not forked: the threads of numpy and of segmenters do not survive a fork.
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self.number, mp_context=context)
        running: deque[Future[_Output]] = deque()
        try:
            for item in inputs:
                running.append(self._pool.submit(function, item))
                if len(running) >= 2 * self.number:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        except BrokenProcessPool:
            self._pool = None
            raise UserError("a worker process died, probably out of memory; use fewer workers") from None
        finally:
            for future in running:
                future.cancel()
