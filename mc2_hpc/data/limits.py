"""Limits to check before workers start: open files and shared memory. A problem is reported at once, in one line."""

import os
import shutil
from pathlib import Path

from mc2_hpc.errors import UserError
from mc2_hpc.reading.files import raise_open_files

SHARED_MEMORY = Path("/dev/shm")
LARGER_SHARED_MEMORY = (
    "make it larger (docker run --shm-size), or lower data.prefetch or data.workers; data.workers=0 needs none"
)

_OWN_FILES = 32
"""For the interpreter, torch, logs and a checkpoint."""
_FILES_PER_WORKER = 8
"""Pipes and sentinels, in the rank."""
_TENSORS_PER_SHARE = 7
"""Upper bound; each keeps a file open while it is shared."""


def check_open_files(*, shards: int, workers: int, prefetch: int, world_size: int) -> None:
    """
    Args:
        shards: that this rank has open, one per lane and source.

    Raises:
        UserError: the limit on open files is below what the rank or one of its workers will need.
    """
    limit = raise_open_files()
    rank = _OWN_FILES + world_size + workers * (_FILES_PER_WORKER + _TENSORS_PER_SHARE * (prefetch + 1))
    worker = _OWN_FILES + -(-shards // max(1, workers)) + _TENSORS_PER_SHARE * prefetch
    needed = max(rank, worker) if workers else rank + shards
    if limit < needed:
        raise UserError(
            f"at most {limit} files may be open in a process, but this run needs up to {needed}: raise the limit "
            f"(`ulimit -n {max(1024, needed)}`), or set data.workers or data.lanes lower"
        )


def check_memory(share_bytes: int) -> None:
    """
    Args:
        share_bytes: of the images in a rank's share of a batch.

    Raises:
        UserError: the shares of all ranks on this machine are larger than its memory.
    """
    needed = share_bytes * _local_ranks()
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if total < needed:
        raise UserError(
            f"this machine has {total / 1e9:,.1f} GB of memory, but the images of one batch take {needed / 1e9:,.1f} "
            "GB of it: set a smaller global_batch"
        )


def check_shared_memory(share_bytes: int, *, workers: int, prefetch: int) -> None:
    """
    Args:
        share_bytes: of the images in a worker's share; 0 if unknown.

    Raises:
        UserError: the prefetched shares of all ranks on this machine do not fit.
    """
    if workers == 0 or not SHARED_MEMORY.is_dir():
        return
    needed = share_bytes * workers * (prefetch + 1) * _local_ranks()
    total = shutil.disk_usage(SHARED_MEMORY).total
    if total < needed:
        raise UserError(
            f"{SHARED_MEMORY} has {total / 1e6:,.1f} MB, but the data workers' shares take up to "
            f"{needed / 1e6:,.1f} MB: {LARGER_SHARED_MEMORY}"
        )


def _local_ranks() -> int:
    local = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return int(local) if local.isdecimal() else 1
