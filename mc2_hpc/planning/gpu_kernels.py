"""The kernels that a step would use on a GPU, in forms that can be traced: attention and the Triton loss."""

import dataclasses
import logging
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mc2_hpc.config import RunConfig
from mc2_hpc.kernels.contrastive.dispatch import choose_backend
from mc2_hpc.models.clip import CLIP
from mc2_hpc.models.layers import AttentionBackend
from mc2_hpc.models.packed_attention import packed_by, torch_varlen
from mc2_hpc.planning.counting import Counting
from mc2_hpc.precision import Precision

logger = logging.getLogger(__name__)


def _attend(q_BHLD: Tensor, k_BHLD: Tensor, v_BHLD: Tensor, *, causal: bool) -> Tensor:
    """PyTorch's flash attention, or its memory-efficient one for fp32, as ``scaled_dot_product_attention`` chooses."""
    if q_BHLD.dtype == torch.float32:
        found = torch.ops.aten._scaled_dot_product_efficient_attention(q_BHLD, k_BHLD, v_BHLD, None, True, 0.0, causal)
        return found[0]
    width = q_BHLD.shape[-1]
    padding = (0, -width % 8)  # flash attention takes heads in multiples of 8
    q, k, v = (F.pad(x, padding) if padding[1] else x for x in (q_BHLD, k_BHLD, v_BHLD))
    found = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=width**-0.5)
    return found[0][..., :width] if padding[1] else found[0]


def gpu_attention(clip: CLIP) -> None:
    """Compute attention as on a GPU of compute capability 8.0 or higher. xformers' kernels keep the same tensors."""
    backend = AttentionBackend(_attend, torch_varlen(fallback=packed_by(_attend)))
    for transformer in clip.transformers():
        for block in transformer.blocks:
            block.attention.backend = backend


def imagine_triton(config: RunConfig, counting: Counting) -> RunConfig:
    """Make Triton's kernels traceable; returns the config with the backends that are traced.

    The kernels are replaced by a note of their flops and bytes; what they read and write is allocated as usual. Without
    the package triton, PyTorch's operators are traced in their place, which keep more memory.
    """
    if find_spec("triton") is None:
        logger.warning("the plan is without Triton's kernels: triton is not installed (pip install triton)")
        model = dataclasses.replace(config.model, norm="torch", activation="torch")
        return dataclasses.replace(config, model=model, loss=dataclasses.replace(config.loss, backend="tiled"))
    from mc2_hpc.kernels.contrastive import triton_distillation, triton_impl, triton_sigmoid
    from mc2_hpc.kernels.layer_norm import triton_impl as layer_norm
    from mc2_hpc.kernels.quick_gelu import triton_impl as quick_gelu
    from mc2_hpc.kernels.split_qkv import triton_impl as split_qkv

    logits = _Logits(counting)
    triton_impl.statistics_kernel = triton_impl.gradient_kernel = logits
    triton_sigmoid.sigmoid_statistics_kernel = triton_sigmoid.sigmoid_gradient_kernel = logits
    both = _Logits(counting, models=2)
    triton_distillation.distilled_statistics_kernel = triton_distillation.distilled_gradient_kernel = both
    for module in (layer_norm, quick_gelu, split_qkv):
        for name in ("forward_kernel", "backward_kernel"):
            if hasattr(module, name):  # views need no kernel forward
                setattr(module, name, _Pass(counting))
    return config


def loss_backend(config: RunConfig) -> str:
    """The loss that is traced, by name."""
    if config.loss.backend != "auto":
        return config.loss.backend
    return choose_backend("auto", torch.device("cuda"), Precision(config.precision).dtype)


class _Pass:
    """In place of a Triton kernel that reads and writes each of its tensors once."""

    def __init__(self, counting: Counting) -> None:
        self._counting = counting

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return self._launch

    def _launch(self, *arguments: Any, **options: Any) -> None:
        self._counting.add("other", flops=0, size=_bytes(arguments))


def _bytes(arguments: Iterable[Any]) -> int:
    return sum(each.numel() * each.element_size() for each in arguments if isinstance(each, Tensor))


class _Logits(_Pass):
    """In place of a Triton kernel over a tile of logits: one product per model, from features or from memory."""

    def __init__(self, counting: Counting, models: int = 1) -> None:
        """
        Args:
            models: whose images, texts and dot products are the first arguments.
        """
        super().__init__(counting)
        self._models = models

    def _launch(self, *arguments: Any, **options: Any) -> None:
        found = [getattr(each, "base", each) for each in arguments]
        pairs = [found[3 * model : 3 * model + 2] for model in range(self._models)]
        # Without features, the products are counted already.
        flops = sum(2.0 * len(texts) * images.numel() for images, texts in pairs if images is not None)
        self._counting.add("products", flops=flops, size=_bytes(found))
