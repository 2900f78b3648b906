"""The ``tiled`` backend: tiles of logits in PyTorch, on any device."""

import math
from typing import Any

import torch
from torch import Tensor

from .products import accumulator_dtype, multiply
from .statistics import DistilledStatistics, Kept, NoSums, RowSums, Statistics
from .teacher import Distillation

FP16_GRADIENT_SCALE = 2.0**14
"""|G| <= 2 outside the positive pairs, and its terms may be as small as 1/B: this keeps 1/B a normal fp16 number up to
a quarter of a billion pairs."""


def gradient_scale(operand_dtype: torch.dtype) -> float:
    """The factor for G when it is stored in this type."""
    return FP16_GRADIENT_SCALE if operand_dtype == torch.float16 else 1.0


def tile_shape(num_rows: int, num_columns: int, elements: int, multiple: int = 64) -> tuple[int, int]:
    """(rows, columns) of a tile of at most ``elements`` logits: as square as possible, because a square tile reads its
    operands least often. A side is a multiple of ``multiple`` unless it covers the whole problem."""

    def fit(limit: int, size: int) -> int:
        if limit >= size:
            return max(size, 1)
        return max(limit - limit % multiple, 1) if limit >= multiple else max(limit, 1)

    side = math.isqrt(elements)
    if num_rows <= side:
        rows = fit(side, num_rows)
        return rows, fit(elements // rows, num_columns)
    columns = fit(side, num_columns)
    return fit(elements // columns, num_rows), columns


class TorchTiles:
    """Tile arithmetic in PyTorch. The workspace holds tiles in the accumulator's type and, for half-precision operands,
    one more in theirs. Operands stay in half precision only on a GPU (see ``products``)."""

    kept: type[Kept] = Statistics
    kept_of_columns: type[Kept] = Statistics
    _NUM_TILES = 2
    """In the accumulator's type."""

    def __init__(
        self,
        image: Tensor,
        num_columns: int,
        workspace_bytes: int,
        distillation: Distillation | None = None,
        bias: Tensor | None = None,
    ) -> None:
        dtype = accumulator_dtype(image.dtype)
        self.distillation = distillation
        self.bias = bias
        self.width = image.shape[1] if distillation is None else distillation.width
        self._operand_dtype = image.dtype if image.device.type == "cuda" else dtype
        half = self._operand_dtype != dtype
        per_logit = self._NUM_TILES * dtype.itemsize + (self._operand_dtype.itemsize if half else 0)
        self.rows, self.columns = tile_shape(len(image), num_columns, workspace_bytes // per_logit)
        self.gradient_scale = gradient_scale(self._operand_dtype)
        size = self.rows * self.columns
        self._tiles = torch.empty(self._NUM_TILES, size, device=image.device, dtype=dtype)
        self._half_tile = torch.empty(size, device=image.device, dtype=self._operand_dtype) if half else None

    def operand(self, features: Tensor) -> Tensor:
        """The features in the type that the products require."""
        return features.to(self._operand_dtype)

    def _views(self, rows: int, columns: int) -> tuple[Tensor, ...]:
        return self._tiles[:, : rows * columns].view(self._NUM_TILES, rows, columns).unbind(0)

    @staticmethod
    def _logits(image: Tensor, text: Tensor, scale: Tensor | float, out: Tensor) -> Tensor:
        if out.device.type == "cpu":  # reading the scale is free on a CPU and saves a pass over the tile
            return torch.addmm(out, image, text.t(), beta=0, alpha=float(scale), out=out)
        return multiply(image, text.t(), out).mul_(scale)

    def statistics(self, image_RD: Tensor, text_CD: Tensor, scale: Tensor, diagonal: int, rows: Any, cols: Any) -> None:
        S, P = self._views(len(image_RD), len(text_CD))
        self._logits(image_RD, text_CD, scale, S)
        row_max, col_max = S.amax(1), S.amax(0)
        torch.sub(S, row_max[:, None], out=P).exp_()
        rows.merge_(row_max, P.sum(1))
        S.sub_(col_max).exp_()
        cols.merge_(col_max, S.sum(0))

    def gradient(
        self, image_RD: Tensor, text_CD: Tensor, scale: Tensor, row_lse: Tensor, col_lse: Tensor, diagonal: int
    ) -> Tensor:
        S, G = self._views(len(image_RD), len(text_CD))
        self._logits(image_RD, text_CD, scale, S)
        return self._stored(_probabilities(S, row_lse, col_lse, out=G), diagonal)

    def _stored(self, G: Tensor, diagonal: int) -> Tensor:
        """G without the positive pairs, as :meth:`gradient` returns it."""
        _fill_pairs(G, diagonal, 0.0)
        if self._half_tile is None:
            return G
        rounded = self._half_tile[: G.numel()].view(G.shape)
        return rounded.copy_(G.mul_(self.gradient_scale))


class DistilledTorchTiles(TorchTiles):
    """The same with a teacher: its logits of a tile are beside the student's in the workspace."""

    kept = kept_of_columns = DistilledStatistics
    _NUM_TILES = 3

    def __init__(self, image: Tensor, num_columns: int, workspace_bytes: int, distillation: Distillation) -> None:
        super().__init__(image, num_columns, workspace_bytes, distillation=distillation)
        self._teacher = distillation

    def _both_logits(self, image: Tensor, text: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The student's and the teacher's logits, and a tile to compute in."""
        S, U, P = self._views(len(image), len(text))
        (image, teacher_image), (text, teacher_text) = map(self._teacher.parts, (image, text))
        self._logits(image, text, scale, S)
        self._logits(teacher_image, teacher_text, self._teacher.scale, U)
        return S, U, P

    def statistics(self, image_RD: Tensor, text_CD: Tensor, scale: Tensor, diagonal: int, rows: Any, cols: Any) -> None:
        S, U, P = self._both_logits(image_RD, text_CD, scale)
        student = []
        for dim in (1, 0):
            maximum = S.amax(dim, keepdim=True)
            student.append((maximum.squeeze(dim), torch.sub(S, maximum, out=P).exp_().sum(dim)))
        gap = torch.sub(U, S, out=S)
        for dim, kept, (student_max, student_sum) in zip((1, 0), (rows, cols), student, strict=True):
            maximum = U.amax(dim, keepdim=True)
            total = torch.sub(U, maximum, out=P).exp_().sum(dim)
            of_gap = P.mul_(gap).sum(dim)
            kept.merge_(*DistilledStatistics.pack(student_max, student_sum, maximum.squeeze(dim), total, of_gap))

    def gradient(
        self, image_RD: Tensor, text_CD: Tensor, scale: Tensor, row_lse: Tensor, col_lse: Tensor, diagonal: int
    ) -> Tensor:
        S, U, G = self._both_logits(image_RD, text_CD, scale)
        _probabilities(S, row_lse[:, 0], col_lse[:, 0], out=G)
        G.sub_(_probabilities(U, row_lse[:, 1], col_lse[:, 1], out=S), alpha=self._teacher.share)
        return self._stored(G, diagonal)


class SigmoidTorchTiles(TorchTiles):
    """The same for the sigmoid loss, where no logit depends on another."""

    kept = RowSums
    kept_of_columns = NoSums

    def __init__(self, image: Tensor, num_columns: int, workspace_bytes: int, bias: Tensor) -> None:
        super().__init__(image, num_columns, workspace_bytes, bias=bias)
        self._added = bias

    def statistics(self, image_RD: Tensor, text_CD: Tensor, scale: Tensor, diagonal: int, rows: Any, cols: Any) -> None:
        S, P = self._views(len(image_RD), len(text_CD))
        self._logits(image_RD, text_CD, scale, S).add_(self._added)
        _fill_pairs(S, diagonal, -math.inf)
        # softplus(S) = max(S, 0) + log(1 + exp(-|S|)), which is exact for logits of any size.
        softplus = torch.abs(S, out=P).neg_().exp_().log1p_().sum(1)
        softplus += torch.clamp(S, min=0, out=P).sum(1)
        rows.merge_(softplus, S.sigmoid_().sum(1))

    def gradient(
        self, image_RD: Tensor, text_CD: Tensor, scale: Tensor, row_lse: Tensor, col_lse: Tensor, diagonal: int
    ) -> Tensor:
        S, _ = self._views(len(image_RD), len(text_CD))
        G = self._logits(image_RD, text_CD, scale, S).add_(self._added).sigmoid_()
        return self._stored(G, diagonal)


def _fill_pairs(tile: Tensor, diagonal: int, value: float) -> None:
    """Set the entries of the positive pairs, that of row i in column i + diagonal, if the tile has any."""
    if -len(tile) < diagonal < tile.shape[1]:
        tile.diagonal(diagonal).fill_(value)


def _probabilities(logits: Tensor, row_lse: Tensor, col_lse: Tensor, *, out: Tensor) -> Tensor:
    """out = softmax over rows plus softmax over columns, which overwrites the logits."""
    torch.sub(logits, row_lse[:, None], out=out).exp_()
    return out.add_(logits.sub_(col_lse).exp_())
