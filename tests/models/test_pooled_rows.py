"""The last block computes the pooled rows alone, and nothing else changes."""

import pytest
import torch
from torch import Tensor

from mc2_hpc.models.layers import Transformer
from mc2_hpc.models.packed_captions import pack
from mc2_hpc.models.rows import take_rows

WIDTH, LAYERS, ROWS, LENGTH = 24, 2, 3, 5


def run(stack: Transformer, x: Tensor, rows: Tensor, kept: Tensor, lengths: list[int] | None) -> dict[str, Tensor]:
    """``kept`` of the results of ``rows``, and the gradients of a function of them."""
    stack.zero_grad()
    x = x.clone().requires_grad_()
    packing = pack(lengths, LENGTH, torch.device("cpu")) if lengths is not None else None
    y = stack(x, packing, pooled_B=rows)[kept]
    (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    assert x.grad is not None
    return {"y": y.detach(), "x": x.grad, **{name: p.grad for name, p in stack.named_parameters()}}


@pytest.mark.parametrize("causal, lengths", [(False, None), (True, None), (True, [2, 5, 1])])
def test_results_and_gradients_are_those_of_all_rows(causal: bool, lengths: list[int] | None) -> None:
    torch.manual_seed(0)
    stack = Transformer(WIDTH, LAYERS, 2, 64, causal=causal, quick_gelu=True).double()
    total = sum(lengths) if lengths is not None else ROWS * LENGTH
    x = torch.randn((total, WIDTH) if lengths is not None else (ROWS, LENGTH, WIDTH), dtype=torch.float64)
    rows = torch.tensor([0, 4, total - 1])
    expected = run(stack, x, torch.arange(total), rows, lengths)
    found = run(stack, x, rows, torch.arange(len(rows)), lengths)
    assert found.keys() == expected.keys() and len(found) == 2 + 12 * LAYERS
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-12, atol=1e-12, msg=name)


def test_only_the_last_block_has_fewer_rows() -> None:
    stack = Transformer(WIDTH, LAYERS, 2, 64, causal=False, quick_gelu=True)
    seen: dict[str, list[torch.Size]] = {"qkv": [], "out": [], "fc": []}
    for block in stack.blocks:
        for name, layer in (("qkv", block.attention.qkv), ("out", block.attention.out), ("fc", block.fc)):
            layer.register_forward_hook(lambda _, inputs, __, name=name: seen[name].append(inputs[0].shape[:-1]))
    stack(torch.zeros(ROWS, LENGTH, WIDTH), pooled_B=torch.tensor([0, 5, 10]))
    assert seen == {"qkv": [(3, 5), (3, 5)], "out": [(3, 5), (3,)], "fc": [(3, 5), (3,)]}


def test_the_gradient_of_rows_is_that_of_a_look_up() -> None:
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    rows = torch.tensor([5, 0])
    assert torch.equal(take_rows(x, rows), x.detach().view(6, 4)[rows])
    assert torch.autograd.gradcheck(lambda each: take_rows(each, rows), (x,))
