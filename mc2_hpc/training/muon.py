"""Muon (https://kellerjordan.github.io/posts/muon, arXiv 2502.16982) for the matrices of the blocks, outside DeepSpeed.

Muon orthogonalises whole matrices, so ZeRO's flat partitions are of no use to it. Instead each rank owns whole ones,
with their momentum: gradients are averaged on the owner, which updates its matrices by ``torch.optim.Muon`` and
broadcasts them. Queries, keys and values are three matrices here, though they are stored as one.

DeepSpeed has a Muon of its own (``deepspeed/runtime/zero/muon``). It is not used: its gradient norm is that of the
orthogonalised updates, so clipping and the logged norm would mean something else, and its iteration is not torch's.
"""

import re
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mc2_hpc.config import OptimConfig
from mc2_hpc.distributed import Ranks
from mc2_hpc.models.presets import ClipArchitecture
from mc2_hpc.training.optim import lr_factor, set_learning_rate
from mc2_hpc.training.tower_state import EMA

MOMENTUM = "momentum_buffer"
"""The kind of state that Muon has."""

_BUCKET = 1 << 22
"""Numbers that travel together: small matrices would otherwise be a message each, which takes longer than to copy
them."""
_MATRIX = re.compile(r"\.transformer\.blocks\.[0-9]+\.(attention\.(qkv|out)|fc|proj)\.weight$")


def is_muons(name: str) -> bool:
    """Whether Muon updates a parameter, by its name in ``CLIP.state_dict()``: the matrices of the blocks.

    Embeddings, tables and the projections to the embedding space stay with AdamW, as do gains and biases.
    """
    return _MATRIX.search(name) is not None


