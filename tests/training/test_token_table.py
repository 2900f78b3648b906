"""The sharded token table trains like the dense one: bit for bit on one rank, and with its state in the same files."""

import json

import pytest
import torch

from mc2_hpc.config import OptimConfig
from mc2_hpc.models.embedding import BatchEmbedding
from mc2_hpc.training import row_adamw
from mc2_hpc.training.row_adamw import RowAdamW
from mc2_hpc.training.row_exchange import Layout
from tests.training import token_table_worker as worker

STAGES_BY_RANKS = {1: [0, 1, 2, 3], 3: [1]}
# On one rank nothing may differ. On three, the last bit of a gradient may: DeepSpeed's all-reduce sums in an order of
# its own, the table's exchange in the order of ranks. Later steps amplify that, because AdamW divides small gradients
# by their own size.
MOST_AFTER_ONE_STEP, MOST = {1: 0.0, 3: 1e-6}, {1: 0.0, 3: 1e-5}


@pytest.fixture(scope="module")
def found(ranks_of, tmp_path_factory):
    """By number of ranks: what each rank found."""
    results = {}
    for ranks, stages in STAGES_BY_RANKS.items():
        out = tmp_path_factory.mktemp(f"table{ranks}")
        ranks_of(ranks, worker.__file__, out, *map(str, stages))
        results[ranks] = [json.loads((out / f"{rank}.json").read_text()) for rank in range(ranks)]
    return results


CASES = [(ranks, stage) for ranks, stages in STAGES_BY_RANKS.items() for stage in stages]


@pytest.mark.parametrize("ranks, stage", CASES)
def test_trains_and_resumes_like_the_dense_table(found, ranks, stage):
    """Weights and moments after six clipped steps in two micro-batches each, resumed with either kind of table."""
    for of_rank in found[ranks]:
        assert of_rank["stages"][str(stage)]["first step"] <= MOST_AFTER_ONE_STEP[ranks]
        differences = of_rank["stages"][str(stage)]["differences"]
        assert len(differences) == 4
        assert max(differences.values()) <= MOST[ranks], differences


@pytest.mark.parametrize("ranks, stage", CASES)
def test_the_norm_includes_the_table(found, ranks, stage):
    norms = found[ranks][0]["stages"][str(stage)]["norms"]
    assert norms["sharded"] == pytest.approx(norms["dense"], rel=1e-5 if ranks > 1 else 1e-15)
    assert min(norms["dense"]) > 0.5  # so that every step is clipped


@pytest.mark.parametrize("ranks, stage", CASES)
def test_the_whole_table_is_where_it_is_read(found, ranks, stage):
    for of_rank in found[ranks]:
        assert of_rank["stages"][str(stage)]["state on one rank"]
        assert of_rank["stages"][str(stage)]["whole model"]


@pytest.mark.parametrize("ranks", STAGES_BY_RANKS)
def test_rows_are_exchanged_and_summed_in_the_order_of_ranks(found, ranks):
    for rank, of_rank in enumerate(found[ranks]):
        assert len(of_rank["exchange"]) == 6
        assert all(of_rank["exchange"].values()), (rank, of_rank["exchange"])


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_every_row_has_a_place_of_its_own(world_size):
    layout = Layout(vocab_size=17, world_size=world_size)
    places = layout.places(torch.arange(17))
    assert len(places.unique()) == 17 and places.max() < world_size * layout.rows_per_rank
    owners = (places // layout.rows_per_rank).bincount(minlength=world_size)
    assert owners.max() - owners.min() <= 1


@pytest.mark.parametrize("width, eps", [(16, 1e-6), (48, 1e-6), (256, 1e-6), (16, 0.0)])
def test_the_update_is_that_of_a_dense_gradient(monkeypatch, width, eps):
    """Also for rows that only ever decay, for rows that get their first gradient late, and after resuming."""
    monkeypatch.setitem(row_adamw._BLOCK_BYTES, "cpu", 4 * width * 10)
    config = OptimConfig(eps=eps)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(95, width, generator=generator)
    dense = torch.nn.Parameter(weight.clone())
    optimizer = torch.optim.AdamW([dense], betas=(0.9, 0.95), eps=eps, weight_decay=0.1, fused=True)
    table = RowAdamW(weight.clone(), config, weight_decay=0.1)
    for step in range(30):
        if step == 20:
            saved = table.state
            table = RowAdamW(saved["weight"], config, weight_decay=0.1)
            for kind in ("exp_avg", "exp_avg_sq"):
                table.state[kind].copy_(saved[kind])
            table.resume(20)
        rows = torch.randint(0, 20 if step < 10 else 60, (8,), generator=generator).unique()
        gradient = torch.randn(len(rows), width, generator=generator)
        dense.grad = torch.zeros_like(dense).index_copy_(0, rows, gradient)
        optimizer.param_groups[0]["lr"] = lr = 1e-3 * (step + 1)
        optimizer.step()
        table.step(rows, rows, gradient, lr)
        expected = {"weight": dense.detach(), **optimizer.state[dense]}
        for kind, tensor in table.state.items():
            # As integers, because with eps 0 AdamW makes rows without a gradient NaN.
            assert tensor.view(torch.int32).equal(expected[kind].view(torch.int32)), (step, kind)


@pytest.mark.parametrize("shape", [(40,), (5, 8), (2, 4, 5)])
@pytest.mark.parametrize("world_size", [1, 3])
def test_the_embedding_equals_the_whole_tables(shape, world_size):
    layout = Layout(vocab_size=30, world_size=world_size)
    whole = torch.nn.Embedding(30, 16)
    ids = torch.randint(0, 20, shape, generator=torch.Generator().manual_seed(0))
    used = ids.unique()
    order = layout.places(used).argsort()
    rows = whole.weight.detach()[used[order]].requires_grad_()
    part = BatchEmbedding(layout.places)
    part.set_rows(layout.places(used)[order], rows)
    upstream = torch.randn(*shape, 16, generator=torch.Generator().manual_seed(1))
    expected, found = whole(ids), part(ids)
    assert found.equal(expected)
    expected.backward(upstream)
    found.backward(upstream)
    assert rows.grad.equal(whole.weight.grad[used[order]])
    for missing in (29, 20):
        with pytest.raises(ValueError, match="rows were not fetched"):
            part(torch.tensor([missing]))
    part.clear()
    with pytest.raises(AssertionError, match="set_rows was not called"):
        part(ids)
