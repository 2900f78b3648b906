"""Low-rank adapters (LoRA, arXiv 2106.09685) on the linear layers of the blocks: attention's two and the MLP's two.

An adapted layer computes ``x W^T + b + scale (x A^T) B^T`` with ``scale = alpha / rank``. A is drawn at random and B is
zero, so a model begins as the one that it adapts. The adapters are parameters beside the layer's own, whose names do
not change: ``<layer>.lora_A`` (rank, in) and ``<layer>.lora_B`` (out, rank).

Folding them gives the plain layer ``W + scale B A``. Whatever reads a checkpoint as a model gets it folded
(:class:`FoldedTensorFiles`).
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mc2_hpc.errors import UserError
from mc2_hpc.models.clip import CLIP
from mc2_hpc.models.tensor_files import TensorFiles
from mc2_hpc.reading.json_file import File, Foreign, Size, read_json

_A, _B, _WEIGHT = ".lora_A", ".lora_B", ".weight"


@dataclass(frozen=True, kw_only=True)
class Adapters:
    """Which adapters a model has."""

    rank: int
    alpha: float
    """The product of the adapters counts ``alpha / rank`` times."""
    vision: bool
    text: bool

    def __str__(self) -> str:
        """As settings of a run."""
        values = (f"{key}: {str(value).lower()}" for key, value in vars(self).items())
        return f"lora={{{', '.join(values)}}}"

    @property
    def towers(self) -> list[str]:
        """The towers that are adapted."""
        return [tower for tower in ("vision", "text") if getattr(self, tower)]

    @property
    def scale(self) -> float:
        """What the product of the adapters is multiplied by."""
        return self.alpha / self.rank


class AdaptersFile(File):
    """:class:`Adapters` in ``model.json``."""

    rank: Size
    alpha: float
    vision: bool
    text: bool

    def adapters(self) -> Adapters:
        """The same as a value."""
        return Adapters(rank=self.rank, alpha=self.alpha, vision=self.vision, text=self.text)


class _AdaptedModel(Foreign):
    """The part of ``model.json`` that describes adapters."""

    lora: AdaptersFile | None = None


class AdaptedLinear(nn.Linear):
    """A linear layer with a low-rank adapter beside its own weight."""

    def __init__(self, base: nn.Linear, adapters: Adapters) -> None:
        """Take over the parameters of ``base``; the adapter has no values yet."""
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.lora_A = nn.Parameter(base.weight.new_empty(adapters.rank, base.in_features))
        self.lora_B = nn.Parameter(base.weight.new_empty(base.out_features, adapters.rank))
        self.scale = adapters.scale

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        # First, because recomputation stops at the last layer that keeps something: before the large product.
        low = F.linear(F.linear(input, self.lora_A), self.lora_B)
        return torch.add(super().forward(input), low, alpha=self.scale)


def is_adapter(name: str) -> bool:
    """Whether a parameter, by its name in ``CLIP.state_dict()``, is an adapter's."""
    return name.endswith((_A, _B))


def add_adapters(clip: CLIP, adapters: Adapters) -> None:
    """Put adapters without values beside the linear layers of the blocks of the adapted towers."""
    for tower in adapters.towers:
        for block in getattr(clip, tower).transformer.blocks:
            for owner, name in ((block.attention, "qkv"), (block.attention, "out"), (block, "fc"), (block, "proj")):
                setattr(owner, name, AdaptedLinear(getattr(owner, name), adapters))


@torch.no_grad()
def init_adapters(clip: CLIP, *, seed: int) -> None:
    """Draw every A as ``nn.Linear`` draws its weight, from ``seed`` alone, and set every B to zero."""
    generator = torch.Generator().manual_seed(seed)
    for layer in clip.modules():
        if isinstance(layer, AdaptedLinear):
            nn.init.kaiming_uniform_(layer.lora_A, a=math.sqrt(5), generator=generator)
            nn.init.zeros_(layer.lora_B)


def folded(files: TensorFiles) -> TensorFiles:
    """A checkpoint's weights, or their moving average, with the adapters folded in, if there are any.

    Raises:
        UserError: the adapters are not those that ``model.json`` describes.
    """
    if not any(is_adapter(name) for name in files.names()):
        return files
    card = read_json(files.folder / "model.json", _AdaptedModel)
    if card.lora is None:
        raise UserError(f"{files.folder}: damaged checkpoint: it has adapters, but model.json does not describe them")
    return FoldedTensorFiles(files, card.lora.adapters())


class FoldedTensorFiles(TensorFiles):
    """A checkpoint's weights with the adapters folded into them: the names and shapes of the plain model."""

    def __init__(self, files: TensorFiles, adapters: Adapters) -> None:
        """
        Args:
            adapters: as ``model.json`` describes them.

        Raises:
            UserError: they are not those that the files have.
        """
        self.folder = files.folder
        self._cast: set[str] = set()
        self._files = files
        self._adapters = adapters
        self._adapted: dict[str, tuple[str, str]] = {}
        for name in files.names():
            if name.endswith(_A):
                layer = name.removesuffix(_A)
                self._adapted[layer + _WEIGHT] = (name, layer + _B)
        self._check()

    def _check(self) -> None:
        found = {name for pair in self._adapted.values() for name in pair}
        stored = {name for name in self._files.names() if is_adapter(name)}
        rank = self._adapters.rank
        for weight, (a, b) in self._adapted.items():
            if weight not in self._files or b not in self._files:
                raise UserError(f"{self.folder}: damaged checkpoint: it has {a!r}, but no {weight!r} or {b!r}")
            out, width = self._files.shape(weight)
            if (self._files.shape(a), self._files.shape(b)) != ((rank, width), (out, rank)):
                raise UserError(f"{self.folder}: {a!r} is not an adapter of the rank that model.json says, {rank}")
        if found != stored:
            raise UserError(f"{self.folder}: damaged checkpoint: {min(stored - found)!r} has no other half")

    def names(self) -> list[str]:
        """Sorted names of the plain model's weights."""
        return [name for name in self._files.names() if not is_adapter(name)]

    def paths(self) -> list[Path]:
        """The files, sorted."""
        return self._files.paths()

    def __contains__(self, name: str) -> bool:
        return name in self._files and not is_adapter(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """A weight's shape."""
        return self._files.shape(name)

    def stored_type(self, name: str) -> str:
        """The type in its file of the weight without its adapter."""
        return self._files.stored_type(name)

    def get(self, name: str) -> Tensor:
        """One weight; an adapted one is a new tensor, whose sum is rounded once."""
        weight = self._files.get(name)
        if name not in self._adapted:
            return weight
        a, b = (self._files.get_fp32(part).double() for part in self._adapted[name])
        return torch.addmm(weight.double(), b, a, alpha=self._adapters.scale).float()
