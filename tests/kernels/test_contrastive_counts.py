"""What the loss asks of a device and of a network, counted in a group of 384 ranks that sends nothing."""

import itertools
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from mc2_hpc.kernels.contrastive import (
    EXCHANGES,
    Teacher,
    all_gather,
    contrastive_loss,
    distilled_contrastive_loss,
    shared_batch,
    sigmoid_loss,
)
from mc2_hpc.kernels.contrastive.dispatch import tile_factory
from mc2_hpc.kernels.contrastive.function import ContrastiveLoss, DistilledContrastiveLoss, Plan, SigmoidLoss
from mc2_hpc.kernels.contrastive.shared_batch import SharedBatch
from mc2_hpc.kernels.contrastive.teacher import Distillation

WIDTH = 8


class Operations(TorchDispatchMode):
    """Counts every operator that reaches a device, collectives included."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[str(func).rsplit(".", 1)[0]] += 1
        return func(*args, **(kwargs or {}))

    def collectives(self) -> Counter[str]:
        return Counter({name.removeprefix("c10d."): n for name, n in self.counts.items() if name.startswith("c10d.")})


@contextmanager
def silent_group(rank: int, size: int) -> Iterator[None]:
    """A default group whose other ranks do not exist: collectives return at once."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def count(
    rank: int,
    pairs: tuple[int, ...],
    exchange: str = "all_gather",
    *,
    given: bool = True,
    distilled: bool = False,
    sigmoid: bool = False,
) -> Operations:
    """The operators of one forward and backward pass on a rank; ``given``: the sizes are."""
    inputs = [torch.ones(pairs[rank], WIDTH, requires_grad=True) for _ in range(2)]
    options = {"exchange": exchange, "batches": pairs if given else None}
    teacher = Teacher(*(torch.ones(pairs[rank], WIDTH + 1) for _ in range(2)))

    def loss() -> torch.Tensor:
        if distilled:
            return distilled_contrastive_loss(*inputs, torch.tensor(1.0), teacher, **options)[0]
        if sigmoid:
            return sigmoid_loss(*inputs, torch.tensor(1.0), torch.tensor(-10.0), **options)
        return contrastive_loss(*inputs, torch.tensor(1.0), **options)

    with silent_group(rank, len(pairs)):
        loss()  # fills caches
        with Operations() as operations:
            loss().backward()
    return operations


@pytest.mark.parametrize("distilled", [False, True])
@pytest.mark.parametrize("uneven", [False, True])
def test_launches_of_all_gather_do_not_grow_with_the_ranks(uneven, distilled):
    few, many = (tuple(3 + (uneven and rank % 2) for rank in range(size)) for size in (4, 384))
    counted = [count(len(pairs) // 2, pairs, distilled=distilled) for pairs in (few, many)]
    assert counted[0].counts == counted[1].counts
    assert counted[1].counts.total() < (500 if distilled else 250)  # views included
    # Texts and each rank's part of the loss; maxima and sums of the columns; gradients.
    assert counted[1].collectives() == {"_allgather_base_": 2, "allreduce_": 2, "_reduce_scatter_base_": 1}


@pytest.mark.parametrize("uneven", [False, True])
def test_the_sigmoid_loss_sends_nothing_of_columns(uneven):
    few, many = (tuple(3 + (uneven and rank % 2) for rank in range(size)) for size in (4, 384))
    counted = [count(len(pairs) // 2, pairs, sigmoid=True) for pairs in (few, many)]
    assert counted[0].counts == counted[1].counts
    assert counted[1].collectives() == {"_allgather_base_": 2, "_reduce_scatter_base_": 1}
    # Forward a block 11 hops, backward also a result 12 hops.
    ring = count(5, (2,) * 12, "ring", sigmoid=True).collectives()
    assert ring["send"] == ring["recv_"] == 11 + (11 + 12)


def test_sizes_are_exchanged_only_where_they_are_not_given():
    assert count(1, (2,) * 4, given=False).collectives()["_allgather_base_"] == 3
    assert count(1, (2,) * 4).collectives()["_allgather_base_"] == 2


def test_the_ring_sends_to_its_neighbour_alone():
    found = count(5, (2,) * 12, "ring").collectives()
    assert set(found) == {"send", "recv_", "_allgather_base_"}
    # A block 11 hops and a result 12 hops, forward and backward; a block is two tensors in backward.
    assert found["send"] == found["recv_"] == (11 + 12) + (2 * 11 + 12)


@pytest.mark.parametrize("kind", ["softmax", "distilled", "sigmoid"])
@pytest.mark.parametrize("batches", [(3,) * 6, (3, 1, 0, 3, 2, 3)])
def test_nothing_is_read_by_the_host(batches, kind, monkeypatch):
    """On the device ``meta``, which has shapes without values, every such read is an error."""
    calls: Counter[str] = Counter()

    class Done:
        def wait(self) -> None:
            pass

    def collective(name: str):
        def call(*tensors: torch.Tensor, **_options) -> Done:
            assert all(tensor.is_contiguous() for tensor in tensors)
            calls[name] += 1
            return Done()

        return call

    monkeypatch.setattr(shared_batch, "_all_gather", collective("all_gather"))
    monkeypatch.setattr(shared_batch, "_reduce_scatter", collective("reduce_scatter"))
    monkeypatch.setattr(dist, "all_reduce", collective("all_reduce"))
    monkeypatch.setattr(torch, "autocast", lambda *_args, **_options: nullcontext())  # it does not know the device
    inputs = [torch.ones(3, WIDTH, device="meta", requires_grad=True) for _ in range(2)]
    scale = torch.tensor(1.0, device="meta", requires_grad=True)
    with pytest.raises(RuntimeError):
        float(scale.detach())
    shared = SharedBatch(None, 3, batches)
    if kind == "distilled":
        teacher = Teacher(*(torch.ones(3, WIDTH + 1, device="meta") for _ in range(2)))
        make_tiles = tile_factory("tiled", 1 << 16, Distillation.of(teacher, WIDTH))
        loss, _ = DistilledContrastiveLoss.apply(*inputs, scale, Plan(make_tiles, all_gather, shared), teacher)
    elif kind == "sigmoid":
        bias = torch.tensor(-10.0, device="meta", requires_grad=True)
        plan = Plan(tile_factory("tiled", 1 << 16, bias=bias.detach()), all_gather, shared)
        loss = SigmoidLoss.apply(*inputs, scale, bias, plan)
    else:
        loss = ContrastiveLoss.apply(*inputs, scale, Plan(tile_factory("tiled", 1 << 16), all_gather, shared))
    loss.backward()
    assert all(x.grad is not None and x.grad.shape == x.shape for x in (*inputs, scale))
    assert calls == {"all_gather": 2, "reduce_scatter": 1, **({} if kind == "sigmoid" else {"all_reduce": 2})}


@pytest.mark.parametrize("exchange, given", list(itertools.product(EXCHANGES, [(2, 2), (2, 2, 3), ()])))
def test_sizes_that_do_not_fit_get_one_line(exchange, given):
    features = torch.ones(2, WIDTH)
    with silent_group(2, 3), pytest.raises(ValueError, match="does not fit rank 2 of 3 with 2 pairs") as caught:
        contrastive_loss(features, features, torch.tensor(1.0), exchange=exchange, batches=given)
    assert "\n" not in str(caught.value)
