"""What a traced step is made of: allocations over time, kernels by phase and class, and collectives.

Plain data without torch, so that a trace crosses from the process that made it and can be kept as JSON.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

CATEGORIES = (
    "parameters",
    "optimizer state",
    "gradients",
    "activations",
    "loss workspace",
    "communication buffers",
    "temporary",
    "teacher",
)
"""Of memory. ``optimizer state`` includes ZeRO's fp32 master copies; ``temporary`` is what is freed within the phase
that allocated it, outside the loss and the teacher. ``teacher`` is its weights, and all that its forward pass needs."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """Kernels of one class in one phase."""

    flops: float = 0
    """As PyTorch's ``FlopCounterMode`` counts them: two per multiply-add."""
    bytes: float = 0
    """Inputs and outputs of every operator, each read or written once."""
    launches: float = 0


@dataclass(frozen=True, kw_only=True)
class Collective:
    """The messages of one kind in one phase."""

    kind: str
    """``all-reduce``, ``all-gather``, ``reduce-scatter``, ``all-to-all``, ``broadcast``, ``send``."""
    phase: str
    group: str = "all"
    """Whose message it is: ``all`` ranks', the ranks' of a ``node``, or those ``between`` nodes, one of each."""
    host: bool
    """Whether it runs between hosts (gloo) although the step runs on GPUs."""
    calls: int
    bytes: int
    """Sizes of whole buffers: what is gathered in all, reduced, or scattered; for the others what this rank sends."""


@dataclass(frozen=True, kw_only=True)
class Moment:
    """Memory after one operator, in bytes."""

    operator: int
    """Operators since the step began."""
    phase: str
    by_category: Mapping[str, int]

    @property
    def bytes(self) -> int:
        return sum(self.by_category.values())


@dataclass(frozen=True, kw_only=True)
class StepTrace:
    """One training step of one rank, counted without computing it."""

    world_size: int
    device: str
    """``cuda`` or ``cpu``."""
    pairs: int
    """Of this rank."""
    caption_tokens: int
    """Of this rank's captions, without padding."""
    peak: Moment
    timeline: tuple[Moment, ...]
    """Chosen moments in order, the peak among them."""
    before: Mapping[str, int]
    """Memory between steps by category, in bytes."""
    work: Mapping[str, Work]
    """By ``<phase>/<class>``. Phases: ``teacher``, ``look-up``, ``forward`` (with micro-batches, also GradCache's pass
    without a graph), ``loss``, ``backward``, ``update``, and within it ``muon``, where that updates matrices. Classes
    of kernels: ``products`` of matrices, ``attention``, ``optimizer`` (AdamW), and ``other``, which reads and writes
    memory once."""
    collectives: tuple[Collective, ...]
    model_flops: int
    """Of the model's own products, forward and backward, without recomputation."""
    parameters: int
    """Of the whole model."""
    checkpoint_bytes: int
    """Of a save: every weight in fp32 and, of those that are trained, the optimizer's moments and a moving average."""
    loss_backend: str
    """The one traced."""
    muon_shares: Mapping[int, float] = field(default_factory=dict)
    """The first rank's part of Muon's products, by number of ranks: each updates whole matrices. Empty without Muon."""

    @property
    def executed_flops(self) -> float:
        return sum(work.flops for work in self.work.values())

    def total(self, phase: str | None = None, kernels: str | None = None) -> Work:
        """The sum over the phases and classes that are not given."""
        found = [
            work
            for key, work in self.work.items()
            if (phase is None or key.startswith(f"{phase}/")) and (kernels is None or key.endswith(f"/{kernels}"))
        ]
        return Work(
            flops=sum(work.flops for work in found),
            bytes=sum(work.bytes for work in found),
            launches=sum(work.launches for work in found),
        )
