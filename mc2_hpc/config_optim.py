"""The part of a run's configuration that says which weights are trained, and how (``mc2_hpc.config`` has the rest)."""

import re
from dataclasses import dataclass

from mc2_hpc.errors import UserError
from mc2_hpc.reading.checks import at_least

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
class OptimConfig:
    """AdamW with the recipe's groups, linear warm-up, then cosine decay to 0."""

    lr: float = 4e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-6
    weight_decay: float = 0.1
    """Applied to matrices only, not to gains, biases or logit_scale."""
    warmup: int = 2000
    """Steps of linear warm-up."""
    grad_clip: float = 0.0
    """Largest global gradient norm; 0 does not clip (the recipe)."""

    def __post_init__(self) -> None:
        for name in ("lr", "eps", "weight_decay", "warmup", "grad_clip"):
            at_least(f"optim.{name}", getattr(self, name), 0)
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"optim.{name}={getattr(self, name)}: must be in [0, 1)")
