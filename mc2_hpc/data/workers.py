"""The processes that data loading forks: where they come from, which signals they hear, when and how they end."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Sequence
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess

_CAUSES = {int(signal.SIGBUS): "; is /dev/shm full?", int(signal.SIGKILL): "; out of memory?"}


def worker_context(*, preload: str) -> ForkServerContext:
    """Where worker processes come from.

    A process that has run torch threads, CUDA or DeepSpeed must not be forked. The fork server is a clean one, which
    imports the module ``preload`` once; workers are then forked from it.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([preload])
    _start_fork_server()
    return context


def _start_fork_server() -> None:
    """Start what the workers descend from, deaf to the signals that are the trainer's to act upon: Slurm sends them to
    every process of a step."""
    ours = {signal.SIGTERM, signal.SIGUSR1}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ours)  # what is blocked stays so in processes that start now
    try:
        resource_tracker.ensure_running()  # unblocks SIGTERM, and ignores it by itself
        signal.pthread_sigmask(signal.SIG_BLOCK, ours)
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def prepare_worker(worker: int) -> None:
    """What a worker does first: see to it that it ends with its trainer."""
    threading.Thread(target=_end_with_trainer, daemon=True).start()


def _end_with_trainer() -> None:
    """torch's own watch is on the worker's parent, which is the fork server and lives as long as a worker does."""
    trainer = multiprocessing.parent_process()
    assert trainer is not None
    trainer.join()
    os._exit(1)


def obituary(dead: Sequence[BaseProcess]) -> str:
    """What became of dead workers, in words."""
    ends = []
    for process in dead:
        code = process.exitcode or 0
        end = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        ends.append(f"process {process.pid} died ({end}{_CAUSES.get(-code, '')})")
    return ", ".join(ends)
