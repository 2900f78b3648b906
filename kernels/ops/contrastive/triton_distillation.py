"""The ``triton`` backend with a teacher: student and teacher logits of a block meet in one kernel.

As in ``triton_impl``, forward stores sums of each block, which are then added in a fixed order, and backward writes G
once. The epilogues hold the logits of both models, so their blocks are smaller.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch
from .statistics import DistilledStatistics
from .teacher import Distillation
from .triton_impl import (
    LOG2E,
    TritonTiles,
    add_up,
    block_of,
    dots_of_block,
    halves,
    padded,
    store_gradient,
)


@triton.jit
def _both_dots(
    images, texts, dots_ptr, teacher_images, teacher_texts, teacher_dots_ptr,
    stride, row_block, col_block, rows, cols, num_rows, num_cols, width, teacher_width,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr, TEACHER_EVEN_K: tl.constexpr, SOURCE: tl.constexpr,
):  # fmt: skip
    """(BLOCK_M, BLOCK_N) fp32 dot products of the student and of the teacher."""
    pitch = width + teacher_width
    student = dots_of_block(
        images, texts, dots_ptr, stride, row_block, col_block, rows, cols, num_rows, num_cols, width, pitch,
        BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, SOURCE,
    )  # fmt: skip
    teacher = dots_of_block(
        teacher_images, teacher_texts, teacher_dots_ptr, stride, row_block, col_block, rows, cols, num_rows, num_cols,
        teacher_width, pitch, BLOCK_M, BLOCK_N, BLOCK_K, TEACHER_EVEN_K, SOURCE,
    )  # fmt: skip
    return student, teacher


@triton.jit
def _exponentials(logits, valid, AXIS: tl.constexpr):
    """exp(logits - maximum) along an axis, zero where not valid, and the maximum."""
    logits = tl.where(valid, logits, float("-inf"))
    maximum = tl.max(logits, AXIS)
    shift = tl.where(maximum == float("-inf"), 0.0, maximum)  # the right half may be past the last column
    return tl.exp2((logits - tl.expand_dims(shift, AXIS)) * LOG2E), maximum


@triton.jit
def _sums(student, teacher, valid, AXIS: tl.constexpr):
    """Along an axis: maximum and sum of exponentials of the student's logits S, those of the teacher's logits U, and
    the sum of exp(U - maximum) (U - S)."""
    weights, student_max = _exponentials(student, valid, AXIS)
    student_sum = tl.sum(weights, AXIS)
    weights, teacher_max = _exponentials(teacher, valid, AXIS)
    return student_max, student_sum, teacher_max, tl.sum(weights, AXIS), tl.sum(weights * (teacher - student), AXIS)


@triton.jit
def _store_sums(out_ptr, plane, student_max, student_sum, teacher_max, teacher_sum, gap, valid):
    tl.store(out_ptr, student_max, mask=valid)
    tl.store(out_ptr + plane, student_sum, mask=valid)
    tl.store(out_ptr + 2 * plane, teacher_max, mask=valid)
    tl.store(out_ptr + 3 * plane, teacher_sum, mask=valid)
    tl.store(out_ptr + 4 * plane, gap, mask=valid)


@triton.jit
def _half_sums(student, teacher, scale, teacher_scale, cols, valid_rows, num_cols, col_sums_ptr, plane):
    """Store the sums of a half block's columns; returns those of its rows."""
    # Scaling the whole block earlier would keep more registers in use.
    student *= scale
    teacher *= teacher_scale
    valid_cols = cols < num_cols
    of_cols = _sums(student, teacher, valid_rows[:, None], 0)
    _store_sums(col_sums_ptr + cols, plane, of_cols[0], of_cols[1], of_cols[2], of_cols[3], of_cols[4], valid_cols)
    return _sums(student, teacher, valid_cols[None, :], 1)


