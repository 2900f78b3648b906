"""The part of a run's configuration that says which weights are trained, and how (``mc2_hpc.config`` has the rest)."""

import re
from dataclasses import dataclass, field

from mc2_hpc.errors import UserError
from mc2_hpc.reading.checks import at_least, choose

NOTHING_FROZEN = -1


@dataclass(frozen=True, kw_only=True)
class FreezeConfig:
    """Weights that stay as they start: they have no gradient, no optimizer state, and nothing to reduce over ranks."""

    vision: str | None = None
    """``all`` of the image tower, or the number of its first blocks, with everything before them; ``0`` is the
    embeddings of patches, class and positions alone. Null trains the whole tower."""
    text: str | None = None
    """Likewise for the text tower; ``0`` is the embeddings of tokens and positions alone."""
    logit_scale: bool = False

    def __post_init__(self) -> None:
        for tower in ("vision", "text"):
            value = getattr(self, tower)
            if value is not None and value != "all" and not re.fullmatch(r"0|[1-9][0-9]{0,5}", value):
                raise UserError(f"freeze.{tower}={value}: write all, a number of blocks, or null")
        if (self.vision, self.text) == ("all", "all"):
            raise UserError("freeze.vision=all and freeze.text=all: leaves no tower to train; unfreeze one of them")

    def depth(self, tower: str, layers: int) -> int:
        """The greatest frozen depth (:mod:`mc2_hpc.models.depth`) of ``vision`` or ``text``, a tower of ``layers``
        blocks; :data:`NOTHING_FROZEN` if there is none.

        Raises:
            UserError: the tower has fewer blocks.
        """
        value = getattr(self, tower)
        if value is None:
            return NOTHING_FROZEN
        if value == "all":
            return layers + 1
        if int(value) > layers:
            raise UserError(f"freeze.{tower}={value}: the tower has only {layers} blocks; write all to freeze it whole")
        return int(value)


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters (``mc2_hpc.models.lora``) on attention and MLP of every block. The other weights of an adapted
    tower stay as they start."""

    rank: int = 16
    alpha: float = 16.0
    """The product of the adapters counts ``alpha / rank`` times."""
    vision: bool = True
    """Adapt the image tower; false trains it whole, or as ``freeze.vision`` says."""
    text: bool = True
    """Likewise for the text tower."""

    def __post_init__(self) -> None:
        at_least("lora.rank", self.rank, 1)
        if self.alpha <= 0:
            raise UserError(f"lora.alpha={self.alpha}: must be positive")
        if not (self.vision or self.text):
            raise UserError(
                "lora.vision=false and lora.text=false: leaves no tower to adapt; leave out the section lora"
            )


@dataclass(frozen=True, kw_only=True)
class TowerOptimConfig:
    """One tower's learning rates, relative to ``optim.lr``."""

    lr_scale: float = 1.0
    layer_decay: float = 1.0
    """Factor per layer, counted from the output: the projection has none, the last block has it once, the embeddings
    have it as often as there are blocks, and once more."""

    def factor(self, depth: int, layers: int) -> float:
        """That of a parameter at a depth (:mod:`mc2_hpc.models.depth`) of a tower of ``layers`` blocks."""
        return self.lr_scale * self.layer_decay ** (layers + 1 - depth)


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW with the recipe's groups, or Muon for matrices, and the schedule of the learning rate."""

    matrices: str = "adamw"
    """What updates the matrices of the blocks: ``adamw``, like everything else (the recipe), or ``muon``."""
    muon_momentum: float = 0.95
    backend: str = "torch"
    """What updates the towers' weights: ``torch`` (its fused AdamW), ``deepspeed`` or ``apex`` (their ``FusedAdam``, on
    a GPU). A sharded token table and the scalars have their own updates."""
    lr: float = 4e-4
    """Of Muon as well, whose updates are scaled to the size of AdamW's."""
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-6
    weight_decay: float = 0.1
    """Applied to matrices only, not to gains, biases, logit_scale or logit_bias."""
    warmup: int = 2000
    """Steps of linear warm-up."""
    schedule: str = "cosine"
    """After the warm-up: ``cosine`` (to 0, the recipe), ``constant``, or ``wsd`` (constant, then linear to 0)."""
    decay_steps: int = 0
    """``wsd``: the last steps of the run, in which the learning rate falls."""
    vision: TowerOptimConfig = field(default_factory=TowerOptimConfig)
    text: TowerOptimConfig = field(default_factory=TowerOptimConfig)
    max_logit_scale: float = 100.0
    """Upper limit of the temperature's multiplier after every step, at most 100 (the recipe); the lower limit is 1."""
    ema_decay: float = 0.0
    """Keeps an fp32 moving average of the weights, ``ema = ema_decay ema + (1 - ema_decay) weights`` after every step,
    such as 0.9999; it starts as the initial weights. 0 keeps none."""
    grad_clip: float = 0.0
    """Largest global gradient norm; 0 does not clip (the recipe)."""

    def __post_init__(self) -> None:
        for name in ("lr", "eps", "weight_decay", "warmup", "decay_steps", "grad_clip"):
            at_least(f"optim.{name}", getattr(self, name), 0)
        if not 1 <= self.max_logit_scale <= 100:
            raise UserError(f"optim.max_logit_scale={self.max_logit_scale}: must be in [1, 100]")
        choose("optim.matrices", self.matrices, ("adamw", "muon"))
        choose("optim.backend", self.backend, ("torch", "deepspeed", "apex"))
        choose("optim.schedule", self.schedule, ("cosine", "constant", "wsd"))
        if (self.schedule == "wsd") != (self.decay_steps > 0):
            raise UserError(
                f"optim.decay_steps={self.decay_steps} with optim.schedule={self.schedule}: "
                f"set a number of steps for wsd, and 0 for the others"
            )
        for name in ("beta1", "beta2", "ema_decay", "muon_momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"optim.{name}={getattr(self, name)}: must be in [0, 1)")
        for tower in ("vision", "text"):
            for name in ("lr_scale", "layer_decay"):
                if (value := getattr(getattr(self, tower), name)) <= 0:
                    raise UserError(
                        f"optim.{tower}.{name}={value}: must be above 0; to train nothing, set freeze.{tower}"
                    )
