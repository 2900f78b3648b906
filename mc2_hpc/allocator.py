"""The C library's heap in a process that trains on a CPU: freed memory stays, and lies on huge pages."""

import ctypes
import logging
import mmap
import os
import platform

logger = logging.getLogger(__name__)

_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8  # malloc.h
_SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_ARENA_MAX")
_HUGE_PAGE = 1 << 21


def keep_freed_memory() -> bool:
    """Let this process keep what it frees for its next allocations, on huge pages; returns whether it does from now on.

    torch has no caching allocator for CPUs. By default glibc returns a large tensor's memory to the kernel as soon as
    it is freed, so every step maps and clears the pages of its activations again, 4 KiB at a time. Here the heap only
    grows, to about the peak of a step, and the kernel is asked for transparent huge pages on it, with which large
    matrix products miss the TLB less.

    Without glibc, and where the environment sets malloc's own variables (``MALLOC_TRIM_THRESHOLD_`` and its like, or
    ``glibc.malloc`` in ``GLIBC_TUNABLES``), nothing is changed. Call this before threads start: those that have
    allocated already keep heaps of their own.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    if any(name in os.environ for name in _SETTINGS) or "glibc.malloc." in os.environ.get("GLIBC_TUNABLES", ""):
        logger.info("malloc: as the environment sets it")
        return False
    libc = ctypes.CDLL(None)
    # No block has a mapping of its own; threads (of gloo, the loader) share one heap, because theirs would be unmapped
    # once they are empty; and -1 switches trimming off.
    if not all(libc.mallopt(*setting) for setting in ((_M_MMAP_MAX, 0), (_M_ARENA_MAX, 1), (_M_TRIM_THRESHOLD, -1))):
        return False
    _reserve_huge_pages(libc, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2)
    return True


def _reserve_huge_pages(libc: ctypes.CDLL, size: int) -> None:
    """Ask for huge pages on the ``size`` bytes by which the heap grows next.

    The advice applies to addresses that exist. So a block of that size is allocated, which uses no memory until it is
    written to, and freed, which leaves its addresses to the heap. Where there is no room for it, or the kernel has no
    huge pages, the heap's pages are small.
    """
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    block = libc.malloc(size)
    if block is None:
        return
    start = -(-block // _HUGE_PAGE) * _HUGE_PAGE
    libc.madvise(start, (block + size - start) // _HUGE_PAGE * _HUGE_PAGE, mmap.MADV_HUGEPAGE)
    libc.free(block)
