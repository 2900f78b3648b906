"""The processes that data loading forks: how they start, which signals they receive, and how they end."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from typing import Any

from torch.utils.data import DataLoader

from mc2_hpc.data import source as worker_module
from mc2_hpc.data.batches import Share
from mc2_hpc.data.lanes import deal
from mc2_hpc.data.source import Failure, ShareSource
from mc2_hpc.data.watch import Board, Patient
from mc2_hpc.errors import UserError

_POLL_S = 1.0
_CLOSE_S = 10.0
_CAUSES = {int(signal.SIGBUS): "; is /dev/shm full?", int(signal.SIGKILL): "; out of memory?"}


class DataStalled(RuntimeError):
    """No samples arrived for ``data.stall_seconds``, a worker died, or the storage cannot be reached. The message is
    one line with rank, worker and shard. The run can be resumed."""


class WorkerShares:
    """An endless iterator over a step's shares, one per worker in lane order, with a limit on waiting.

    Args:
        source: of the shares.
        num_workers: processes; 0 makes a single share in a thread of this process.
        prefetch: shares that each worker keeps ready.
        rank: of this process, for messages.
        stall_seconds: longest wait for a share.

    Raises:
        UserError: while iterating, a worker found something wrong with the data.
        DataStalled: while iterating.
    """

    def __init__(
        self, source: ShareSource, *, num_workers: int, prefetch: int, rank: int, stall_seconds: float
    ) -> None:
        self.processes: list[BaseProcess] = []
        """The workers, once they have started."""
        self._source = source
        self._num_workers = num_workers
        self._prefetch = prefetch
        self._rank = rank
        self._stall_seconds = stall_seconds
        self._shares: Patient[Share | Failure] | None = None

    @property
    def board(self) -> Board:
        """Which shard each worker is reading."""
        return self._source.board

    def __iter__(self) -> "WorkerShares":
        return self

    def __next__(self) -> list[Share]:
        if self._shares is None:
            self._shares = self._start()
        return [self._next_share(self._shares, worker) for worker in range(max(1, self._num_workers))]

    def close(self) -> None:
        """Stop the workers. Iterating again would start from the original position."""
        if self._shares is not None:
            self._shares.close(_CLOSE_S)
        for process in self.processes:  # those that hang
            process.kill()
        self._shares, self.processes = None, []

    def _start(self) -> Patient[Share | Failure]:
        if self._num_workers == 0:
            return Patient(iter(self._source))
        loader = DataLoader(
            self._source,
            batch_size=None,
            num_workers=self._num_workers,
            prefetch_factor=self._prefetch,
            multiprocessing_context=worker_context(preload=worker_module.__name__),
            collate_fn=_as_is,
            worker_init_fn=prepare_worker,
        )
        others = set(multiprocessing.active_children())
        shares: Iterator[Share | Failure] = iter(loader)
        self.processes = [child for child in multiprocessing.active_children() if child not in others]
        return Patient(shares)

    def _next_share(self, shares: Patient[Share | Failure], worker: int) -> Share:
        deadline = time.monotonic() + self._stall_seconds
        share: Share | Failure | None = None
        while share is None:
            try:
                share = shares.next(max(0.0, min(_POLL_S, deadline - time.monotonic())))
            except TimeoutError:
                # Workers are children of the fork server, so their death sends no signal here. A worker that is killed
                # while it writes leaves its share half sent and the others waiting to send.
                if dead := self._dead():
                    raise self._stalled(worker, obituary(dead)) from None
                if time.monotonic() >= deadline:
                    raise self._stalled(worker, f"none for {self._stall_seconds:g} s") from None
            except (RuntimeError, OSError, EOFError) as error:
                if not isinstance(error, RuntimeError):
                    time.sleep(_POLL_S)  # a connection may break before its process counts as dead
                if dead := self._dead():
                    raise self._stalled(worker, obituary(dead)) from error
                raise  # the loading code's own error, with its traceback
        if isinstance(share, Failure):
            if isinstance(share.error, UserError):
                raise share.error
            raise self._stalled(worker, str(share.error))
        return share

    def _dead(self) -> list[BaseProcess]:
        return [process for process in self.processes if not process.is_alive()]

    def _stalled(self, worker: int, reason: str) -> DataStalled:
        lanes = deal(sorted(self._source.positions), worker, max(1, self._num_workers))
        where = f"rank {self._rank}: no samples from data worker {worker} (lanes {lanes[0]}-{lanes[-1]})"
        reading = self.board.reading(worker)
        if reading is not None:
            shard, seconds = reading
            where += f", which has been reading {self._source.shard_name(shard)} for {seconds:.0f} s"
        for process in self.processes:
            process.kill()
        self._shares = None  # nothing more can arrive, so there is no need to wait for its thread
        return DataStalled(f"{where}: {reason}; fix it and restart the run, which resumes from its last checkpoint")


def _as_is(share: Any) -> Any:
    return share


def worker_context(*, preload: str) -> ForkServerContext:
    """The context that worker processes start from.

    A process that has run torch threads, CUDA or DeepSpeed must not be forked. The fork server is a clean process that
    imports the module ``preload`` once; workers are then forked from it.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([preload])
    _start_fork_server()
    return context


def _start_fork_server() -> None:
    """Start the workers' parent with the trainer's signals blocked: Slurm sends them to every process of a step, and a
    terminal sends Ctrl-C to every process of a job."""
    ours = {signal.SIGTERM, signal.SIGUSR1, signal.SIGINT}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ours)  # children inherit the blocked signals
    try:
        resource_tracker.ensure_running()  # unblocks SIGTERM, but ignores it
        signal.pthread_sigmask(signal.SIG_BLOCK, ours)
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def prepare_worker(worker: int) -> None:
    """Called first in a worker: make sure that it ends with its trainer, and that a teacher's tokenizer computes in one
    thread, because the workers provide the parallelism."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_end_with_trainer, daemon=True).start()


def _end_with_trainer() -> None:
    """torch itself watches the worker's parent, but that is the fork server, which lives as long as any worker."""
    trainer = multiprocessing.parent_process()
    assert trainer is not None
    trainer.join()
    os._exit(1)


def obituary(dead: Sequence[BaseProcess]) -> str:
    """A description of how dead workers ended."""
    ends = []
    for process in dead:
        code = process.exitcode or 0
        end = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        ends.append(f"process {process.pid} died ({end}{_CAUSES.get(-code, '')})")
    return ", ".join(ends)
