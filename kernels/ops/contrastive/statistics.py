"""What forward keeps of every row and column of logits, merged tile by tile."""

from dataclasses import dataclass
from typing import ClassVar, Protocol, Self

import torch
import torch.distributed as dist
from torch import Tensor

from .shared_batch import SharedBatch


class Kept(Protocol):
    """What the exchanges need of the statistics of n series of logits."""

    @classmethod
    def empty(cls, size: int, *, device: torch.device, dtype: torch.dtype) -> Self:
        """Those of ``size`` series without a logit."""

    def __getitem__(self, part: slice) -> Self:
        """A view of some of the series: merging into it changes this object too."""

    def packed(self) -> Tensor:
        """(n, ...) one tensor that holds everything, to be sent."""

    def merge_packed_(self, packed: Tensor) -> None:
        """Merge further logits of the same series."""

    @classmethod
    def unpacked(cls, packed: Tensor) -> Self:
        """The inverse of :meth:`packed`: views of the tensor."""

    def over_ranks(self, shared: SharedBatch) -> Self:
        """Those of the logits of all ranks, each of which has the same series. Collective."""


def finite(loss: Tensor) -> Tensor:
    """The loss, with NaN in place of infinities: what overflows is no number of any size."""
    return torch.where(torch.isfinite(loss), loss, torch.nan)


@dataclass(frozen=True)
class Statistics:
    """The running log-sum-exp of n series, kept as ``log(total) + maximum``.

    The maximum follows the data, so no logit is too large or too small to be represented; NaN propagates.
    """

    SUMS: ClassVar[tuple[int, ...]] = ()
    """Shape of what is kept of one series."""

    maximum: Tensor
    """(n, *SUMS) largest logit so far; -inf before the first."""
    total: Tensor
    """(n, *SUMS) sum of exp(logit - maximum)."""

    @classmethod
    def empty(cls, size: int, *, device: torch.device, dtype: torch.dtype) -> Self:
        shape = (size, *cls.SUMS)
        return cls(
            torch.full(shape, float("-inf"), device=device, dtype=dtype),
            torch.zeros(shape, device=device, dtype=dtype),
        )

    def __getitem__(self, part: slice) -> Self:
        """A view of some of the series: merging into it changes this object too."""
        return type(self)(self.maximum[part], self.total[part])

    def merge_(self, maximum: Tensor, total: Tensor) -> None:
        """Merge further logits of the same series, given by their own maximum and sum, both (n, *SUMS)."""
        merged = torch.maximum(self.maximum, maximum)
        # An empty series has maximum=-inf, total=0 and adds exp(-inf) * 0 = 0.
        self.total.mul_(torch.exp(self.maximum - merged)).add_(total * torch.exp(maximum - merged))
        self.maximum.copy_(merged)

    def packed(self) -> Tensor:
        """(n, 2, *SUMS)."""
        return torch.stack((self.maximum, self.total), dim=1)

    def merge_packed_(self, packed: Tensor) -> None:
        """Merge what another's :meth:`packed` returned."""
        self.merge_(*packed.unbind(1))

    @classmethod
    def unpacked(cls, packed: Tensor) -> Self:
        """Views of a tensor that :meth:`packed` returned."""
        return cls(*packed.unbind(1))

    def over_ranks(self, shared: SharedBatch) -> Self:
        """Statistics of whole series, on every rank, from those of each rank's logits. Collective."""
        maximum = shared.reduce_(self.maximum.clone(), dist.ReduceOp.MAX)
        # A library's maximum may lose NaN, its sum does not, and the total of a series with NaN or infinity is NaN.
        total = shared.reduce_(self.total * torch.exp(self.maximum - maximum), dist.ReduceOp.SUM)
        return type(self)(maximum, total)

    def logsumexp(self) -> Tensor:
        """(n,) log-sum-exp of everything merged so far."""
        return self.maximum + torch.log(self.total)


@dataclass(frozen=True)
class DistilledStatistics(Statistics):
    """What a divergence of n series of student logits S from teacher logits U needs, in one pass.

    The three sums of a series are those of exp(S), of exp(U), and of exp(U) (U - S). The last is kept relative to the
    maximum of U, like the second, and so it is merged in the same way: sums of both signs rescale alike.
    """

    SUMS: ClassVar[tuple[int, ...]] = (3,)

    @staticmethod
    def pack(
        student_maximum: Tensor, student: Tensor, teacher_maximum: Tensor, teacher: Tensor, gap: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(n, 3) maximum and sums for :meth:`merge_` from five (n,): the maximum and sum of exponentials of S, those of
        U, and the sum of exp(U - maximum of U) (U - S)."""
        maximum = torch.stack((student_maximum, teacher_maximum, teacher_maximum), dim=1)
        return maximum, torch.stack((student, teacher, gap), dim=1)

    def logsumexp(self) -> Tensor:
        """(n, 2) log-sum-exp of the student's and of the teacher's logits."""
        return self.maximum[:, :2] + torch.log(self.total[:, :2])

    def divergence(self) -> Tensor:
        """(n,) KL(softmax U || softmax S): the teacher's mean of U - S, plus the difference of the log-sum-exp."""
        student, teacher = self.logsumexp().unbind(1)
        return self.total[:, 2] / self.total[:, 1] + (student - teacher)


@dataclass(frozen=True)
class RowSums:
    """Sums over rows of logits that need no maximum: those of softplus and of the sigmoid, without positive pairs."""

    SUMS: ClassVar[int] = 2
    """How many are kept of one series."""

    total: Tensor
    """(n, SUMS)."""

    @classmethod
    def empty(cls, size: int, *, device: torch.device, dtype: torch.dtype) -> Self:
        return cls(torch.zeros(size, cls.SUMS, device=device, dtype=dtype))

    def __getitem__(self, part: slice) -> Self:
        """A view of some of the rows: merging into it changes this object too."""
        return type(self)(self.total[part])

    def merge_(self, softplus: Tensor, sigmoid: Tensor) -> None:
        """Add the sums, both (n,), over further logits of the same rows."""
        self.total.add_(torch.stack((softplus, sigmoid), dim=1))

    def packed(self) -> Tensor:
        """(n, SUMS)."""
        return self.total

    def merge_packed_(self, packed: Tensor) -> None:
        """Add what another's :meth:`packed` returned."""
        self.total.add_(packed)

    @classmethod
    def unpacked(cls, packed: Tensor) -> Self:
        """A view of a tensor that :meth:`packed` returned."""
        return cls(packed)

    def over_ranks(self, shared: SharedBatch) -> Self:
        """The sums over all ranks' logits; if nothing is kept, nothing is sent. Collective."""
        return type(self)(shared.reduce_(self.total.clone(), dist.ReduceOp.SUM)) if self.total.numel() else self


class NoSums(RowSums):
    """What the sigmoid loss keeps of columns: nothing, since no logit of a column depends on another."""

    SUMS = 0
