"""Explicit tables for the Triton backend: which variant computes a tile, and with which launch parameters.

Triton is not imported here, so the tables can be read, and every entry compiled ahead of time, on any machine.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Launch:
    """Launch parameters of one kernel."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    """Features multiplied per step; unused where dot products come from memory."""
    num_warps: int
    num_stages: int

    def grid(self, num_rows: int, num_columns: int) -> tuple[int, int]:
        """Numbers of row and column blocks that cover a tile."""
        return -(-num_rows // self.BLOCK_M), -(-num_columns // self.BLOCK_N)

    def constants(self, width: int, source: str) -> dict[str, int | bool | str]:
        """The constants the kernel is compiled with, for features of this width."""
        return {
            "BLOCK_M": self.BLOCK_M,
            "BLOCK_N": self.BLOCK_N,
            "BLOCK_K": self.BLOCK_K,
            "EVEN_K": width % self.BLOCK_K == 0,
            "SOURCE": source,
        }

    def options(self, width: int, source: str) -> dict[str, int | bool | str]:
        """The keyword arguments of a launch."""
        return {**self.constants(width, source), "num_warps": self.num_warps, "num_stages": self.num_stages}


VARIANTS = {
    torch.bfloat16: "fused",
    torch.float16: "fused",
    torch.float32: "chunked",
}
"""Variant by feature type. ``fused`` computes dot products and epilogue in one kernel, so logits never leave the chip;
``chunked`` runs the epilogue over dot products from cuBLAS. fp32 products come from cuBLAS because it follows PyTorch's
own TF32 setting (off unless the user turned it on)."""

SOURCES = ("descriptor", "pointer", "memory")
"""Where a kernel gets dot products from: it multiplies features loaded by the bulk copy engine (compute capability 9.0
and a row size that is a multiple of 16 bytes) or by itself (any), or it reads products from memory (chunked)."""

LAUNCHES = {
    ("statistics", "descriptor"): {
        90: Launch(256, 128, 64, num_warps=8, num_stages=4),
        100: Launch(128, 128, 64, num_warps=8, num_stages=3),
    },
    ("gradient", "descriptor"): {
        90: Launch(128, 256, 64, num_warps=8, num_stages=4),
        100: Launch(128, 256, 64, num_warps=8, num_stages=4),
    },
    ("statistics", "pointer"): {80: Launch(128, 128, 64, num_warps=8, num_stages=3)},
    ("gradient", "pointer"): {80: Launch(128, 128, 64, num_warps=8, num_stages=3)},
    ("statistics", "memory"): {80: Launch(64, 128, 64, num_warps=8, num_stages=1)},
    ("gradient", "memory"): {80: Launch(64, 128, 64, num_warps=8, num_stages=1)},
    ("distilled_statistics", "descriptor"): {
        90: Launch(128, 64, 64, num_warps=8, num_stages=4),
        100: Launch(128, 128, 64, num_warps=8, num_stages=4),
    },
    ("distilled_gradient", "descriptor"): {
        90: Launch(128, 128, 64, num_warps=8, num_stages=4),
        100: Launch(128, 128, 64, num_warps=8, num_stages=4),
    },
    ("distilled_statistics", "pointer"): {80: Launch(64, 128, 32, num_warps=8, num_stages=3)},
    ("distilled_gradient", "pointer"): {80: Launch(64, 128, 32, num_warps=8, num_stages=3)},
    ("distilled_statistics", "memory"): {80: Launch(64, 128, 64, num_warps=8, num_stages=1)},
    ("distilled_gradient", "memory"): {80: Launch(64, 128, 64, num_warps=8, num_stages=1)},
}
"""Launch parameters by kernel and source, then by the lowest compute capability (major * 10 + minor) they apply to: the
largest blocks that compile without register spills for every capability and Triton version they are used with."""

# The sigmoid's epilogues fit the softmax's blocks.
LAUNCHES |= {
    (f"sigmoid_{kernel}", source): LAUNCHES[kernel, source]
    for kernel in ("statistics", "gradient")
    for source in SOURCES
}


def source_for(chunked: bool, capability: int, row_bytes: int, address: int) -> str:
    """The source on this chip for features with this row size and start address."""
    if chunked:
        return "memory"
    return "descriptor" if capability >= 90 and row_bytes % 16 == 0 and address % 16 == 0 else "pointer"


def launch_for(kernel: str, source: str, capability: int) -> Launch:
    """The entry for the newest capability that this chip supports; for older chips, the oldest entry."""
    table = LAUNCHES[kernel, source]
    return table[max((level for level in table if level <= capability), default=min(table))]
