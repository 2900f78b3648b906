"""Alignment, uniformity and modality gap of paired features (n, D) of unit length."""

import torch
from torch import Tensor

from mc2_hpc.errors import UserError


def alignment(image: Tensor, text: Tensor, *, alpha: float = 2.0) -> float:
    """Mean distance of pairs to the power ``alpha``: E ||f(x) - f(y)||^alpha (Wang & Isola 2020, arXiv 2005.10242)."""
    _check(image, text)
    return (image - text).norm(dim=1).pow(alpha).double().mean().item()


def uniformity(features: Tensor, *, t: float = 2.0, tile: int = 2048) -> float:
    """log E exp(-t ||f(x) - f(y)||^2) over pairs of different rows (Wang & Isola 2020); lower is more uniform.

    Raises:
        UserError: fewer than two rows.
    """
    count = len(features)
    if count < 2:
        raise UserError(f"uniformity needs at least two features, not {count}")
    total = torch.zeros((), dtype=torch.float64)
    for rows in features.double().split(tile):
        for columns in features.double().split(tile):
            squared = rows.square().sum(1)[:, None] + columns.square().sum(1) - 2 * rows @ columns.T
            total += squared.mul_(-t).exp_().sum()
    # Every row was compared with itself once, at distance 0.
    return torch.log((total - count) / (count * (count - 1))).item()


def modality_gap(image: Tensor, text: Tensor) -> float:
    """Distance between the two means (Liang et al. 2022, arXiv 2203.02053)."""
    _check(image, text)
    return (image.double().mean(0) - text.double().mean(0)).norm().item()


def _check(image: Tensor, text: Tensor) -> None:
    if image.shape != text.shape or len(image) == 0:
        raise UserError(f"paired features need the same shape, not {tuple(image.shape)} and {tuple(text.shape)}")
