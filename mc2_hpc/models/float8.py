"""Products of the blocks in fp8, by torchao: what ``precision: fp8`` adds to bf16.

A converted layer computes its three products (output, gradient of the input, gradient of the weight) from operands in
fp8: values and weights in e4m3, gradients in e5m2. Each operand is first multiplied by one scale, so that its largest
magnitude becomes the largest number of its type (torchao's recipe ``tensorwise``, scaled anew in every use), and the
product is divided by the scales. Parameters, their names, biases, gradients and everything between the layers remain as
in bf16, so checkpoints do not change.

GPUs multiply fp8 from compute capability 8.9 on. On a CPU torchao computes the same products of the same rounded
operands in fp32.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from mc2_hpc.errors import UserError
from mc2_hpc.models.clip import CLIP

logger = logging.getLogger(__name__)

_CAPABILITY = (8, 9)
_MULTIPLE = 16
"""Both sizes of a matrix have to be multiples of it for a product in fp8."""


def check_float8(device: torch.device) -> None:
    """Check early whether products in fp8 can run on ``device``.

    Raises:
        UserError: torchao does not load, or the GPU has no such products.
    """
    _torchao()
    if device.type == "cuda" and not has_float8_products(device):
        found, needed = (".".join(map(str, each)) for each in (torch.cuda.get_device_capability(device), _CAPABILITY))
        raise UserError(
            f"precision=fp8: this GPU has compute capability {found}, and products in fp8 need {needed} or newer "
            f"(Ada, Hopper, Blackwell); set precision=bf16"
        )


def has_float8_products(device: torch.device) -> bool:
    """Whether ``device`` multiplies fp8 itself."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= _CAPABILITY


def _torchao() -> ModuleType:
    quieten_torchao()
    try:
        import torchao.float8
    except ImportError as error:
        raise UserError(
            f"precision=fp8: the package torchao does not load ({error}); pip install 'mc2_hpc[fp8]', "
            f"or set precision=bf16"
        ) from None
    return torchao.float8


def quieten_torchao() -> None:
    """Let the import of torchao, which transformers imports too, not warn of what concerns none of its users here: its
    own kernels, which do not load where torch or Python is another, and torch's plans for its enumerations."""
    logging.getLogger("torchao").setLevel(logging.ERROR)
    logging.getLogger("torch.utils._pytree").addFilter(_is_of_concern)


def _is_of_concern(record: logging.LogRecord) -> bool:
    return "register_constant() on Enum" not in record.getMessage()


class Float8Blocks:
    """The linear layers of a model's blocks, of which the trained and large ones compute in fp8."""

    def __init__(self, clip: CLIP, *, min_size: int, device: torch.device) -> None:
        """Convert ``clip`` in place; its parameters stay the same objects under the same names.

        Layers without a trained weight stay in bf16: a frozen tower computes what its stored features are.

        Args:
            min_size: converted are layers of which neither input nor output is narrower.

        Raises:
            UserError: torchao does not load, or no layer is large enough.
        """
        self._places: list[tuple[nn.Module, str, nn.Linear, nn.Module]] = []
        num_layers = 0
        for block in (block for transformer in clip.transformers() for block in transformer.blocks):
            for owner, name, linear in list(_linears(block)):
                num_layers += 1
                if _fits(linear, min_size):
                    float8 = _converted(linear, device)
                    self._places.append((owner, name, linear, float8))
                    setattr(owner, name, float8)
                    block.has_float8 = True
        if not self._places:
            raise UserError(
                f"precision=fp8: none of the {num_layers} linear layers of the blocks is trained, at least "
                f"fp8_min_size={min_size} wide at both ends and there a multiple of {_MULTIPLE}; lower fp8_min_size, "
                f"or set precision=bf16"
            )
        logger.info("fp8: %d of the %d linear layers of the blocks; the others in bf16", len(self._places), num_layers)

    @contextmanager
    def in_bf16(self) -> Iterator[None]:
        """Put the layers back as they were while the context lasts: evaluation computes as the model's users will."""
        try:
            for owner, name, linear, _ in self._places:
                setattr(owner, name, linear)
            yield
        finally:
            for owner, name, _, float8 in self._places:
                setattr(owner, name, float8)


def _linears(block: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    for owner in block.modules():
        for name, module in owner.named_children():
            if isinstance(module, nn.Linear):
                yield owner, name, module


def _fits(linear: nn.Linear, min_size: int) -> bool:
    sizes = linear.in_features, linear.out_features
    return linear.weight.requires_grad and all(size >= min_size and size % _MULTIPLE == 0 for size in sizes)


def _converted(linear: nn.Linear, device: torch.device) -> nn.Module:
    float8 = _torchao()
    # Padded, because the gradient of a weight is a sum over the tokens, whose number need not be a multiple.
    config = float8.Float8LinearConfig(emulate=not has_float8_products(device), pad_inner_dim=True)
    layer: nn.Module = float8.convert_to_float8_training(linear, config=config)
    if device.type == "cpu":
        layer.register_forward_pre_hook(_to_autocast_type)
    return layer


def _to_autocast_type(layer: nn.Module, inputs: tuple[Tensor]) -> Any:
    """What torchao does itself under the autocast of GPUs, the only one that it looks at."""
    if not torch.is_autocast_enabled("cpu"):
        return None
    return (inputs[0].to(torch.get_autocast_dtype("cpu")),)
