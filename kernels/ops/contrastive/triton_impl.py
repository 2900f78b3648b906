"""The ``triton`` backend: tiles of logits in Triton kernels, matrix products with G in cuBLAS.

Per tile, forward leaves the row maxima and sums of exponentials of each BLOCK_M x BLOCK_N block in memory and adds
blocks up in a fixed order afterwards: no atomics, so two runs give the same bits. Backward turns logits into
G = exp(S - r) + exp(S - c) - 2 [pair] and writes it once, in the features' type; G T and G^T I are plain products.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import VARIANTS, Launch, launch_for
from .products import multiply
from .statistics import Statistics
from .torch_tiles import gradient_scale, tile_shape

LOG2E = tl.constexpr(1.4426950408889634)
# Triton's interpreter multiplies bf16 operands as if they were integers: there they are widened first, which is exact.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
_ALIGNED = 64


@triton.jit
def _block_of(num_rows, num_cols, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(row block, column block) of this program: 8 row blocks share each column block while it is in L2."""
    program = tl.program_id(0)
    row_blocks, col_blocks = tl.cdiv(num_rows, BLOCK_M), tl.cdiv(num_cols, BLOCK_N)
    group = program // (8 * col_blocks)
    height = tl.minimum(row_blocks - group * 8, 8)
    inside = program - group * 8 * col_blocks
    return group * 8 + inside % height, inside // height


@triton.jit
def _dot_products(
    image_ptr, text_ptr, rows, cols, num_rows, num_cols, width,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """(BLOCK_M, BLOCK_N) fp32 dot products; those of rows and columns past the end repeat row or column 0."""
    features = tl.arange(0, BLOCK_K)
    image_row = tl.where(rows < num_rows, rows, 0).to(tl.int64) * width
    text_row = tl.where(cols < num_cols, cols, 0).to(tl.int64) * width
    image_ptrs = image_ptr + image_row[:, None] + features[None, :]
    text_ptrs = text_ptr + text_row[None, :] + features[:, None]
    dots = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, width, BLOCK_K):
        if EVEN_K:
            image = tl.load(image_ptrs)
            text = tl.load(text_ptrs)
        else:
            image = tl.load(image_ptrs, mask=features[None, :] < width - start, other=0.0)
            text = tl.load(text_ptrs, mask=features[:, None] < width - start, other=0.0)
        if INTERPRETED:
            image, text = image.to(tl.float32), text.to(tl.float32)
        dots = tl.dot(image, text, dots)
        image_ptrs += BLOCK_K
        text_ptrs += BLOCK_K
    return dots


@triton.jit
def _dots_of_block(
    image_ptr, text_ptr, dots_ptr, dots_stride, rows, cols, num_rows, num_cols, width,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr, FUSED: tl.constexpr,
):  # fmt: skip
    if FUSED:
        dots = _dot_products(
            image_ptr, text_ptr, rows, cols, num_rows, num_cols, width, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K
        )
    else:
        at = rows.to(tl.int64)[:, None] * dots_stride + cols[None, :]
        dots = tl.load(dots_ptr + at, mask=(rows < num_rows)[:, None] & (cols < num_cols)[None, :], other=0.0)
    return dots


