"""Runs traces in processes of their own, because a trace changes global state of torch and DeepSpeed."""

import multiprocessing.connection
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

from mc2_hpc.data.workers import obituary, prepare_worker, worker_context
from mc2_hpc.errors import UserError

T = TypeVar("T")
CHILD = "mc2_hpc.planning.child"
"""The module that sets up a process; the fork server imports it once for all."""
SECONDS = 600.0
"""Longest time for one trace."""


class TraceError(RuntimeError):
    """A trace failed, its process died, or it took longer than :data:`SECONDS`; one line."""


@dataclass(frozen=True)
class _Running:
    place: int
    process: BaseProcess
    end: float


def in_processes(function: Callable[..., T], calls: Sequence[dict[str, Any]]) -> list[T]:
    """``[function(**arguments) for arguments in calls]``, each in a process of its own, one per core at a time.

    ``function`` must be importable. The first error ends the others.

    Raises:
        UserError: as ``function`` does.
        TraceError: another error, or a process died or took too long.
    """
    found: dict[int, T] = {}
    for place, answer in answers(function, calls):
        if isinstance(answer, Exception):
            raise answer
        found[place] = answer
    return [found[place] for place in range(len(calls))]


def answers(function: Callable[..., T], calls: Sequence[dict[str, Any]]) -> Iterator[tuple[int, T | Exception]]:
    """The place in ``calls`` and the result or error of each call, as soon as it is there.

    Whoever stops iterating early ends the calls that are not done.
    """
    context = worker_context(preload=CHILD)
    cores = len(os.sched_getaffinity(0))
    running: dict[Connection, _Running] = {}
    started = 0
    try:
        while started < len(calls) or running:
            while started < len(calls) and len(running) < cores:
                connection, process = _start(context, function, calls[started])
                running[connection] = _Running(started, process, time.monotonic() + SECONDS)
                started += 1
            limit = min(each.end for each in running.values()) - time.monotonic()
            for ready in multiprocessing.connection.wait(list(running), max(0.0, limit)):
                assert isinstance(ready, Connection)
                one = running.pop(ready)
                yield one.place, _received(ready, one.process)
            now = time.monotonic()
            for late in [connection for connection, one in running.items() if one.end <= now]:
                one = running.pop(late)
                _end(late, one.process)
                yield one.place, TraceError(f"a trace took longer than {SECONDS:.0f} s")
    finally:
        for connection, one in running.items():
            _end(connection, one.process)


def _start(
    context: ForkServerContext, function: Callable[..., Any], arguments: dict[str, Any]
) -> tuple[Connection, BaseProcess]:
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(function, arguments, theirs), daemon=True)
    process.start()
    theirs.close()  # so that the death of the process ends the connection
    return ours, process


def _answer(function: Callable[..., Any], arguments: dict[str, Any], connection: Connection) -> None:
    """In the process: send what ``function(**arguments)`` returns or, if it fails, the error."""
    import_module(CHILD)
    prepare_worker(0)
    try:
        found = function(**arguments)
    except UserError as error:
        found = error
    except Exception as error:  # some of torch's exceptions cannot be sent to another process
        found = TraceError(f"a trace failed: {type(error).__name__}: {error}")
    connection.send(found)
    connection.close()


def _received(connection: Connection, process: BaseProcess) -> Any:
    """What the process sent, or how it died. Our own process sent it, so it may be unpickled."""
    try:
        return connection.recv()
    except (EOFError, OSError):  # OSError: it died while it sent
        process.join(SECONDS)
        return TraceError(f"a trace has no result: {obituary([process])}")
    finally:
        _end(connection, process)


def _end(connection: Connection, process: BaseProcess) -> None:
    connection.close()
    process.kill()
    process.join()
    process.close()
