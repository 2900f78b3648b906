"""Sums of which every rank gets a piece: what their messages and roundings make of them, bit for bit."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.training import exchange_worker as worker

PAGE = Path(__file__).parents[2] / "docs" / "step.md"


def exchanged(parts, per_node):
    """The sum of (N, ...) parts in bf16: exactly within a node, rounded if there are others, and exactly over nodes."""
    of_nodes = parts.float().unflatten(0, (-1, per_node)).sum(1)
    return (of_nodes.bfloat16() if 1 < per_node < len(parts) else of_nodes).float().sum(0)


def ring(parts):
    """The sum of (N, ...) parts in bf16, rounded at every rank."""
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    return total.float()


@pytest.fixture(scope="module")
def pieces(ranks_of, tmp_path_factory):
    """By rank."""
    folder = tmp_path_factory.mktemp("exchange")
    ranks_of(worker.RANKS, worker.__file__, folder)
    return [load_file(folder / f"rank{rank}.safetensors") for rank in range(worker.RANKS)]


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("per_node", worker.PLACEMENTS)
def test_a_rank_gets_the_sum_of_its_piece(pieces, per_node, number):
    parts = torch.stack([worker.part(rank, number).bfloat16() for rank in range(worker.RANKS)])
    found = torch.cat([own[f"{per_node}.{number}"] for own in pieces])
    assert found.dtype == torch.float32 and torch.equal(found, exchanged(parts, per_node))


def test_a_reduce_scatter_sums_in_fp32(pieces):
    parts = torch.stack([worker.part(rank, 0) for rank in range(worker.RANKS)])
    torch.testing.assert_close(torch.cat([own["fp32"] for own in pieces]), parts.sum(0), rtol=1e-6, atol=1e-6)


def rounding(summed, parts):
    """Per cent of the norm of the exact sum of parts that are in fp64."""
    exact = parts.sum(0)
    return 100 * float((summed(parts.bfloat16()).double() - exact).norm() / exact.norm())


def test_the_page_has_what_rounding_costs():
    """By number of ranks: of a ring and of the exchange on nodes of 8, for independent parts and for equal ones."""
    rows = re.findall(r"^\| (\d+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", PAGE.read_text(), re.MULTILINE)
    assert [int(ranks) for ranks, *_ in rows] == [8, 64, 384]
    generator = torch.Generator().manual_seed(0)
    for ranks, *cells in rows:
        parts = torch.randn(int(ranks), 20_000, generator=generator, dtype=torch.float64)
        equal = parts[:1].expand_as(parts)
        costs = [
            rounding(summed, each)
            for each in (parts, equal)
            for summed in (ring, lambda summands: exchanged(summands, per_node=8))
        ]
        assert costs == pytest.approx([float(cell) for cell in cells], rel=0.05, abs=0.006), ranks
