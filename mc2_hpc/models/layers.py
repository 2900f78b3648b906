"""Transformer blocks that both towers share.

A tower reads one row of each image or caption, so the last block computes the others only as far as attention needs
them: up to queries, keys and values.

Shape suffixes: B batch, L sequence, T tokens of packed captions, W width, H heads, D channels per head, M width of the
MLP.
"""

import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts, noop_context_fn

from mc2_hpc.errors import UserError, first_line
from mc2_hpc.kernels.linear import linear
from mc2_hpc.kernels.split_qkv import split_qkv
from mc2_hpc.models.fused import LayerNorm, Product, QuickGELU
from mc2_hpc.models.packed_attention import (
    AttentionFunction,
    PackedAttentionFunction,
    packed_by,
    torch_varlen,
    xformers_block_diagonal,
)
from mc2_hpc.models.packed_captions import Packing, pack
from mc2_hpc.models.rows import take_rows

logger = logging.getLogger(__name__)
T = TypeVar("T")


class Recompute(StrEnum):
    """How much of a block the backward pass computes again instead of keeping it."""

    NONE = "none"
    SELECTIVE = "selective"
    """Norms and activations. Every product and attention keeps its result."""
    FULL = "full"
    """Everything: only the inputs of blocks are kept."""


@dataclass(frozen=True)
class AttentionBackend:
    """Softmax attention in both forms: over rows of equal length, and within packed captions."""

    attend: AttentionFunction
    attend_packed: PackedAttentionFunction


def _sdpa(q_BHLD: Tensor, k_BHLD: Tensor, v_BHLD: Tensor, *, causal: bool) -> Tensor:
    return F.scaled_dot_product_attention(q_BHLD, k_BHLD, v_BHLD, is_causal=causal)


SDPA = AttentionBackend(_sdpa, packed_by(_sdpa))


def _load_sdpa(device_type: str) -> AttentionBackend:
    # Flash attention has needed this since its second version.
    if device_type == "cuda" and torch.cuda.get_device_capability() >= (8, 0):
        return AttentionBackend(_sdpa, torch_varlen(fallback=SDPA.attend_packed))
    return SDPA


def _load_xformers(device_type: str) -> AttentionBackend:
    # It warns of extensions that do not load. Whether one is missing that is needed, the check below says in one line.
    logging.getLogger("xformers").setLevel(logging.ERROR)
    try:
        from xformers.ops import LowerTriangularMask, memory_efficient_attention

        attend_packed = xformers_block_diagonal()
    except ImportError as error:
        raise UserError(
            f"model.attention='xformers': the package xformers does not load ({error}); "
            f"install xformers>=0.0.35 or set model.attention=sdpa"
        ) from None

    def attend(q_BHLD: Tensor, k_BHLD: Tensor, v_BHLD: Tensor, *, causal: bool) -> Tensor:
        # xformers wants (B, L, H, D).
        q, k, v = (x.transpose(1, 2) for x in (q_BHLD, k_BHLD, v_BHLD))
        bias = LowerTriangularMask() if causal else None
        return memory_efficient_attention(q, k, v, attn_bias=bias).transpose(1, 2)

    backend = AttentionBackend(attend, attend_packed)
    try:
        _run_once(backend, torch.device(device_type))
    except (NotImplementedError, RuntimeError) as error:
        raise UserError(
            f"model.attention='xformers': the installed xformers cannot compute it on {device_type} "
            f"({first_line(error)}); install a build for PyTorch {torch.__version__} or set model.attention=sdpa"
        ) from None
    return backend


@torch.enable_grad()
def _run_once(backend: AttentionBackend, device: torch.device) -> None:
    """Both passes of each kind of attention that the towers compute.

    A package whose extensions were built for another PyTorch or CUDA imports, and fails when it is first called.
    """
    qkv_T3HD = torch.zeros(4, 3, 2, 64, dtype=torch.bfloat16, device=device, requires_grad=True)
    q_BHLD, k_BHLD, v_BHLD = qkv_T3HD[None].permute(2, 0, 3, 1, 4).unbind()
    outputs = [backend.attend(q_BHLD, k_BHLD, v_BHLD, causal=causal) for causal in (False, True)]
    outputs.append(backend.attend_packed(qkv_T3HD, pack([1, 3], 4, device)))
    torch.stack([output.float().sum() for output in outputs]).sum().backward()


