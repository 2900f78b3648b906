"""Updated weights of ZeRO 1 and 2 gathered in bf16, where they enter nothing but products in bf16.

DeepSpeed (0.19) gathers weights in the type of the module's parameters, which is fp32 under autocast. Its ``bf16``
engine would make all of them bf16, gains and embeddings too, and their gradients with them, so that micro-batches would
add up in bf16. Here DeepSpeed's step is given flat bf16 buffers of some groups to gather into, and the parameters stay
fp32 with the gathered values. Autocast rounds these weights before every product, so a step computes the same as with
an fp32 gather, bit for bit. The master weights remain fp32, each rank's part; checkpoints are read from those.
"""

import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_OF_PRODUCTS = re.compile(r"(\.(patch_embedding|qkv|out|fc|proj)\.weight|\.projection|\.lora_[AB])$")


def only_in_products(name: str) -> bool:
    """Whether autocast rounds every use of a parameter to bf16, by its name in ``CLIP.state_dict()``: the weights of
    linear layers, their adapters, and the projections to the embedding space.

    Not embeddings of tokens, positions and class, nor gains and biases.
    """
    return _OF_PRODUCTS.search(name) is not None


class WeightGather:
    """Lets a DeepSpeed optimizer of ZeRO stage 1 or 2 gather some of its parameter groups in bf16."""

    def __init__(self, optimizer: Any, rounded: Collection[nn.Parameter]) -> None:
        """Round the weights of these groups; their masters are not.

        Args:
            rounded: parameters that are gathered in bf16. A group has only these, or none of them.
        """
        self._optimizer = optimizer
        members = set(rounded)
        self._groups = [number for number, group in enumerate(optimizer.bit16_groups) if group[0] in members]
        self._gathered: dict[int, tuple[Tensor, Tensor]] = {}
        for number in self._groups:
            whole = optimizer.bit16_groups_flat[number]
            whole.copy_(whole.to(torch.bfloat16))
        self._update_others = optimizer._update_model_bit16_weights
        optimizer._update_model_bit16_weights = self._update

    @contextmanager
    def during_step(self) -> Iterator[None]:
        """Surrounds DeepSpeed's step. The copies exist only meanwhile, when there are no gradients and activations."""
        flats = self._optimizer.bit16_groups_flat
        partitions = self._optimizer.parallel_partitioned_bit16_groups
        own = {number: (flats[number], partitions[number]) for number in self._groups}
        for number, (whole, parts) in own.items():
            gathered = torch.empty_like(whole, dtype=torch.bfloat16)
            self._gathered[number] = whole, gathered
            flats[number], partitions[number] = gathered, list(gathered.chunk(len(parts)))
        try:
            yield
        finally:
            for number, (whole, parts) in own.items():
                flats[number], partitions[number] = whole, parts
            self._gathered = {}

    def _update(self, number: int) -> None:
        """DeepSpeed calls this for every group after it has gathered all."""
        if number in self._gathered:
            whole, gathered = self._gathered[number]
            whole.copy_(gathered)  # the parameters are views of it
        else:
            self._update_others(number)
