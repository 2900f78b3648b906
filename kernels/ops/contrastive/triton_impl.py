"""The ``triton`` backend: tiles of logits in Triton kernels, matrix products with G in cuBLAS.

Per tile, forward stores the row and column maxima and sums of exponentials of each BLOCK_M x BLOCK_N block in memory
and then sums over blocks in a fixed order: no atomics, so two runs give the same bits. Backward turns logits into G =
exp(S - r) + exp(S - c), zero for the positive pairs, and writes it once, in the features' type; G T and G^T I are then
plain products.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .launch import VARIANTS, Launch, launch_for, source_for
from .products import multiply
from .statistics import Kept, Statistics
from .teacher import Distillation
from .torch_tiles import gradient_scale, tile_shape

LOG2E = tl.constexpr(1.4426950408889634)
# Triton's interpreter multiplies bf16 operands as if they were integers, so they are first converted to fp32, which is
# exact. It also rounds to bf16 towards zero, while a GPU rounds to nearest.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
_ALIGNED = 64
# Kernels index a tile's elements with 32 bits; padding adds fewer than 64 columns.
_MOST_ELEMENTS = 2**30


@triton.jit
def block_of(num_rows, num_cols, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(row block, column block) of this program: 8 row blocks share each column block while it is in L2."""
    program = tl.program_id(0)
    row_blocks, col_blocks = tl.cdiv(num_rows, BLOCK_M), tl.cdiv(num_cols, BLOCK_N)
    group = program // (8 * col_blocks)
    height = tl.minimum(row_blocks - group * 8, 8)
    inside = program - group * 8 * col_blocks
    return group * 8 + inside % height, inside // height


@triton.jit
def _dot_products_by_pointer(
    image_ptr, text_ptr, rows, cols, num_rows, num_cols, width, pitch,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """(BLOCK_M, BLOCK_N) fp32 dot products of rows that begin ``pitch`` elements apart; rows and columns past the end
    repeat row or column 0."""
    features = tl.arange(0, BLOCK_K)
    image_row = tl.where(rows < num_rows, rows, 0).to(tl.int64) * pitch
    text_row = tl.where(cols < num_cols, cols, 0).to(tl.int64) * pitch
    image_ptrs = image_ptr + image_row[:, None] + features[None, :]
    text_ptrs = text_ptr + text_row[None, :] + features[:, None]
    dots = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, width, BLOCK_K):
        if EVEN_K:
            image, text = tl.load(image_ptrs), tl.load(text_ptrs)
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
def _dot_products_by_descriptor(
    images, texts, row_block, col_block, width,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """(BLOCK_M, BLOCK_N) fp32 dot products of features loaded by the bulk copy engine, which pads with zeros."""
    dots = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, width, BLOCK_K):
        image, text = images.load([row_block * BLOCK_M, start]), texts.load([col_block * BLOCK_N, start])
        if INTERPRETED:
            image, text = image.to(tl.float32), text.to(tl.float32)
        dots = tl.dot(image, text.T, dots)
    return dots


@triton.jit
def dots_of_block(
    images, texts, dots_ptr, stride, row_block, col_block, rows, cols, num_rows, num_cols, width, pitch,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr, SOURCE: tl.constexpr,
):  # fmt: skip
    if SOURCE == "descriptor":
        dots = _dot_products_by_descriptor(images, texts, row_block, col_block, width, BLOCK_M, BLOCK_N, BLOCK_K)
    elif SOURCE == "pointer":
        dots = _dot_products_by_pointer(
            images, texts, rows, cols, num_rows, num_cols, width, pitch, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K
        )
    else:
        at = rows[:, None] * stride + cols[None, :]
        dots = tl.load(dots_ptr + at, mask=(rows < num_rows)[:, None] & (cols < num_cols)[None, :], other=0.0)
    return dots