ATTENTION_BACKENDS: dict[str, Callable[[str], AttentionBackend]] = {"sdpa": _load_sdpa, "xformers": _load_xformers}
"""By name, each with a function of the device type that loads it."""

# torch's own kernels (flash, cuDNN, memory-efficient) are the default everywhere; xformers must be chosen by name.
_AUTO_ATTENTION = {"cpu": "sdpa", "cuda": "sdpa"}


def resolve_attention(name: str, device_type: str) -> AttentionBackend:
    """The attention backend that ``model.attention`` names; ``auto`` chooses by device and logs its choice.

    Raises:
        UserError: the backend's package is not installed or has no kernels for this device, or the name is unknown.
    """
    if name == "auto":
        name = _AUTO_ATTENTION.get(device_type, "sdpa")
        logger.info("attention: %s (auto: the default on %s)", name, device_type)
    if name not in ATTENTION_BACKENDS:
        raise UserError(f"model.attention={name!r}: choose one of auto, {', '.join(ATTENTION_BACKENDS)}")
    return ATTENTION_BACKENDS[name](device_type)


class Linear(nn.Linear):
    """A linear layer that others can compute as part of a fused function."""

    def forward(self, input: Tensor, product: Callable[..., Any] | None = None) -> Any:
        """(..., in) to (..., out); or what ``product`` returns of ``input``, the weight and the bias.

        As one call for both, because ZeRO 3 fetches parameters around calls.
        """
        if product is None:
            return super().forward(input)
        return product(input, self.weight, self.bias)