@triton.jit
def statistics_kernel(
    image_ptr, text_ptr, dots_ptr, scale_ptr, row_max_ptr, row_sum_ptr, col_max_ptr, col_sum_ptr,
    dots_stride, num_rows, num_cols, width,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr, FUSED: tl.constexpr,
):  # fmt: skip
    """Row and column statistics of a tile of logits, from features (FUSED) or their dot products; a program a block."""
    row_block, col_block = _block_of(num_rows, num_cols, BLOCK_M, BLOCK_N)
    rows, cols = row_block * BLOCK_M + tl.arange(0, BLOCK_M), col_block * BLOCK_N + tl.arange(0, BLOCK_N)
    dots = _dots_of_block(
        image_ptr, text_ptr, dots_ptr, dots_stride, rows, cols, num_rows, num_cols, width,
        BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, FUSED,
    )  # fmt: skip
    scale = tl.load(scale_ptr)
    to_power_of_2 = scale * LOG2E
    valid_rows, valid_cols = rows < num_rows, cols < num_cols

    of_rows = tl.where(valid_cols[None, :], dots, float("-inf"))
    row_max = tl.max(of_rows, 1)
    row_sum = tl.sum(tl.exp2((of_rows - row_max[:, None]) * to_power_of_2), 1)
    row_at = col_block.to(tl.int64) * num_rows + rows
    tl.store(row_max_ptr + row_at, row_max * scale, mask=valid_rows)
    tl.store(row_sum_ptr + row_at, row_sum, mask=valid_rows)

    of_cols = tl.where(valid_rows[:, None], dots, float("-inf"))
    col_max = tl.max(of_cols, 0)
    col_sum = tl.sum(tl.exp2((of_cols - col_max[None, :]) * to_power_of_2), 0)
    col_at = row_block.to(tl.int64) * num_cols + cols
    tl.store(col_max_ptr + col_at, col_max * scale, mask=valid_cols)
    tl.store(col_sum_ptr + col_at, col_sum, mask=valid_cols)


@triton.jit
def gradient_kernel(
    image_ptr, text_ptr, dots_ptr, scale_ptr, row_lse_ptr, col_lse_ptr, grad_ptr, weighted_ptr,
    dots_stride, grad_stride, num_rows, num_cols, width, diagonal,
    GRADIENT_SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr, FUSED: tl.constexpr,
):  # fmt: skip
    """G times GRADIENT_SCALE, and each block's sum of G S, from features (FUSED) or dot products; a program a block."""
    row_block, col_block = _block_of(num_rows, num_cols, BLOCK_M, BLOCK_N)
    rows, cols = row_block * BLOCK_M + tl.arange(0, BLOCK_M), col_block * BLOCK_N + tl.arange(0, BLOCK_N)
    dots = _dots_of_block(
        image_ptr, text_ptr, dots_ptr, dots_stride, rows, cols, num_rows, num_cols, width,
        BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, FUSED,
    )  # fmt: skip
    logits = dots * tl.load(scale_ptr)
    valid_rows, valid_cols = rows < num_rows, cols < num_cols
    row_lse = tl.load(row_lse_ptr + rows, mask=valid_rows, other=float("inf"))
    col_lse = tl.load(col_lse_ptr + cols, mask=valid_cols, other=float("inf"))
    # Subtract before the change of base: the difference is small where both terms are large.
    grad = tl.exp2((logits - row_lse[:, None]) * LOG2E) + tl.exp2((logits - col_lse[None, :]) * LOG2E)
    grad = tl.where((rows + diagonal)[:, None] == cols[None, :], grad - 2.0, grad)
    valid = valid_rows[:, None] & valid_cols[None, :]
    weighted = tl.sum(tl.sum(tl.where(valid, grad * logits, 0.0), 1), 0)
    tl.store(weighted_ptr + tl.program_id(0), weighted)
    grad_at = rows.to(tl.int64)[:, None] * grad_stride + cols[None, :]
    tl.store(grad_ptr + grad_at, (grad * GRADIENT_SCALE).to(grad_ptr.dtype.element_ty), mask=valid)


