"""The best matches of each query in a gallery, tile by tile, so the full similarity matrix is never in memory.

Ties: of equal float32 scores, the lower index comes first, as in a stable sort of the full matrix.
"""

import torch
from torch import Tensor

from mc2_hpc.errors import UserError

Nearest = tuple[Tensor, Tensor]
"""Scores float32 (Q, k) and gallery indices int64 (Q, k) for Q queries, best first."""


@torch.inference_mode()
def nearest(queries: Tensor, gallery: Tensor, k: int, *, tile: int = 2048) -> Nearest:
    """The ``k`` gallery rows with the largest inner product with each query.

    Args:
        queries: float32 (Q, D).
        gallery: float32 (G, D).
        k: at most G.
        tile: queries and gallery rows compared at a time; memory is about ``4 * tile**2`` bytes.

    Raises:
        UserError: widths differ, ``k`` exceeds the gallery, or a score is NaN.
    """
    _check(queries, gallery, k)
    best = _Best(len(queries), k, tile, queries.device)
    for row, query_tile in enumerate(queries.split(tile)):
        for start in range(0, len(gallery), tile):
            best.see(row, query_tile @ gallery[start : start + tile].T, start)
    return best.found()


@torch.inference_mode()
def nearest_both_ways(left: Tensor, right: Tensor, k: int, *, tile: int = 2048) -> tuple[Nearest, Nearest]:
    """``nearest(left, right, k)`` and ``nearest(right, left, k)``, computing the product of each pair of tiles once.

    A ``k`` beyond the size of a gallery returns all of it.
    """
    _check(left, right, min(k, len(right)))
    _check(right, left, min(k, len(left)))
    of_left = _Best(len(left), min(k, len(right)), tile, left.device)
    of_right = _Best(len(right), min(k, len(left)), tile, left.device)
    for row, left_tile in enumerate(left.split(tile)):
        for column, right_tile in enumerate(right.split(tile)):
            scores = left_tile @ right_tile.T
            of_left.see(row, scores, column * tile)
            of_right.see(column, scores.T, row * tile)
    return of_left.found(), of_right.found()


def _check(queries: Tensor, gallery: Tensor, k: int) -> None:
    if queries.shape[1] != gallery.shape[1]:
        raise UserError(f"queries of width {queries.shape[1]} against a gallery of width {gallery.shape[1]}")
    if not 1 <= k <= len(gallery):
        raise UserError(f"k={k}: must be between 1 and the size of the gallery, {len(gallery)}")


class _Best:
    """The best ``k`` of every query so far, as the gallery's tiles arrive in order."""

    def __init__(self, queries: int, k: int, tile: int, device: torch.device) -> None:
        self._k = k
        sizes = [min(tile, queries - start) for start in range(0, max(queries, 1), tile)]
        self._scores = [torch.empty((size, 0), device=device) for size in sizes]
        self._indices = [torch.empty((size, 0), dtype=torch.int64, device=device) for size in sizes]

    def see(self, row: int, scores: Tensor, start: int) -> None:
        """Merge the scores of the queries' tile number ``row`` with a gallery tile that begins at ``start``."""
        values, indices = first_k(scores.float(), self._k)
        # Earlier tiles have lower indices and come first, so a stable sort keeps them first among ties.
        merged, order = torch.cat([self._scores[row], values], dim=1).sort(dim=1, descending=True, stable=True)
        indices = torch.cat([self._indices[row], indices + start], dim=1).gather(1, order)
        self._scores[row], self._indices[row] = merged[:, : self._k], indices[:, : self._k]

    def found(self) -> Nearest:
        """Raises UserError if a score was NaN."""
        scores, indices = torch.cat(self._scores), torch.cat(self._indices)
        if bool(scores.isnan().any()):  # NaN sorts first, so it is always among the best
            raise UserError("a similarity is NaN: the features are not finite")
        return scores, indices


def first_k(scores: Tensor, k: int) -> Nearest:
    """The first ``min(k, columns)`` of a stable descending sort of each row."""
    columns = scores.shape[1]
    values, indices = scores.topk(min(k + 1, columns), dim=1)
    # Which of several tied scores topk picks, and in what order, depends on the device. Sorting fixes the order of the
    # k; a row with ties on both sides of the k-th place is sorted in full.
    torn = (values[:, k - 1] == values[:, k]).nonzero()[:, 0] if columns > k else indices.new_empty(0)
    indices = indices[:, :k].sort(dim=1).values
    values, order = scores.gather(1, indices).sort(dim=1, descending=True, stable=True)
    indices = indices.gather(1, order)
    if len(torn):
        whole = scores[torn].sort(dim=1, descending=True, stable=True)
        values[torn], indices[torn] = whole.values[:, :k], whole.indices[:, :k]
    return values, indices
