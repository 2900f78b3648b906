"""The best matches of each query in a gallery, tile by tile: the similarity matrix is never whole in memory."""

import torch
from torch import Tensor

from mc2_hpc.errors import UserError

_LOW_32 = 0xFFFFFFFF


@torch.inference_mode()
def nearest(queries: Tensor, gallery: Tensor, k: int, *, tile: int = 2048) -> tuple[Tensor, Tensor]:
    """The ``k`` gallery rows with the largest inner product with each query.

    Ties: of equal float32 scores the lower gallery index comes first (a stable sort of the full matrix gives the same).

    Args:
        queries: float32 (Q, D).
        gallery: float32 (G, D), G < 2**32.
        k: at most G.
        tile: queries and gallery rows compared at a time; memory is about ``20 * tile**2`` bytes.

    Returns:
        scores float32 (Q, k) and gallery indices int64 (Q, k), best first.

    Raises:
        UserError: widths differ, ``k`` exceeds the gallery, or a score is NaN.
    """
    if queries.shape[1] != gallery.shape[1]:
        raise UserError(f"queries of width {queries.shape[1]} against a gallery of width {gallery.shape[1]}")
    if not 1 <= k <= len(gallery):
        raise UserError(f"k={k}: must lie between 1 and the size of the gallery, {len(gallery)}")
    rows = []
    for query_tile in queries.split(tile):
        best = torch.empty((len(query_tile), 0), dtype=torch.int64, device=queries.device)
        for start in range(0, len(gallery), tile):
            keys = _sort_keys(query_tile @ gallery[start : start + tile].T, start)
            best = torch.cat([best, keys.topk(min(k, keys.shape[1])).values], dim=1)
            best = best.topk(min(k, best.shape[1])).values
        rows.append(best)
    best = torch.cat(rows) if rows else torch.empty((0, k), dtype=torch.int64, device=queries.device)
    return _scores(best), _LOW_32 - (best & _LOW_32)


def _sort_keys(scores: Tensor, first: int) -> Tensor:
    """int64 keys that order as (score, then lower index first): topk of unequal keys has one answer on every device."""
    if bool(scores.isnan().any()):
        raise UserError("a similarity is NaN: the features are not finite")
    bits = (scores.float() + 0.0).view(torch.int32)  # + 0.0: -0.0 and 0.0 are equal scores
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # IEEE 754: negative numbers order backwards
    index = torch.arange(first, first + scores.shape[1], device=scores.device)
    return (ordered.long() << 32) | (_LOW_32 - index)


def _scores(keys: Tensor) -> Tensor:
    ordered = (keys >> 32).int()
    return torch.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered).view(torch.float32)
