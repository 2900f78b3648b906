"""The text tower's token table, dealt to the ranks: look-up, gradient, update and state outside DeepSpeed.

Half of a worldwide model's parameters are this table, and a batch uses a thousandth of its rows. DeepSpeed would fill,
reduce and gather all of it in every step. Here each rank owns ``1 / world_size`` of the rows with their AdamW state
(:mod:`mc2_hpc.training.row_adamw`), and a step moves only the rows that its batch uses
(:mod:`mc2_hpc.training.row_exchange`). The update is that of the dense table.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from mc2_hpc.config import OptimConfig
from mc2_hpc.distributed import Ranks
from mc2_hpc.models.clip import CLIP
from mc2_hpc.models.embedding import BatchEmbedding
from mc2_hpc.training.clipping import clip_coefficient
from mc2_hpc.training.optim import decays, lr_factor
from mc2_hpc.training.row_adamw import RowAdamW
from mc2_hpc.training.row_exchange import Plan, RowExchange
from mc2_hpc.training.tower_state import EMA

TABLE = "text.token_embedding.weight"
"""The table's name in a model's state."""


class TokenTable:
    """Owns this rank's rows. A step is :meth:`look_up`, any number of backward passes, :meth:`reduce`, :meth:`step`."""

    def __init__(self, clip: CLIP, config: OptimConfig, ranks: Ranks) -> None:
        """Take the table out of ``clip``, whose weights are equal on all ranks, and put a look-up in its place."""
        text = clip.text
        self.trained = text.token_embedding.weight.requires_grad
        """Whether the rows are; a frozen table is looked up, and has neither gradients nor moments."""
        table = text.token_embedding.weight.detach()
        self.shape = table.shape
        self._text = text
        self._max_norm = config.grad_clip
        self._lr_factor = lr_factor(TABLE, clip.arch, config)
        self._exchange = RowExchange(len(table), ranks)
        decay = config.weight_decay if decays(TABLE, table) else 0.0
        own_KW = self._exchange.own_part(table)
        self._state = {"weight": own_KW}
        self._rows: RowAdamW | None = None
        if self.trained:
            self._rows = RowAdamW(own_KW, config, weight_decay=decay)
            self._state = dict(self._rows.state)
            if config.ema_decay:
                self._state[EMA] = own_KW.clone()
        self._embedding = BatchEmbedding(self._exchange.layout.places)
        text.register_module("token_embedding", self._embedding)
        self._plan: Plan | None = None
        self._used_UW: Tensor | None = None
        self._grads_TW: Tensor | None = None

    def look_up(self, tokens: Tensor) -> None:
        """Fetch the rows of this rank's token ids, a host tensor of any shape, for the whole step. Collective."""
        self._plan = self._exchange.plan(tokens)
        self._used_UW = self._exchange.fetch(self._plan, self._state["weight"]).requires_grad_(self.trained)
        self._embedding.set_rows(self._plan.places_U, self._used_UW)

    def reduce(self) -> None:
        """Average the gradients of the fetched rows over ranks, each on the rank that owns the row. Collective."""
        assert self._plan is not None and self._used_UW is not None and self._used_UW.grad is not None
        self._grads_TW = self._exchange.mean_gradients(self._plan, self._used_UW.grad)

    def gradient(self) -> Tensor:
        """The averaged gradient of this rank's rows, without those where it is 0: (T, W)."""
        assert self._grads_TW is not None
        return self._grads_TW

    def step(self, lr: float, norm: Tensor) -> None:
        """Clip by the global gradient norm, and update this rank's rows with the run's learning rate ``lr``."""
        assert self._plan is not None and self._rows is not None
        grads_TW = self.gradient()
        if self._max_norm > 0:
            grads_TW = grads_TW * clip_coefficient(norm, self._max_norm)
        self._rows.step(self._plan.touched_T, self._plan.touched_on_host_T, grads_TW, lr * self._lr_factor)
        self.drop()

    def average(self, decay: float) -> None:
        """Move the average of this rank's rows on by a step."""
        self._state[EMA].lerp_(self._state["weight"], 1 - decay)

    def drop(self) -> None:
        """Forget the step's rows and gradients without an update."""
        self._plan = self._used_UW = self._grads_TW = None
        self._embedding.clear()

    def full(self, kind: str, to: int | None = None) -> Tensor:
        """The whole table, one of its moments or its average, (V, W), on rank ``to`` or on all; without rows on the
        others.

        Collective. On one rank it is not a copy.
        """
        return self._exchange.gather(self._state[kind], to)

    def load(self, kind: str, full_VW: Tensor) -> None:
        """Set this rank's rows of a moment or the average; :meth:`resume` must follow."""
        self._state[kind].copy_(self._exchange.own_part(full_VW))

    def resume(self, num_steps: int) -> None:
        """Continue after ``num_steps`` steps."""
        assert self._rows is not None
        self._rows.resume(num_steps)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Give the text tower the whole table on every rank, for reading only, while the context lasts. Collective."""
        # Not frozen: evaluation takes gradients of all parameters.
        whole = nn.Embedding.from_pretrained(self.full("weight"), freeze=False)
        self._text.register_module("token_embedding", whole)
        try:
            yield
        finally:
            self._text.register_module("token_embedding", self._embedding)
