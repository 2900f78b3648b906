"""Explicit tables of the Triton backend: which variant computes a tile, and with which launch parameters.

No Triton import here, so the tables can be read, and every entry compiled ahead of time, on any machine.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Launch:
    """Launch parameters of one kernel."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    """Features a step of the fused kernels multiplies; the chunked ones have no such step."""
    num_warps: int
    num_stages: int

    def grid(self, num_rows: int, num_columns: int) -> tuple[int, int]:
        """Blocks of rows and of columns that cover a tile."""
        return -(-num_rows // self.BLOCK_M), -(-num_columns // self.BLOCK_N)

    def constants(self, width: int, variant: str) -> dict[str, int | bool]:
        """What the kernel is compiled for, for features of this width."""
        return {
            "BLOCK_M": self.BLOCK_M,
            "BLOCK_N": self.BLOCK_N,
            "BLOCK_K": self.BLOCK_K,
            "EVEN_K": width % self.BLOCK_K == 0,
            "FUSED": variant == "fused",
        }

    def options(self, width: int, variant: str) -> dict[str, int | bool]:
        """The keyword arguments of a launch."""
        return {**self.constants(width, variant), "num_warps": self.num_warps, "num_stages": self.num_stages}


VARIANTS = {
    torch.bfloat16: "fused",
    torch.float16: "fused",
    torch.float32: "chunked",
}
"""Variant by type of the features. ``fused`` computes logits and epilogue in one kernel, so logits never leave the
chip; ``chunked`` takes dot products from cuBLAS and runs the epilogue over them. fp32 products come from cuBLAS because
it follows PyTorch's own setting of TF32 (off unless the user turned it on) at full speed."""

LAUNCHES = {
    ("statistics", "fused"): {
        80: Launch(128, 128, 64, num_warps=8, num_stages=3),
        90: Launch(128, 256, 64, num_warps=8, num_stages=4),
        100: Launch(128, 256, 64, num_warps=8, num_stages=4),
    },
    ("gradient", "fused"): {
        80: Launch(128, 128, 64, num_warps=8, num_stages=3),
        90: Launch(128, 256, 64, num_warps=8, num_stages=3),
        100: Launch(128, 256, 64, num_warps=8, num_stages=3),
    },
    ("statistics", "chunked"): {80: Launch(64, 128, 64, num_warps=8, num_stages=1)},
    ("gradient", "chunked"): {80: Launch(64, 128, 64, num_warps=8, num_stages=1)},
}
"""Launch parameters by kernel and variant, then by the lowest compute capability (major * 10 + minor) they are for."""


def launch_for(kernel: str, variant: str, capability: int) -> Launch:
    """The entry for the newest capability in the table that this chip has; below the oldest, the oldest."""
    table = LAUNCHES[kernel, variant]
    return table[max((level for level in table if level <= capability), default=min(table))]
