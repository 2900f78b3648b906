"""Updated weights of ZeRO 1 and 2 gathered while the next forward pass runs, in place of DeepSpeed's gather.

DeepSpeed (0.19) gathers every parameter group at the end of its step, one message after the other, and waits for each;
``overlap_comm`` is about gradients only. Here the step gathers nothing. The next forward pass begins by starting all
messages, in the order in which it needs their weights, and each block waits for those with its own. On a GPU it is the
stream that waits, never the host. They start there rather than after the update because one communicator sends in
order: the rows of a sharded token table, which a step needs first, would arrive behind all weights. So between a step
and the next forward pass nothing is in flight either, whatever ends the run there.

Weights that enter nothing but products can be gathered in bf16. DeepSpeed gathers in the type of the module's
parameters, which is fp32 under autocast, and its ``bf16`` engine would make all of them bf16, gains and embeddings too,
and their gradients with them, so that micro-batches would add up in bf16. Here the parameters stay fp32 with the
rounded values. Autocast rounds these weights before every product, so a step computes the same as with an fp32 gather,
bit for bit. The master weights remain fp32, each rank's part; checkpoints are read from those.
"""

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mc2_hpc.models.clip import Towers
from mc2_hpc.models.depth import depth_of, tower_of

_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # torch 2.13's name, and the older

_OF_PRODUCTS = re.compile(r"(\.(patch_embedding|qkv|out|fc|proj)\.weight|\.projection|\.lora_[AB])$")

_Place = tuple[int, int]
"""Number of the tower in the order of the forward pass, and depth in it (:mod:`mc2_hpc.models.depth`)."""


def only_in_products(name: str) -> bool:
    """Whether autocast rounds every use of a parameter to bf16, by its name in ``CLIP.state_dict()``: the weights of
    linear layers, their adapters, and the projections to the embedding space.

    Not embeddings of tokens, positions and class, nor gains and biases.
    """
    return _OF_PRODUCTS.search(name) is not None


@dataclass(kw_only=True)
class _Bucket:
    """One parameter group of DeepSpeed's, which is one message."""

    whole: Tensor
    """All its weights, flat; the parameters are views of it."""
    rounded: bool
    """Whether it travels in bf16."""
    places: set[_Place]
    """Where the forward pass uses it."""
    arriving: Tensor | None = None
    """What a message that has been started and not been waited for fills: ``whole``, or a buffer in bf16."""
    work: "dist.Work | None" = None


class WeightGather:
    """Gathers what a DeepSpeed optimizer of ZeRO stage 1 or 2 has updated.

    Whatever reads weights but for the forward pass of the towers has to call :meth:`finish` first.
    """

    def __init__(
        self,
        optimizer: Any,
        towers: Towers,
        parameters: Mapping[str, nn.Parameter],
        rounded: Collection[nn.Parameter] = (),
    ) -> None:
        """Round the weights of some groups; their masters are not.

        Args:
            towers: the module that DeepSpeed trains, called once or more per step.
            parameters: of ``towers`` by name, all that the optimizer has.
            rounded: parameters that are gathered in bf16. A group has only these, or none of them.
        """
        self._optimizer = optimizer
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        self._outdated = False
        places = {parameter: _place_of(name, towers) for name, parameter in parameters.items()}
        members = set(rounded)
        buckets = [
            _Bucket(whole=flat, rounded=group[0] in members, places={places[parameter] for parameter in group})
            for group, flat in zip(optimizer.bit16_groups, optimizer.bit16_groups_flat, strict=True)
        ]
        for bucket in buckets:
            if bucket.rounded:
                bucket.whole.copy_(bucket.whole.to(torch.bfloat16))
        self._buckets = sorted(buckets, key=lambda bucket: min(bucket.places))
        towers.register_forward_pre_hook(lambda *_: self._start())
        vision, text = towers.vision, towers.text
        for number, (tower, transformer, last_norm) in enumerate(
            ((vision, vision.transformer, vision.norm_post), (text, text.transformer, text.norm_final))
        ):
            num_blocks = len(transformer.blocks)
            tower.register_forward_pre_hook(self._waiter((number, 0)))
            # Not a hook, which would be part of what is compiled and different for every block.
            transformer.before_block = self._block_waiter(number, num_blocks)
            last_norm.register_forward_pre_hook(self._waiter((number, num_blocks + 1)))

    @contextmanager
    def instead_of_deepspeeds(self) -> Iterator[None]:
        """Surrounds DeepSpeed's step, which then updates this rank's part of the weights alone."""
        self.finish()
        optimizer, flats = self._optimizer, self._optimizer.bit16_groups_flat
        # What it gathers after the update, and then makes views of for the parameters, which are views already.
        optimizer.bit16_groups_flat = []
        optimizer._update_model_bit16_weights = lambda number: None
        try:
            yield
        finally:
            optimizer.bit16_groups_flat = flats
            del optimizer._update_model_bit16_weights
        self._outdated = True

    @torch.no_grad()
    def _start(self) -> None:
        """Start all messages if there was an update. Collective."""
        if not self._outdated:
            return
        self._outdated = False
        for bucket in self._buckets:
            bucket.arriving = torch.empty_like(bucket.whole, dtype=torch.bfloat16) if bucket.rounded else bucket.whole
            own, updated = (flat.chunk(self._world_size)[self._rank] for flat in (bucket.arriving, bucket.whole))
            if bucket.rounded:
                own.copy_(updated)
            if self._world_size > 1:
                bucket.work = _all_gather(bucket.arriving, own, async_op=True)

    def _waiter(self, place: _Place) -> Callable[..., None]:
        """A function of any arguments that waits for the weights of ``place``."""
        needed = [bucket for bucket in self._buckets if place in bucket.places]

        def wait(*_: Any) -> None:
            for bucket in needed:
                _wait(bucket)

        return wait

    def _block_waiter(self, tower: int, num_blocks: int) -> Callable[[int], None]:
        waiters = [self._waiter((tower, block + 1)) for block in range(num_blocks)]
        return lambda block: waiters[block]()

    def finish(self) -> None:
        """Let all weights be those of the last update; on a GPU, to whatever is launched after this. Collective."""
        self._start()
        for bucket in self._buckets:
            _wait(bucket)


def _place_of(name: str, towers: Towers) -> _Place:
    tower = tower_of(name)
    assert tower is not None
    blocks = (towers.vision if tower == "vision" else towers.text).transformer.blocks
    return int(tower == "text"), depth_of(name, len(blocks))


@torch.no_grad()
def _wait(bucket: _Bucket) -> None:
    if bucket.arriving is None:
        return
    if bucket.work is not None:
        bucket.work.wait()
    if bucket.arriving is not bucket.whole:
        bucket.whole.copy_(bucket.arriving)
    bucket.arriving = bucket.work = None