class TritonTiles:
    """Tile arithmetic in Triton kernels.

    The workspace holds one tile of G and, for ``chunked``, one of fp32 dot products, with rows padded to a multiple of
    64 columns so that each starts aligned, or the blocks' statistics.
    """

    def __init__(
        self,
        image: Tensor,
        num_columns: int,
        workspace_bytes: int,
        variant: str | None = None,
        launches: dict[str, Launch] | None = None,
    ) -> None:
        self.variant = variant or VARIANTS[image.dtype]
        if self.variant == "fused" and image.dtype == torch.float32:
            raise ValueError("the fused kernels take bf16 and fp16 features: use the chunked variant for fp32")
        self._launches = launches or default_launches(self.variant, image.device)
        self.gradient_scale = gradient_scale(image.dtype)
        smallest = min(min(launch.BLOCK_M, launch.BLOCK_N) for launch in self._launches.values())
        statistics_bytes = 16 / smallest  # at most: a maximum and a sum, of rows and of columns, a block
        per_logit = (4 if self.variant == "chunked" else 0) + max(image.dtype.itemsize, statistics_bytes)
        elements = max(int(workspace_bytes / per_logit), _ALIGNED)
        self.rows, self.columns = tile_shape(len(image), num_columns, elements, multiple=_ALIGNED)
        capacity = self.rows * _padded(self.columns)
        self._dots = torch.empty(capacity, device=image.device) if self.variant == "chunked" else None
        self._grad: Tensor | None = None

    def operand(self, features: Tensor) -> Tensor:
        """The features as the kernels take them: in their own type."""
        return features.contiguous()

    def statistics(self, image_RD: Tensor, text_CD: Tensor, scale: Tensor, rows: Statistics, cols: Statistics) -> None:
        launch = self._launches["statistics"]
        row_blocks, col_blocks = launch.grid(len(image_RD), len(text_CD))
        row_max, row_sum = scale.new_empty(2, col_blocks, len(image_RD))
        col_max, col_sum = scale.new_empty(2, row_blocks, len(text_CD))
        dots = self._dot_products(image_RD, text_CD)
        with torch.cuda.device_of(image_RD):
            statistics_kernel[(row_blocks * col_blocks,)](
                image_RD, text_CD, dots, scale, row_max, row_sum, col_max, col_sum,
                _stride(dots), len(image_RD), len(text_CD), image_RD.shape[1],
                **launch.options(image_RD.shape[1], self.variant),
            )  # fmt: skip
        rows.merge_(*_add_up(row_max, row_sum))
        cols.merge_(*_add_up(col_max, col_sum))

    def gradient(
        self, image_RD: Tensor, text_CD: Tensor, scale: Tensor, row_lse: Tensor, col_lse: Tensor, diagonal: int
    ) -> tuple[Tensor, Tensor]:
        launch = self._launches["gradient"]
        row_blocks, col_blocks = launch.grid(len(image_RD), len(text_CD))
        weighted = scale.new_empty(row_blocks * col_blocks)
        if self._grad is None:
            self._grad = image_RD.new_empty(self.rows * _padded(self.columns))
        grad = _tile(self._grad, len(image_RD), len(text_CD))
        dots = self._dot_products(image_RD, text_CD)
        with torch.cuda.device_of(image_RD):
            gradient_kernel[(row_blocks * col_blocks,)](
                image_RD, text_CD, dots, scale, row_lse, col_lse, grad, weighted,
                _stride(dots), grad.stride(0), len(image_RD), len(text_CD), image_RD.shape[1], diagonal,
                GRADIENT_SCALE=self.gradient_scale, **launch.options(image_RD.shape[1], self.variant),
            )  # fmt: skip
        return grad, weighted.double().sum()

    def _dot_products(self, image: Tensor, text: Tensor) -> Tensor | None:
        if self._dots is None:
            return None
        return multiply(image, text.t(), _tile(self._dots, len(image), len(text)))


def default_launches(variant: str, device: torch.device) -> dict[str, Launch]:
    """The table's launch parameters of both kernels for this device (the interpreter takes the oldest chip's)."""
    major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    return {kernel: launch_for(kernel, variant, major * 10 + minor) for kernel in ("statistics", "gradient")}


def _add_up(maximum: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    """(n) maximum and sum of exponentials of (blocks, n) partial ones; torch adds up in a fixed order."""
    whole = maximum.amax(0)
    return whole, (total * torch.exp(maximum - whole)).sum(0)


def _padded(columns: int) -> int:
    return -(-columns // _ALIGNED) * _ALIGNED


def _tile(buffer: Tensor, rows: int, columns: int) -> Tensor:
    return buffer[: rows * _padded(columns)].view(rows, -1)[:, :columns]


def _stride(dots: Tensor | None) -> int:
    return 0 if dots is None else dots.stride(0)
