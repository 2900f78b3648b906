"""A token embedding that holds only the rows of the table that the current batch uses.

Shape suffixes: U unique token ids of the batch, W width.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BatchEmbedding(nn.Module):
    """In place of ``nn.Embedding`` where the table itself is elsewhere. It has no parameters."""

    def __init__(self, places: Callable[[Tensor], Tensor]) -> None:
        """
        Args:
            places: maps token ids to the numbers that rows are sorted by, elementwise and one to one.
        """
        super().__init__()
        self._places = places
        self._places_U: Tensor | None = None
        self._rows_UW: Tensor | None = None

    def set_rows(self, places_U: Tensor, rows_UW: Tensor) -> None:
        """Set the rows of the next batches; ``places_U`` must be sorted and have the place of each of their ids."""
        self._places_U, self._rows_UW = places_U, rows_UW

    def clear(self) -> None:
        """Forget the rows, so that a batch without new ones fails."""
        self._places_U = self._rows_UW = None

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids of any shape to their rows (..., W).

        Raises:
            ValueError: no row was set for some id. Only checked on the CPU; a GPU would have to be waited for.
        """
        assert self._places_U is not None and self._rows_UW is not None, "set_rows was not called"
        places = self._places(ids)
        found = torch.searchsorted(self._places_U, places)
        if ids.device.type == "cpu" and not self._places_U[found.clamp(max=len(self._places_U) - 1)].equal(places):
            raise ValueError("the batch has token ids whose rows were not fetched")
        # The backward pass adds up the gradients of a row in the order of its ids, as nn.Embedding's does.
        return F.embedding(found, self._rows_UW)
