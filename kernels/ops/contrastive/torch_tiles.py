"""The ``tiled`` backend: tiles of logits in PyTorch, on any device."""

import math

import torch
from torch import Tensor

from .products import accumulator_dtype, multiply
from .statistics import Statistics

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
    """Tile arithmetic in PyTorch. The workspace holds two tiles in the accumulator's type and, for half-precision
    operands, a third tile in theirs. Operands stay in half precision only on a GPU (see ``products``)."""

    def __init__(self, image: Tensor, num_columns: int, workspace_bytes: int) -> None:
        dtype = accumulator_dtype(image.dtype)
        self._operand_dtype = image.dtype if image.device.type == "cuda" else dtype
        half = self._operand_dtype != dtype
        per_logit = 2 * dtype.itemsize + (self._operand_dtype.itemsize if half else 0)
        self.rows, self.columns = tile_shape(len(image), num_columns, workspace_bytes // per_logit)
        self.gradient_scale = gradient_scale(self._operand_dtype)
        size = self.rows * self.columns
        self._tiles = torch.empty(2, size, device=image.device, dtype=dtype)
        self._half_tile = torch.empty(size, device=image.device, dtype=self._operand_dtype) if half else None

    def operand(self, features: Tensor) -> Tensor:
        """The features in the type that the products require."""
        return features.to(self._operand_dtype)

    def _views(self, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        first, second = self._tiles[:, : rows * columns].view(2, rows, columns)
        return first, second

    @staticmethod
    def _logits(image: Tensor, text: Tensor, scale: Tensor, out: Tensor) -> Tensor:
        if out.device.type == "cpu":  # reading the scale is free on a CPU and saves a pass over the tile
            return torch.addmm(out, image, text.t(), beta=0, alpha=float(scale), out=out)
        return multiply(image, text.t(), out).mul_(scale)

    def statistics(self, image_RD: Tensor, text_CD: Tensor, scale: Tensor, rows: Statistics, cols: Statistics) -> None:
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
        torch.sub(S, row_lse[:, None], out=G).exp_()
        G.add_(S.sub_(col_lse).exp_())
        if -len(image_RD) < diagonal < len(text_CD):
            G.diagonal(diagonal).zero_()
        if self._half_tile is None:
            return G
        rounded = self._half_tile[: G.numel()].view(G.shape)
        return rounded.copy_(G.mul_(self.gradient_scale))
