"""AdamW for a table whose gradient is zero in all rows but a few, without ever storing that gradient.

The result is bit for bit that of ``torch.optim.AdamW(fused=True)`` with the dense gradient: weight decay and the decay
of moments apply to every row in every step. AdamW is elementwise, so rows can be updated in any grouping:

- Rows with a gradient are gathered, updated and written back.
- The others have the gradient 0, taken from one small buffer that stays in cache while the table streams through.
- In a block of rows that never had a gradient both moments are 0, and AdamW's update is exactly ``p (1 - lr wd)``:
  one multiplication, and the moments are neither read nor written.

Shape suffixes: K rows, W width, T rows with a gradient in this step.
"""

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from mc2_hpc.config import OptimConfig

_BLOCK_BYTES = {"cpu": 1 << 20, "cuda": 1 << 26}
"""Size of the blocks: on CPUs the buffer of zeros stays in the cache; on GPUs there are few launches."""


class RowAdamW:
    """A table's rows with their AdamW state.

    Bitwise equality needs a width that is a multiple of 16: other widths leave the last elements of a piece to torch's
    scalar loop, which may round differently from its vector loop.
    """

    def __init__(self, weight_KW: Tensor, config: OptimConfig, *, weight_decay: float) -> None:
        """Take ownership of ``weight_KW`` (fp32, contiguous), and allocate its moments."""
        self.state = {
            "weight": weight_KW,
            "exp_avg": torch.zeros_like(weight_KW),
            "exp_avg_sq": torch.zeros_like(weight_KW),
        }
        """The tensors to save, each (K, W)."""
        self._num_steps = 0
        self._config, self._weight_decay = config, weight_decay
        num_rows, width = weight_KW.shape
        self._rows_per_block = max(1, _BLOCK_BYTES[weight_KW.device.type] // (4 * width))
        self._blocks = [tensor.split(self._rows_per_block) for tensor in self.state.values()]
        self._zeros = torch.zeros(min(num_rows, self._rows_per_block), width, device=weight_KW.device)
        self._set_moved(torch.zeros(len(self._blocks[0]), dtype=torch.bool))

    def resume(self, num_steps: int) -> None:
        """Continue after ``num_steps`` steps, whose moments have been copied into :attr:`state`."""
        self._num_steps = num_steps
        pairs = zip(*self._blocks[1:], strict=True)
        self._set_moved(torch.tensor([bool(m.count_nonzero() or v.count_nonzero()) for m, v in pairs]))

    def _set_moved(self, moved: Tensor) -> None:
        """Note which blocks have moments that may not be 0, (blocks,) bool on the host."""
        if self._config.eps == 0:
            moved = torch.ones_like(moved)  # AdamW then divides 0 by 0 in rows without a gradient
        self._moved = moved
        self._full = [[blocks[i] for i in moved.nonzero().flatten().tolist()] for blocks in self._blocks]
        edge = torch.zeros(1, dtype=torch.int32)  # no moments before the first block, nor after the last
        edges = torch.diff(moved.logical_not().int(), prepend=edge, append=edge).nonzero().flatten()
        self._decay_only = [
            self.state["weight"][first * self._rows_per_block : last * self._rows_per_block]
            for first, last in edges.view(-1, 2).tolist()
        ]

    @torch.no_grad()
    def step(self, rows_T: Tensor, rows_on_host_T: Tensor, grads_TW: Tensor, lr: float) -> None:
        """Update all rows: ``grads_TW`` is the gradient of the different rows ``rows_T``, all others have none."""
        self._num_steps += 1
        touched = [tensor[rows_T] for tensor in self.state.values()]
        self._adamw(self._full, [self._zeros[: len(block)] for block in self._full[0]], lr)
        for rows in self._decay_only:
            rows.mul_(1 - lr * self._weight_decay)
        self._adamw([[tensor] for tensor in touched], [grads_TW], lr)
        for tensor, updated in zip(self.state.values(), touched, strict=True):
            tensor.index_copy_(0, rows_T, updated)
        found = torch.zeros_like(self._moved)
        found[rows_on_host_T // self._rows_per_block] = True
        if (found & ~self._moved).any():
            self._set_moved(found | self._moved)

    def _adamw(self, tensors: list[list[Tensor]], grads: list[Tensor], lr: float) -> None:
        """Torch's AdamW on ``[weights, exp_avgs, exp_avg_sqs]``."""
        # The counts of the steps before this one: adamw adds 1.
        steps = torch.full((len(grads),), self._num_steps - 1.0, device=self._zeros.device)
        weights, exp_avgs, exp_avg_sqs = tensors
        adamw(
            weights,
            grads,
            exp_avgs,
            exp_avg_sqs,
            [],
            list(steps.unbind()),
            fused=True,
            amsgrad=False,
            beta1=self._config.beta1,
            beta2=self._config.beta2,
            lr=lr,
            weight_decay=self._weight_decay,
            eps=self._config.eps,
            maximize=False,
        )