class MuonMatrices:
    """The trained matrices of the blocks. A step is any number of backward passes, :meth:`reduce`, :meth:`step`."""

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], arch: ClipArchitecture, config: OptimConfig, ranks: Ranks
    ) -> None:
        """
        Args:
            parameters: the matrices by name, on the device, equal on all ranks.
        """
        self._parameters = dict(parameters)
        self._rank, self._world_size = ranks.rank, ranks.world_size
        self._owners = owners(self._parameters, ranks.world_size)
        self._own = [name for name in self._parameters if self._owners[name] == ranks.rank]
        self._buckets = _buckets(self._parameters, self._owners)
        self._grads: dict[str, Tensor] = {}
        self._state: dict[str, dict[str, Tensor]] = {}
        self._pieces: dict[str, tuple[Tensor, ...]] = {}
        groups = []
        for name in self._own:
            weight = self._parameters[name].detach()
            self._pieces[name] = pieces(name, weight)
            self._state[name] = {MOMENTUM: torch.zeros_like(weight)}
            if config.ema_decay:
                self._state[name][EMA] = weight.clone()
            groups.append({"params": list(self._pieces[name]), "lr_factor": lr_factor(name, arch, config)})
        self._optimizer: torch.optim.Muon | None = None
        if groups:
            # Scaled so that a learning rate and a weight decay for AdamW serve Muon as well (arXiv 2502.16982).
            self._optimizer = torch.optim.Muon(
                groups,
                lr=0.0,
                weight_decay=config.weight_decay,
                momentum=config.muon_momentum,
                adjust_lr_fn="match_rms_adamw",
            )
            for name in self._own:
                for piece, momentum in zip(self._pieces[name], pieces(name, self._state[name][MOMENTUM]), strict=True):
                    self._optimizer.state[piece][MOMENTUM] = momentum

    def __contains__(self, name: str) -> bool:
        return name in self._parameters

    def shape(self, name: str) -> torch.Size:
        """Shape of a matrix."""
        return self._parameters[name].shape

    def reduce(self, *, averaged: bool) -> None:
        """Take the gradients: each averaged over the ranks, on its owner alone. Collective.

        Args:
            averaged: they already are, on every rank.
        """
        grads = {}
        for name, parameter in self._parameters.items():
            assert parameter.grad is not None
            grads[name], parameter.grad = parameter.grad, None
        if not averaged:
            self._exchange(grads, lambda flat, owner: dist.reduce(flat, owner, async_op=True))
            for name in self._own:
                grads[name].div_(self._world_size)
        self._grads = {name: grads[name] for name in self._own}

    def gradients(self) -> list[Tensor]:
        """The averaged gradients of this rank's matrices; every matrix is on one rank."""
        return list(self._grads.values())

    @torch.no_grad()
    def step(self, lr: float, coefficient: Tensor | None) -> None:
        """Update all matrices with the run's learning rate ``lr``. Collective.

        Args:
            coefficient: that the gradients are multiplied by first, 0-d.
        """
        if self._optimizer is not None:
            if coefficient is not None:
                torch._foreach_mul_(self.gradients(), coefficient)
            for name in self._own:
                for piece, grad in zip(self._pieces[name], pieces(name, self._grads[name]), strict=True):
                    piece.grad = grad
            set_learning_rate(self._optimizer.param_groups, lr)
            self._optimizer.step()
            self._optimizer.zero_grad()
        self.drop()
        self._exchange(
            {name: parameter.detach() for name, parameter in self._parameters.items()},
            lambda flat, owner: dist.broadcast(flat, owner, async_op=True),
        )

    def _exchange(self, tensors: Mapping[str, Tensor], start: Callable[[Tensor, int], "dist.Work | None"]) -> None:
        """Call ``start`` with each bucket's numbers and owner, wait for all, and put what the numbers became back."""
        flats = [_flat([tensors[name] for name in bucket]) for bucket in self._buckets]
        works = [start(flat, self._owners[bucket[0]]) for flat, bucket in zip(flats, self._buckets, strict=True)]
        for work, flat, bucket in zip(works, flats, self._buckets, strict=True):
            if work is not None:
                work.wait()
            if len(bucket) > 1:
                parts = [tensors[name].view(-1) for name in bucket]
                torch._foreach_copy_(parts, list(flat.split([part.numel() for part in parts])))

    def drop(self) -> None:
        """Forget the step's gradients without an update."""
        self._grads = {}

    def average(self, decay: float) -> None:
        """Move the averages of this rank's matrices on by a step."""
        for name in self._own:
            self._state[name][EMA].lerp_(self._parameters[name].detach(), 1 - decay)

    def full(self, kind: str, name: str) -> Tensor:
        """A matrix (``weight``), its momentum or its average, on every rank. Collective."""
        if kind == "weight":
            return self._parameters[name]
        own = self._owners[name] == self._rank
        value = self._state[name][kind] if own else torch.empty_like(self._parameters[name])
        dist.broadcast(value, self._owners[name])
        return value

    def load(self, kind: str, name: str, value: Tensor) -> None:
        """Set the momentum or the average of a matrix. Not collective."""
        if self._owners[name] == self._rank:
            self._state[name][kind].copy_(value)


def pieces(name: str, tensor: Tensor) -> tuple[Tensor, ...]:
    """What is orthogonalised as one matrix: views of a tensor of the parameter's shape."""
    return tensor.chunk(3) if name.endswith("qkv.weight") else (tensor,)


def _flat(matrices: Sequence[Tensor]) -> Tensor:
    """Their numbers one after another; a view of a single one."""
    return matrices[0].view(-1) if len(matrices) == 1 else torch.cat([each.view(-1) for each in matrices])


def owners(parameters: Mapping[str, Tensor], world_size: int) -> dict[str, int]:
    """The rank that owns each matrix: largest first, each to the rank with the least work so far."""
    work = [0] * world_size
    found = {}
    for name in sorted(parameters, key=lambda name: (-parameters[name].numel(), name)):
        rank = min(range(world_size), key=lambda each: work[each])
        found[name] = rank
        work[rank] += parameters[name].numel() * min(parameters[name].shape)
    return found


def _buckets(parameters: Mapping[str, Tensor], owners: Mapping[str, int]) -> list[list[str]]:
    """The matrices that travel in one message: of one owner, at most :data:`_BUCKET` numbers or a single matrix."""
    buckets: list[list[str]] = []
    for owner in sorted(set(owners.values())):
        size = _BUCKET
        for name in (each for each in parameters if owners[each] == owner):
            size += parameters[name].numel()
            if size > _BUCKET:
                buckets.append([])
                size = parameters[name].numel()
            buckets[-1].append(name)
    return buckets
