"""The ``triton`` backend of the sigmoid loss: as in ``triton_impl``, with an epilogue that needs no maximum.

Forward stores the sums of each block's rows, which are then added in a fixed order, and nothing of columns.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch
from .statistics import NoSums, RowSums
from .triton_impl import LOG2E, TritonTiles, block_of, dots_of_block, halves, padded, store_gradient


@triton.jit
def _log1p(x):
    """log(1 + x) for x in [0, 1] as 2 artanh(x / (2 + x)): a series whose first term left out is below 2e-9 of it.

    A logarithm of 1 + x would lose the small x of almost all pairs.
    """
    z = x / (2.0 + x)
    w = z * z
    series = w * (1.0 / 15.0) + 1.0 / 13.0
    series = series * w + 1.0 / 11.0
    series = series * w + 1.0 / 9.0
    series = series * w + 1.0 / 7.0
    series = series * w + 1.0 / 5.0
    series = series * w + 1.0 / 3.0
    return 2.0 * z * (series * w + 1.0)


@triton.jit
def _sigmoid(logits, small):
    """1 / (1 + exp(-logits)) from ``small``, exp(-|logits|)."""
    return tl.where(logits >= 0.0, 1.0, small) / (1.0 + small)


@triton.jit
def _half_sums(dots, scale, bias, rows, cols, num_cols, diagonal):
    """Sums over the rows of a half block of softplus and sigmoid of the logits that are not of positive pairs."""
    left_out = (cols >= num_cols)[None, :] | ((rows + diagonal)[:, None] == cols[None, :])
    logits = tl.where(left_out, float("-inf"), dots * scale + bias)
    small = tl.exp2(-tl.abs(logits) * LOG2E)  # the smaller exponential: it does not overflow
    softplus = tl.maximum(logits, 0.0) + _log1p(small)
    return tl.sum(softplus, 1), tl.sum(_sigmoid(logits, small), 1)


@triton.jit
def sigmoid_statistics_kernel(
    images, texts, dots_ptr, scale_ptr, bias_ptr, softplus_ptr, sigmoid_ptr,
    stride, num_rows, num_cols, width, diagonal,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr, SOURCE: tl.constexpr,
):  # fmt: skip
    """Both sums of ``_half_sums`` of the rows of each block of a tile, (column blocks, rows); one program per block."""
    row_block, col_block = block_of(num_rows, num_cols, BLOCK_M, BLOCK_N)
    rows, cols = row_block * BLOCK_M + tl.arange(0, BLOCK_M), col_block * BLOCK_N + tl.arange(0, BLOCK_N)
    dots = dots_of_block(
        images, texts, dots_ptr, stride, row_block, col_block, rows, cols, num_rows, num_cols, width, width,
        BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, SOURCE,
    )  # fmt: skip
    scale, bias = tl.load(scale_ptr), tl.load(bias_ptr)
    left, right = halves(dots, BLOCK_M, BLOCK_N)
    half_cols = col_block * BLOCK_N + tl.arange(0, BLOCK_N // 2)
    softplus_0, sigmoid_0 = _half_sums(left, scale, bias, rows, half_cols, num_cols, diagonal)
    half_cols += BLOCK_N // 2
    softplus_1, sigmoid_1 = _half_sums(right, scale, bias, rows, half_cols, num_cols, diagonal)
    at, valid_rows = col_block * num_rows + rows, rows < num_rows
    tl.store(softplus_ptr + at, softplus_0 + softplus_1, mask=valid_rows)
    tl.store(sigmoid_ptr + at, sigmoid_0 + sigmoid_1, mask=valid_rows)


@triton.jit
def sigmoid_gradient_kernel(
    images, texts, dots_ptr, scale_ptr, bias_ptr, grad_ptr,
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
    scale, bias, valid_rows = tl.load(scale_ptr), tl.load(bias_ptr), rows < num_rows
    left, right = halves(dots * scale + bias, BLOCK_M, BLOCK_N)
    half_cols = col_block * BLOCK_N + tl.arange(0, BLOCK_N // 2)
    grad = _sigmoid(left, tl.exp2(-tl.abs(left) * LOG2E))
    store_gradient(grad, rows, half_cols, valid_rows, num_cols, diagonal, grad_ptr, stride, GRADIENT_SCALE)
    half_cols += BLOCK_N // 2
    grad = _sigmoid(right, tl.exp2(-tl.abs(right) * LOG2E))
    store_gradient(grad, rows, half_cols, valid_rows, num_cols, diagonal, grad_ptr, stride, GRADIENT_SCALE)


class SigmoidTritonTiles(TritonTiles):
    """Tile arithmetic of the sigmoid loss, in Triton kernels."""

    kept = RowSums
    kept_of_columns = NoSums
    _PARTIAL = 2

    def __init__(
        self,
        image: Tensor,
        num_columns: int,
        workspace_bytes: int,
        bias: Tensor,
        source: str | None = None,
        launches: dict[tuple[str, str], Launch] | None = None,
    ) -> None:
        super().__init__(image, num_columns, workspace_bytes, source, launches, bias=bias)
        self._added = bias

    def statistics(self, image_RD: Tensor, text_CD: Tensor, scale: Tensor, diagonal: int, rows: Any, cols: Any) -> None:
        launch, source = self._launch("sigmoid_statistics", image_RD, text_CD)
        row_blocks, col_blocks = launch.grid(len(image_RD), len(text_CD))
        softplus, sigmoid = scale.new_empty(2, col_blocks, len(image_RD))
        with torch.cuda.device_of(image_RD):
            sigmoid_statistics_kernel[(row_blocks * col_blocks,)](
                *self._dot_products(launch, source, image_RD, text_CD), scale, self._added, softplus, sigmoid,
                padded(len(text_CD)), len(image_RD), len(text_CD), image_RD.shape[1], diagonal,
                **launch.options(image_RD.shape[1], source),
            )  # fmt: skip
        rows.merge_(softplus.sum(0), sigmoid.sum(0))

    def gradient(
        self, image_RD: Tensor, text_CD: Tensor, scale: Tensor, row_lse: Tensor, col_lse: Tensor, diagonal: int
    ) -> Tensor:
        return self._gradient_by(
            sigmoid_gradient_kernel, "sigmoid_gradient", image_RD, text_CD, diagonal, scale, self._added
        )