@triton.jit
def halves(dots, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The left and right half of a block: epilogues process one at a time, which halves the registers they need."""
    return tl.split(dots.reshape(BLOCK_M, 2, BLOCK_N // 2).permute(0, 2, 1))


@triton.jit
def _half_statistics(
    dots, scale, cols, valid_rows, row_block, num_cols, col_max_ptr, col_sum_ptr,
):  # fmt: skip
    """Store the column maxima and sums of a half block; returns those of the rows, with unscaled maxima."""
    valid_cols, to_power_of_2 = cols < num_cols, scale * LOG2E
    of_cols = tl.where(valid_rows[:, None], dots, float("-inf"))
    col_max = tl.max(of_cols, 0)
    col_sum = tl.sum(tl.exp2((of_cols - col_max[None, :]) * to_power_of_2), 0)
    tl.store(col_max_ptr + row_block * num_cols + cols, col_max * scale, mask=valid_cols)
    tl.store(col_sum_ptr + row_block * num_cols + cols, col_sum, mask=valid_cols)

    of_rows = tl.where(valid_cols[None, :], dots, float("-inf"))
    row_max = tl.max(of_rows, 1)
    shift = tl.where(row_max == float("-inf"), 0.0, row_max)  # the right half may be past the last column
    return row_max, tl.sum(tl.exp2((of_rows - shift[:, None]) * to_power_of_2), 1)


@triton.jit
def statistics_kernel(
    images, texts, dots_ptr, scale_ptr, row_max_ptr, row_sum_ptr, col_max_ptr, col_sum_ptr,
    stride, num_rows, num_cols, width,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr, SOURCE: tl.constexpr,
):  # fmt: skip
    """Row and column maxima and sums of exponentials of each block of a tile of logits; one program per block.

    Writes those of rows as (column blocks, rows) and those of columns as (row blocks, columns).
    """
    row_block, col_block = block_of(num_rows, num_cols, BLOCK_M, BLOCK_N)
    rows, cols = row_block * BLOCK_M + tl.arange(0, BLOCK_M), col_block * BLOCK_N + tl.arange(0, BLOCK_N)
    dots = dots_of_block(
        images, texts, dots_ptr, stride, row_block, col_block, rows, cols, num_rows, num_cols, width, width,
        BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, SOURCE,
    )  # fmt: skip
    scale, valid_rows = tl.load(scale_ptr), rows < num_rows
    left, right = halves(dots, BLOCK_M, BLOCK_N)
    half_cols = col_block * BLOCK_N + tl.arange(0, BLOCK_N // 2)
    max_0, sum_0 = _half_statistics(left, scale, half_cols, valid_rows, row_block, num_cols, col_max_ptr, col_sum_ptr)
    half_cols += BLOCK_N // 2
    max_1, sum_1 = _half_statistics(right, scale, half_cols, valid_rows, row_block, num_cols, col_max_ptr, col_sum_ptr)
    row_max = tl.maximum(max_0, max_1)
    sum_0 *= tl.exp2((max_0 - row_max) * scale * LOG2E)
    sum_1 *= tl.exp2((max_1 - row_max) * scale * LOG2E)
    tl.store(row_max_ptr + col_block * num_rows + rows, row_max * scale, mask=valid_rows)
    tl.store(row_sum_ptr + col_block * num_rows + rows, sum_0 + sum_1, mask=valid_rows)


@triton.jit
def store_gradient(
    grad, rows, cols, valid_rows, num_cols, diagonal, grad_ptr, stride, GRADIENT_SCALE: tl.constexpr,
):  # fmt: skip
    """Store part of G times GRADIENT_SCALE in the type of ``grad_ptr``, with zeros for the positive pairs."""
    grad = tl.where((rows + diagonal)[:, None] == cols[None, :], 0.0, grad)
    grad *= GRADIENT_SCALE
    if INTERPRETED and grad_ptr.dtype.element_ty == tl.bfloat16:
        grad = (grad.to(tl.int32, bitcast=True) + 0x8000).to(tl.float32, bitcast=True)
    at = rows[:, None] * stride + cols[None, :]
    tl.store(grad_ptr + at, grad.to(grad_ptr.dtype.element_ty), mask=valid_rows[:, None] & (cols < num_cols)[None, :])


@triton.jit
def _store_half_gradient(
    dots, scale, rows, cols, valid_rows, num_cols, row_lse, col_lse_ptr, diagonal, grad_ptr, stride,
    GRADIENT_SCALE: tl.constexpr,
):  # fmt: skip
    logits, valid_cols = dots * scale, cols < num_cols
    col_lse = tl.load(col_lse_ptr + cols, mask=valid_cols, other=float("inf"))
    # Subtract before the change of base: the terms may be large while their difference is small.
    grad = tl.exp2((logits - row_lse[:, None]) * LOG2E) + tl.exp2((logits - col_lse[None, :]) * LOG2E)
    store_gradient(grad, rows, cols, valid_rows, num_cols, diagonal, grad_ptr, stride, GRADIENT_SCALE)


@triton.jit
def gradient_kernel(
    images, texts, dots_ptr, scale_ptr, row_lse_ptr, col_lse_ptr, grad_ptr,
    stride, num_rows, num_cols, width, diagonal,
    GRADIENT_SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr, SOURCE: tl.constexpr,
):  # fmt: skip
    """G times GRADIENT_SCALE for a tile of logits, in the type of ``grad_ptr``; one program per block."""
    row_block, col_block = block_of(num_rows, num_cols, BLOCK_M, BLOCK_N)
    rows, cols = row_block * BLOCK_M + tl.arange(0, BLOCK_M), col_block * BLOCK_N + tl.arange(0, BLOCK_N)
    dots = dots_of_block(
        images, texts, dots_ptr, stride, row_block, col_block, rows, cols, num_rows, num_cols, width, width,
        BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, SOURCE,
    )  # fmt: skip
    scale, valid_rows = tl.load(scale_ptr), rows < num_rows
    row_lse = tl.load(row_lse_ptr + rows, mask=valid_rows, other=float("inf"))
    left, right = halves(dots, BLOCK_M, BLOCK_N)
    half_cols = col_block * BLOCK_N + tl.arange(0, BLOCK_N // 2)
    _store_half_gradient(
        left, scale, rows, half_cols, valid_rows, num_cols, row_lse, col_lse_ptr, diagonal, grad_ptr, stride,
        GRADIENT_SCALE,
    )  # fmt: skip
    half_cols += BLOCK_N // 2
    _store_half_gradient(
        right, scale, rows, half_cols, valid_rows, num_cols, row_lse, col_lse_ptr, diagonal, grad_ptr, stride,
        GRADIENT_SCALE,
    )  # fmt: skip


class TritonTiles:
    """Tile arithmetic in Triton kernels.

    The workspace holds one tile of G and, for ``chunked``, one of fp32 dot products per model, with rows padded to a
    multiple of 64 columns so that each row is aligned; in forward it holds the blocks' statistics.
    """

    kept: type[Kept] = Statistics
    kept_of_columns: type[Kept] = Statistics
    _MODELS = 1
    """Whose dot products a tile needs: the student's, and a teacher's."""
    _PARTIAL = 4
    """Numbers that forward stores for the rows and columns of a block."""

    def __init__(
        self,
        image: Tensor,
        num_columns: int,
        workspace_bytes: int,
        source: str | None = None,
        launches: dict[tuple[str, str], Launch] | None = None,
        distillation: Distillation | None = None,
        bias: Tensor | None = None,
    ) -> None:
        """``source`` and ``launches`` (by kernel and source) override the tables in ``launch``, for benchmarks."""
        self.distillation = distillation
        self.bias = bias
        self.width = image.shape[1] if distillation is None else distillation.width
        self._chunked = source == "memory" if source else VARIANTS[image.dtype] == "chunked"
        if not self._chunked and image.dtype == torch.float32:
            raise ValueError("the fused kernels support bf16 and fp16 features: fp32 needs source='memory'")
        major, minor = torch.cuda.get_device_capability(image.device) if image.device.type == "cuda" else (8, 0)
        self._capability = major * 10 + minor
        self._source, self._launches = source, launches or {}
        self.gradient_scale = gradient_scale(image.dtype)
        # Blocks have at least 64 x 64 logits.
        per_logit = (4 * self._MODELS if self._chunked else 0) + max(image.dtype.itemsize, 4 * self._PARTIAL / 64)
        elements = min(max(int(workspace_bytes / per_logit), _ALIGNED), _MOST_ELEMENTS)
        self.rows, self.columns = tile_shape(len(image), padded(num_columns), elements, multiple=_ALIGNED)
        self._capacity = self.rows * self.columns
        self._dots = [torch.empty(self._capacity, device=image.device) for _ in range(self._chunked * self._MODELS)]
        self._grad: Tensor | None = None

    def operand(self, features: Tensor) -> Tensor:
        """The features in their own type, as the kernels expect them."""
        return features.contiguous()

    def statistics(self, image_RD: Tensor, text_CD: Tensor, scale: Tensor, diagonal: int, rows: Any, cols: Any) -> None:
        launch, source = self._launch("statistics", image_RD, text_CD)
        row_blocks, col_blocks = launch.grid(len(image_RD), len(text_CD))
        row_max, row_sum = scale.new_empty(2, col_blocks, len(image_RD))
        col_max, col_sum = scale.new_empty(2, row_blocks, len(text_CD))
        with torch.cuda.device_of(image_RD):
            statistics_kernel[(row_blocks * col_blocks,)](
                *self._dot_products(launch, source, image_RD, text_CD), scale, row_max, row_sum, col_max, col_sum,
                padded(len(text_CD)), len(image_RD), len(text_CD), image_RD.shape[1],
                **launch.options(image_RD.shape[1], source),
            )  # fmt: skip
        rows.merge_(*add_up(row_max, row_sum))
        cols.merge_(*add_up(col_max, col_sum))

    def gradient(
        self, image_RD: Tensor, text_CD: Tensor, scale: Tensor, row_lse: Tensor, col_lse: Tensor, diagonal: int
    ) -> Tensor:
        return self._gradient_by(gradient_kernel, "gradient", image_RD, text_CD, diagonal, scale, row_lse, col_lse)

    def _gradient_by(
        self, kernel: Any, name: str, image: Tensor, text: Tensor, diagonal: int, *operands: Tensor
    ) -> Tensor:
        """G of a tile from a kernel and its ``name`` in ``LAUNCHES``.

        Args:
            operands: what it reads besides dot products.
        """
        launch, source = self._launch(name, image, text)
        row_blocks, col_blocks = launch.grid(len(image), len(text))
        grad = self._gradient_tile(image, text)
        with torch.cuda.device_of(image):
            kernel[(row_blocks * col_blocks,)](
                *self._dot_products(launch, source, image, text), *operands, grad,
                padded(len(text)), len(image), len(text), image.shape[1], diagonal,
                GRADIENT_SCALE=self.gradient_scale, **launch.options(image.shape[1], source),
            )  # fmt: skip
        return grad

    def _launch(self, kernel: str, image: Tensor, text: Tensor) -> tuple[Launch, str]:
        """Launch parameters, and where the dot products of these features come from."""
        address = image.data_ptr() | text.data_ptr()
        if self.distillation is not None:
            address |= self.width * image.itemsize  # where a teacher's features begin in a row
        source = self._source or source_for(self._chunked, self._capability, image.shape[1] * image.itemsize, address)
        return self._launches.get((kernel, source)) or launch_for(kernel, source, self._capability), source

    def _gradient_tile(self, image: Tensor, text: Tensor) -> Tensor:
        if self._grad is None:
            self._grad = image.new_empty(self._capacity)
        return _tile(self._grad, len(image), len(text))

    def _dot_products(
        self, launch: Launch, source: str, image: Tensor, text: Tensor, model: int = 0
    ) -> tuple[Any, Any, Tensor | None]:
        """A kernel's images, texts and dot products, of which it needs the first two or the last."""
        if source == "memory":
            return None, None, multiply(image, text.t(), _tile(self._dots[model], len(image), len(text)))
        if source == "descriptor":
            images = TensorDescriptor.from_tensor(image, [launch.BLOCK_M, launch.BLOCK_K])
            texts = TensorDescriptor.from_tensor(text, [launch.BLOCK_N, launch.BLOCK_K])
            return images, texts, None
        return image, text, None


def add_up(maximum: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    """(n) maximum and sum of exponentials from (blocks, n) partial ones; torch sums in a fixed order."""
    whole = maximum.amax(0)
    return whole, (total * torch.exp(maximum - whole)).sum(0)


def padded(columns: int) -> int:
    return -(-columns // _ALIGNED) * _ALIGNED


def _tile(buffer: Tensor, rows: int, columns: int) -> Tensor:
    return buffer[: rows * padded(columns)].view(rows, -1)[:, :columns]
