"""What each value of model.recompute keeps of a block and computes again, eagerly and compiled."""

from collections import Counter
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.fx import GraphModule
from torch.utils.flop_counter import FlopCounterMode

from mc2_hpc.models.layers import Recompute, Transformer

WIDTH, MLP, LAYERS, ROWS, LENGTH = 48, 120, 3, 2, 10
KINDS = tuple(Recompute)
POOLED = torch.tensor([3, LENGTH + 9])
"""The rows that the last block computes."""


def transformer(recompute: str, *, quick_gelu: bool = True) -> Transformer:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    stack = Transformer(WIDTH, LAYERS, 3, MLP, causal=True, quick_gelu=quick_gelu)
    stack.recompute = Recompute(recompute)
    return stack


def backward(stack: Transformer, *, bf16: bool = False) -> dict[str, Tensor]:
    """Gradients of a function of the outputs, by parameter; those of the inputs as ``x``."""
    x = torch.randn(ROWS, LENGTH, WIDTH, generator=torch.Generator().manual_seed(1), requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        y = stack(x, pooled_B=POOLED)
    y.square().sum().backward()
    assert x.grad is not None
    return {"x": x.grad, **{name: p.grad for name, p in stack.named_parameters() if p.grad is not None}}


def kept_bytes(stack: Transformer, *, bf16: bool = False) -> int:
    """Bytes of the activations that the graph of a forward pass holds, weights and their copies excluded."""
    storages: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.shape[:1] in ((ROWS,), (ROWS * LENGTH,)) and tensor is not POOLED:
            storages[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    x = torch.randn(ROWS, LENGTH, WIDTH, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            y = stack(x, pooled_B=POOLED)
    assert y.requires_grad  # the graph is alive, so no storage has been used twice
    return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("quick_gelu", [False, True], ids=["gelu", "quick_gelu"])
def test_gradients_are_equal_bit_for_bit(quick_gelu: bool, bf16: bool) -> None:
    expected = backward(transformer("none", quick_gelu=quick_gelu), bf16=bf16)
    assert len(expected) == 1 + 12 * LAYERS
    for recompute in ("selective", "full"):
        found = backward(transformer(recompute, quick_gelu=quick_gelu), bf16=bf16)
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            assert torch.equal(found[name], gradient), (recompute, name)


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_selective_keeps_results_of_products_alone(bf16: bool) -> None:
    """Per token: the residual stream before and between the two halves, qkv, attention with its log-sum-exp, and fc.
    Behind attention the last block has the pooled rows alone."""
    rows, size = ROWS * LENGTH, 2 if bf16 else 4
    residual, log_sum_exp = WIDTH * 4, 3 * 4
    to_attention, after = residual + log_sum_exp + (3 * WIDTH + WIDTH) * size, residual + MLP * size
    of_pooled = after + WIDTH * size  # their attention too, beside that of all rows
    selective = LAYERS * rows * to_attention + (LAYERS - 1) * rows * after + ROWS * of_pooled
    none, found, full = (kept_bytes(transformer(kind), bf16=bf16) for kind in KINDS)
    assert found == selective
    assert full == LAYERS * rows * WIDTH * 4
    assert full < found < 0.65 * none


def test_selective_computes_no_product_twice() -> None:
    """Backward takes two products for each of forward; full recompute repeats all but the last of each block."""
    flops = {}
    for kind in KINDS:
        with FlopCounterMode(display=False) as counter:
            backward(transformer(kind))
        flops[kind] = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        transformer("none")(torch.zeros(ROWS, LENGTH, WIDTH), pooled_B=POOLED)
    forward = counter.get_total_flops()
    last = 2 * ((LAYERS - 1) * ROWS * LENGTH + ROWS) * WIDTH * MLP
    assert flops[Recompute.NONE] == flops[Recompute.SELECTIVE]
    assert flops[Recompute.FULL] == flops[Recompute.NONE] + forward - last


@pytest.mark.parametrize("recompute", ["none", "selective"])
def test_compiled_blocks_compute_no_product_twice(recompute: str) -> None:
    """With inductor's partitioner: 4 products forward, 8 backward, attention once each; as little kept as eagerly.
    All blocks but the last share a graph."""
    calls: Counter[str] = Counter()

    def count(graph: GraphModule, inputs: object) -> Any:
        calls.update(getattr(node.target, "__name__", "").partition(".")[0] for node in graph.graph.nodes)
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=count, bw_compiler=count, partition_fn=min_cut_rematerialization_partition)
    torch._dynamo.reset()  # or graphs of other tests would count against its limit
    plain, compiled = transformer("none"), transformer(recompute)
    for block in compiled.blocks:
        block.compile(backend=backend)
    expected, found = backward(plain), backward(compiled)
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name
    products = calls["mm"] + calls["addmm"] + calls["bmm"]
    attention = [n for name, n in calls.items() if name.startswith("_scaled_dot_product")]
    assert (products, attention) == (24, [2, 2])
    if recompute == "selective":
        assert kept_bytes(compiled) == kept_bytes(transformer("selective"))


def test_without_gradients_nothing_is_kept() -> None:
    """As in the first pass of micro-batches and in evaluation."""
    x = torch.randn(ROWS, LENGTH, WIDTH, requires_grad=True)
    with torch.no_grad():
        outputs = [transformer(kind)(x, pooled_B=POOLED) for kind in KINDS]
    assert all(torch.equal(y, outputs[0]) and not y.requires_grad for y in outputs)


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match="'some' is not a valid Recompute"):
        transformer("some")
