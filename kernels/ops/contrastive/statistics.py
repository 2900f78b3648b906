"""Running log-sum-exp: a maximum and a sum of exponentials relative to it, merged tile by tile."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Statistics:
    """The running log-sum-exp of n series, kept as ``log(total) + maximum``.

    The maximum follows the data, so no logit is too large or too small to be represented; NaN propagates.
    """

    maximum: Tensor
    """(n,) largest logit so far; -inf before the first."""
    total: Tensor
    """(n,) sum of exp(logit - maximum)."""

    @classmethod
    def empty(cls, size: int, *, device: torch.device, dtype: torch.dtype) -> "Statistics":
        return cls(
            torch.full((size,), float("-inf"), device=device, dtype=dtype),
            torch.zeros(size, device=device, dtype=dtype),
        )

    def __getitem__(self, part: slice) -> "Statistics":
        """A view of some of the series: merging into it changes this object too."""
        return Statistics(self.maximum[part], self.total[part])

    def merge_(self, maximum: Tensor, total: Tensor) -> None:
        """Merge further logits of the same series, given by their own maximum and sum, both (n,)."""
        merged = torch.maximum(self.maximum, maximum)
        # An empty series has maximum=-inf, total=0 and adds exp(-inf) * 0 = 0.
        self.total.mul_(torch.exp(self.maximum - merged)).add_(total * torch.exp(maximum - merged))
        self.maximum.copy_(merged)

    def logsumexp(self) -> Tensor:
        """(n,) log-sum-exp of everything merged so far."""
        return self.maximum + torch.log(self.total)
