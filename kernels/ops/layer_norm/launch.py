"""How the layer norm's kernels are launched. Triton is not imported here."""

from dataclasses import dataclass

PROGRAMS_PER_PROCESSOR = 2
"""Of the backward kernel, on each multiprocessor: each keeps two rows of sums for the parameters' gradients."""


@dataclass(frozen=True)
class Launch:
    """Launch parameters for rows of one width."""

    BLOCK: int
    """Columns of a program: the width, rounded up to a power of two."""
    num_warps: int


def launch_for(width: int) -> Launch:
    """16 bytes per load of a bf16 row and thread, up to 32 warps."""
    block = 1 << (width - 1).bit_length()
    return Launch(block, num_warps=min(max(block // 256, 1), 32))


def num_programs(num_rows: int, num_processors: int) -> int:
    """Programs of the backward kernel; each takes every ``num_programs``-th row, so sums have a fixed order."""
    return min(num_rows, PROGRAMS_PER_PROCESSOR * num_processors)