@triton.jit
def distilled_statistics_kernel(
    images, texts, dots_ptr, teacher_images, teacher_texts, teacher_dots_ptr, scale_ptr, teacher_scale,
    row_sums_ptr, col_sums_ptr, stride, num_rows, num_cols, width, teacher_width,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr, TEACHER_EVEN_K: tl.constexpr, SOURCE: tl.constexpr,
):  # fmt: skip
    """The five sums of ``_sums`` of the rows and columns of each block of a tile; one program per block.

    Writes those of rows as (5, column blocks, rows) and those of columns as (5, row blocks, columns).
    """
    row_block, col_block = block_of(num_rows, num_cols, BLOCK_M, BLOCK_N)
    rows, cols = row_block * BLOCK_M + tl.arange(0, BLOCK_M), col_block * BLOCK_N + tl.arange(0, BLOCK_N)
    student, teacher = _both_dots(
        images, texts, dots_ptr, teacher_images, teacher_texts, teacher_dots_ptr,
        stride, row_block, col_block, rows, cols, num_rows, num_cols, width, teacher_width,
        BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, TEACHER_EVEN_K, SOURCE,
    )  # fmt: skip
    scale, valid_rows = tl.load(scale_ptr), rows < num_rows
    left, right = halves(student, BLOCK_M, BLOCK_N)
    teacher_left, teacher_right = halves(teacher, BLOCK_M, BLOCK_N)
    col_sums_ptr += row_block * num_cols
    plane = tl.cdiv(num_rows, BLOCK_M) * num_cols
    half_cols = col_block * BLOCK_N + tl.arange(0, BLOCK_N // 2)
    s_max_0, s_sum_0, u_max_0, u_sum_0, gap_0 = _half_sums(
        left, teacher_left, scale, teacher_scale, half_cols, valid_rows, num_cols, col_sums_ptr, plane
    )
    half_cols += BLOCK_N // 2
    s_max_1, s_sum_1, u_max_1, u_sum_1, gap_1 = _half_sums(
        right, teacher_right, scale, teacher_scale, half_cols, valid_rows, num_cols, col_sums_ptr, plane
    )
    s_max, u_max = tl.maximum(s_max_0, s_max_1), tl.maximum(u_max_0, u_max_1)
    s_sum = s_sum_0 * tl.exp2((s_max_0 - s_max) * LOG2E) + s_sum_1 * tl.exp2((s_max_1 - s_max) * LOG2E)
    weight_0, weight_1 = tl.exp2((u_max_0 - u_max) * LOG2E), tl.exp2((u_max_1 - u_max) * LOG2E)
    _store_sums(
        row_sums_ptr + col_block * num_rows + rows, tl.cdiv(num_cols, BLOCK_N) * num_rows,
        s_max, s_sum, u_max, u_sum_0 * weight_0 + u_sum_1 * weight_1, gap_0 * weight_0 + gap_1 * weight_1, valid_rows,
    )  # fmt: skip


@triton.jit
def _probabilities(logits, row_lse, col_lse):
    # Subtract before the change of base: the terms may be large while their difference is small.
    return tl.exp2((logits - row_lse[:, None]) * LOG2E) + tl.exp2((logits - col_lse[None, :]) * LOG2E)


@triton.jit
def _store_half_gradient(
    student, teacher, share, rows, cols, valid_rows, num_cols, row_lse, teacher_row_lse, col_lse_ptr, diagonal,
    grad_ptr, stride, GRADIENT_SCALE: tl.constexpr,
):  # fmt: skip
    valid_cols = cols < num_cols
    col_lse = tl.load(col_lse_ptr + 2 * cols, mask=valid_cols, other=float("inf"))
    teacher_col_lse = tl.load(col_lse_ptr + 2 * cols + 1, mask=valid_cols, other=float("inf"))
    grad = _probabilities(student, row_lse, col_lse) - share * _probabilities(teacher, teacher_row_lse, teacher_col_lse)
    store_gradient(grad, rows, cols, valid_rows, num_cols, diagonal, grad_ptr, stride, GRADIENT_SCALE)


@triton.jit
def distilled_gradient_kernel(
    images, texts, dots_ptr, teacher_images, teacher_texts, teacher_dots_ptr, scale_ptr, teacher_scale, share,
    row_lse_ptr, col_lse_ptr, grad_ptr, stride, num_rows, num_cols, width, teacher_width, diagonal,
    GRADIENT_SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr, TEACHER_EVEN_K: tl.constexpr, SOURCE: tl.constexpr,
):  # fmt: skip
    """G times GRADIENT_SCALE for a tile of logits, in the type of ``grad_ptr``; one program per block."""
    row_block, col_block = block_of(num_rows, num_cols, BLOCK_M, BLOCK_N)
    rows, cols = row_block * BLOCK_M + tl.arange(0, BLOCK_M), col_block * BLOCK_N + tl.arange(0, BLOCK_N)
    student, teacher = _both_dots(
        images, texts, dots_ptr, teacher_images, teacher_texts, teacher_dots_ptr,
        stride, row_block, col_block, rows, cols, num_rows, num_cols, width, teacher_width,
        BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, TEACHER_EVEN_K, SOURCE,
    )  # fmt: skip
    scale, valid_rows = tl.load(scale_ptr), rows < num_rows
    row_lse = tl.load(row_lse_ptr + 2 * rows, mask=valid_rows, other=float("inf"))
    teacher_row_lse = tl.load(row_lse_ptr + 2 * rows + 1, mask=valid_rows, other=float("inf"))
    left, right = halves(student * scale, BLOCK_M, BLOCK_N)
    teacher_left, teacher_right = halves(teacher * teacher_scale, BLOCK_M, BLOCK_N)
    half_cols = col_block * BLOCK_N + tl.arange(0, BLOCK_N // 2)
    _store_half_gradient(
        left, teacher_left, share, rows, half_cols, valid_rows, num_cols, row_lse, teacher_row_lse, col_lse_ptr,
        diagonal, grad_ptr, stride, GRADIENT_SCALE,
    )  # fmt: skip
    half_cols += BLOCK_N // 2
    _store_half_gradient(
        right, teacher_right, share, rows, half_cols, valid_rows, num_cols, row_lse, teacher_row_lse, col_lse_ptr,
        diagonal, grad_ptr, stride, GRADIENT_SCALE,
    )  # fmt: skip


class DistilledTritonTiles(TritonTiles):
    """Tile arithmetic with a teacher, in Triton kernels."""

    kept = kept_of_columns = DistilledStatistics
    _MODELS = 2
    _PARTIAL = 10

    def __init__(
        self,
        image: Tensor,
        num_columns: int,
        workspace_bytes: int,
        distillation: Distillation,
        source: str | None = None,
        launches: dict[tuple[str, str], Launch] | None = None,
    ) -> None:
        super().__init__(image, num_columns, workspace_bytes, source, launches, distillation=distillation)
        self._teacher = distillation

    def statistics(self, image_RD: Tensor, text_CD: Tensor, scale: Tensor, diagonal: int, rows: Any, cols: Any) -> None:
        launch, source = self._launch("distilled_statistics", image_RD, text_CD)
        row_blocks, col_blocks = launch.grid(len(image_RD), len(text_CD))
        row_sums = scale.new_empty(5, col_blocks, len(image_RD))
        col_sums = scale.new_empty(5, row_blocks, len(text_CD))
        with torch.cuda.device_of(image_RD):
            distilled_statistics_kernel[(row_blocks * col_blocks,)](
                *self._both(launch, source, image_RD, text_CD), scale, self._teacher.scale, row_sums, col_sums,
                *self._shape(image_RD, text_CD), **self._options(launch, source, image_RD),
            )  # fmt: skip
        rows.merge_(*_added_up(row_sums))
        cols.merge_(*_added_up(col_sums))

    def gradient(
        self, image_RD: Tensor, text_CD: Tensor, scale: Tensor, row_lse: Tensor, col_lse: Tensor, diagonal: int
    ) -> Tensor:
        launch, source = self._launch("distilled_gradient", image_RD, text_CD)
        row_blocks, col_blocks = launch.grid(len(image_RD), len(text_CD))
        grad = self._gradient_tile(image_RD, text_CD)
        with torch.cuda.device_of(image_RD):
            distilled_gradient_kernel[(row_blocks * col_blocks,)](
                *self._both(launch, source, image_RD, text_CD), scale, self._teacher.scale, self._teacher.share,
                row_lse, col_lse, grad, *self._shape(image_RD, text_CD), diagonal,
                GRADIENT_SCALE=self.gradient_scale, **self._options(launch, source, image_RD),
            )  # fmt: skip
        return grad

    def _both(self, launch: Launch, source: str, image: Tensor, text: Tensor) -> tuple[object, ...]:
        """A kernel's images, texts and dot products, of the student and of the teacher."""
        parts = zip(self._teacher.parts(image), self._teacher.parts(text), strict=True)
        both = [self._dot_products(launch, source, *part, model) for model, part in enumerate(parts)]
        return (*both[0], *both[1])

    def _shape(self, image: Tensor, text: Tensor) -> tuple[int, ...]:
        """A kernel's stride, rows, columns and widths."""
        return padded(len(text)), len(image), len(text), self.width, image.shape[1] - self.width

    def _options(self, launch: Launch, source: str, image: Tensor) -> dict[str, int | bool | str]:
        even = (image.shape[1] - self.width) % launch.BLOCK_K == 0
        return {**launch.options(self.width, source), "TEACHER_EVEN_K": even}


def _added_up(sums: Tensor) -> tuple[Tensor, Tensor]:
    """(n, 3) maximum and sums from (5, blocks, n) partial ones."""
    student_max, student_sum, teacher_max, teacher_sum, gap = sums
    student, teacher = add_up(student_max, student_sum), add_up(teacher_max, teacher_sum)
    return DistilledStatistics.pack(*student, *teacher, add_up(teacher_max, gap)[1])