class Attention(nn.Module):
    """Multi-head self-attention with one fused projection for queries, keys and values."""

    def __init__(self, width: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        self.heads = heads
        self.causal = causal
        self.qkv: nn.Linear = Linear(width, 3 * width)
        self.out: nn.Linear = Linear(width, width)
        self.backend = SDPA

    def forward(self, qkv: Tensor, packing: Packing | None = None, pooled_B: Tensor | None = None) -> Tensor:
        """The projection ``self.qkv`` of rows to their new values, which are added to the residual stream.

        Args:
            qkv: (B, L, 3W); or (T, 3W), if the rows are captions in this ``packing``.
            pooled_B: as for :class:`Block`.
        """
        qkv = qkv.unflatten(-1, (3, self.heads, -1))
        if packing is not None:
            attended = self._attend_packed(qkv, packing)
        else:
            # Unbound before they are transposed: so backward stacks the three gradients in place, without another copy.
            attended = self._attend(qkv.unbind(2))
        return cast(Tensor, self.out(_pooled(attended, pooled_B)))

    def fused(self, qkv: Product, packing: Packing | None = None, pooled_B: Tensor | None = None) -> Product:
        """The same, with gradients of biases passed on; the one of ``qkv`` only if there is no ``packing``."""
        assert qkv.value is not None
        parts = qkv.value.unflatten(-1, (3, self.heads, -1))
        if packing is not None:
            attended = self._attend_packed(parts, packing)
        else:
            attended = self._attend(split_qkv(parts, qkv.bias))

        def product(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
            return linear(x, weight, bias.detach()), bias.view_as(bias)

        return Product(*self.out(_pooled(attended, pooled_B), product))

    def _attend(self, parts: Sequence[Tensor]) -> Tensor:
        q_BHLD, k_BHLD, v_BHLD = (part.transpose(1, 2) for part in parts)
        y_BHLD = self.backend.attend(q_BHLD, k_BHLD, v_BHLD, causal=self.causal)
        return y_BHLD.transpose(1, 2).flatten(2)

    def _attend_packed(self, qkv_T3HD: Tensor, packing: Packing) -> Tensor:
        return self.backend.attend_packed(qkv_T3HD, packing).flatten(1)


class Block(nn.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + MLP(norm(x))."""

    def __init__(self, width: int, heads: int, mlp_width: int, *, causal: bool, quick_gelu: bool) -> None:
        super().__init__()
        self.norm_1 = LayerNorm(width)
        self.attention = Attention(width, heads, causal=causal)
        self.norm_2 = LayerNorm(width)
        self.fc: nn.Linear = Linear(width, mlp_width)
        self.activation = QuickGELU() if quick_gelu else nn.GELU()
        self.proj: nn.Linear = Linear(mlp_width, width)
        self.has_float8 = False
        """Whether any linear layer is one of :mod:`mc2_hpc.models.float8`."""

    @property
    def fuses(self) -> bool:
        """Whether :meth:`forward` can leave its last addition to the next block: with the kernels of both norm and
        activation, without adapters and layers in fp8."""
        layers = (self.attention.qkv, self.attention.out, self.fc, self.proj)
        kernels = self.norm_1.fuses and isinstance(self.activation, QuickGELU) and self.activation.fuses
        return kernels and all(isinstance(layer, Linear) for layer in layers)

    def forward(
        self,
        x_BLW: Tensor,
        packing: Packing | None = None,
        *,
        pooled_B: Tensor | None = None,
        selective: bool = False,
        pending: Product | None = None,
    ) -> Tensor | tuple[Tensor, Product]:
        """(B, L, W) to the same; or, if the rows are captions in this ``packing``, (T, W) to the same.

        Args:
            pooled_B: int64, distinct rows, counted over the whole batch. Only these are computed once every row has its
                query, key and value, and the results are (B, W).
            selective: compute the inputs of the linear layers, where they are norms or activations, again in the
                backward pass instead of keeping them.
            pending: what is still to be added to ``x_BLW``, if the block :attr:`fuses`; its own last addition is then
                pending too, and returned next to the sum so far.
        """
        if pending is not None:
            return self._fused(x_BLW, packing, pooled_B, selective, pending)
        recomputes = selective and torch.is_grad_enabled()
        recomputing = functools.partial(_recomputing, has_float8=self.has_float8)
        product = functools.partial(recomputing, _product) if recomputes else _product
        attended = self.attention(product(self.norm_1, self.attention.qkv, x_BLW), packing, pooled_B)
        x_BLW = _pooled(x_BLW, pooled_B)
        if self.norm_2.adds:
            of_sum = functools.partial(recomputing, _product_of_sum) if recomputes else _product_of_sum
            x_BLW, h_BLM = of_sum(self.norm_2, self.fc, x_BLW, attended)
        else:
            x_BLW = x_BLW + attended
            h_BLM = product(self.norm_2, self.fc, x_BLW)
        return x_BLW + product(self.activation, self.proj, h_BLM)

    def _fused(
        self, x_BLW: Tensor, packing: Packing | None, pooled_B: Tensor | None, selective: bool, pending: Product
    ) -> tuple[Tensor, Product]:
        """Each linear layer leaves the gradient of its bias to the next kernel, and the last one to the next block."""
        unpacked = packing is None  # only then is there a kernel for the gradients of queries, keys and values
        x_BLW, qkv = self.norm_1.then(self.attention.qkv, x_BLW, pending, bias_elsewhere=unpacked, recompute=selective)
        attended = self.attention.fused(qkv, packing, pooled_B)
        x_BLW = _pooled(x_BLW, pooled_B)
        x_BLW, h_BLM = self.norm_2.then(self.fc, x_BLW, attended, bias_elsewhere=True, recompute=selective)
        assert isinstance(self.activation, QuickGELU)
        return x_BLW, self.activation.then(self.proj, h_BLM, recompute=selective)


def _pooled(x: Tensor, pooled_B: Tensor | None) -> Tensor:
    return x if pooled_B is None else take_rows(x, pooled_B)


def _product(prepare: nn.Module, linear: nn.Module, x: Tensor) -> Tensor:
    return cast(Tensor, linear(prepare(x)))


def _product_of_sum(norm: nn.Module, linear: nn.Module, x: Tensor, added: Tensor) -> tuple[Tensor, Tensor]:
    total, normalised = norm(x, added)
    return total, linear(normalised)


def _recomputing(
    product: Callable[..., T], prepare: nn.Module, linear: nn.Module, *inputs: Tensor, has_float8: bool
) -> T:
    """The product, keeping its inputs and preparing them again in the backward pass.

    The product is not computed again: its backward pass needs its input only, so recomputation stops before it
    (``torch.utils.checkpoint.set_checkpoint_early_stop``).
    """
    contexts: Callable[[], tuple[AbstractContextManager[Any], AbstractContextManager[Any]]] = noop_context_fn
    if torch.compiler.is_compiling():
        # A compiled graph has no such stop: there the products must be named, or some would be computed again.
        contexts = _keeping_products
    elif has_float8:
        # The autograd function of a layer in fp8 keeps its input once it has multiplied, which is too late to stop.
        contexts = _leaving_out_products
    # No block draws random numbers, so there is no state of a generator to restore.
    y = checkpoint(
        product, prepare, linear, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=contexts
    )
    return cast(T, y)


_keeping_products = functools.partial(
    create_selective_checkpoint_contexts,
    [torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten._scaled_mm.default],
)


class _LeavingOutProducts(TorchDispatchMode):
    """Replaces products by tensors without values: their results are not used."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.mm.default:
            a, b = args
            return torch.empty(a.shape[0], b.shape[1], dtype=a.dtype, device=a.device)
        return func(*args, **(kwargs or {}))


def _leaving_out_products() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Contexts of a forward pass and its recomputation."""
    return nullcontext(), _LeavingOutProducts()


class Transformer(nn.Module):
    """A stack of blocks; ``recompute`` says how much of them is computed again in the backward pass."""

    def __init__(self, width: int, layers: int, heads: int, mlp_width: int, *, causal: bool, quick_gelu: bool) -> None:
        super().__init__()
        blocks = (Block(width, heads, mlp_width, causal=causal, quick_gelu=quick_gelu) for _ in range(layers))
        # The type of a ModuleList's items is not known to type checkers.
        self.blocks = cast(Sequence[Block], nn.ModuleList(blocks))
        self.recompute = Recompute.NONE
        self.before_block: Callable[[int], None] | None = None
        """Called before each block with its number. Unlike a hook it is not part of a compiled block."""

    def forward(self, x_BLW: Tensor, packing: Packing | None = None, *, pooled_B: Tensor) -> Tensor:
        """(B, L, W), or (T, W) if the rows are captions in this ``packing``, to (B, W).

        Args:
            pooled_B: int64, the row of each image or caption whose result is wanted, counted over the whole batch.
        """
        if self.recompute is not Recompute.FULL and all(block.fuses for block in self.blocks):
            return self._fused(x_BLW, packing, pooled_B)
        for block, pooled in self._in_turn(pooled_B):
            if self.recompute is Recompute.FULL and torch.is_grad_enabled():
                x_BLW = checkpoint(block, x_BLW, packing, pooled_B=pooled, use_reentrant=False)
            else:
                selective = self.recompute is Recompute.SELECTIVE
                x_BLW = block(x_BLW, packing, pooled_B=pooled, selective=selective)
        return x_BLW

    def _in_turn(self, pooled_B: Tensor) -> Iterator[tuple[Block, Tensor | None]]:
        """The blocks, the last with the rows that it has to compute."""
        last = len(self.blocks) - 1
        for number, block in enumerate(self.blocks):
            if self.before_block is not None:
                self.before_block(number)
            yield block, pooled_B if number == last else None

    def _fused(self, x_BLW: Tensor, packing: Packing | None, pooled_B: Tensor) -> Tensor:
        pending, selective = Product(None, None), self.recompute is Recompute.SELECTIVE
        for block, pooled in self._in_turn(pooled_B):
            x_BLW, pending = block(x_BLW, packing, pooled_B=pooled, selective=selective, pending=pending)
        return pending.added_to(x_BLW)
