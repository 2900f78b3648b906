"""Trains with a dense and a sharded token table on a job's ranks, and exchanges rows; writes what it found as JSON.

python -m torch.distributed.run --standalone --nproc-per-node 3 token_table_worker.py OUT STAGE ...
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mc2_hpc.config import RunConfig
from mc2_hpc.distributed import Ranks, process_group
from mc2_hpc.models.clip import build_clip
from mc2_hpc.models.presets import resolve
from mc2_hpc.training import row_adamw, row_exchange
from mc2_hpc.training.engine import MOMENTS, Engine
from mc2_hpc.training.row_exchange import RowExchange
from mc2_hpc.training.step import ContrastiveStep
from mc2_hpc.training.token_table import TABLE
from tests.training import zero_worker

STEPS = 3
"""Of each half of a run."""
VOCABULARY, USED = 100, 60
"""Token ids from ``USED`` on are in no batch."""
State = dict[tuple[str, str], Tensor]


class Saved:
    """A checkpoint's optimizer files, in memory."""

    def __init__(self, state: State) -> None:
        self._state = state

    def get(self, key: str) -> Tensor:
        name, _, kind = key.rpartition(".")
        return self._state[kind, name]


class Run:
    """A run with one kind of table, from the start or from the state that another run has saved after ``STEPS``."""

    def __init__(self, ranks: Ranks, config: RunConfig, saved: State | None = None) -> None:
        clip = build_clip(resolve(config.model), seed=0)
        if saved is not None:
            clip.load_state_dict({name: tensor for (kind, name), tensor in saved.items() if kind == "weight"})
        self.engine = Engine(clip, config, ranks, num_micro=2)
        if saved is not None:
            self.engine.load_moments(Saved(saved), STEPS)  # type: ignore[arg-type]
        self._step = ContrastiveStep(self.engine, config.loss, feature_dtype=torch.float32)
        self._rows = zero_worker.share(ranks)
        self.norms: list[float] = []

    def train(self, first: int, num_steps: int = STEPS) -> "Run":
        for images, tokens in zero_worker.batches()[first : first + num_steps]:
            result = self._step(images[self._rows], tokens[self._rows] % USED, lr=1e-3)
            self.norms.append(float(result.grad_norm))
        return self

    def state(self) -> State:
        return {(kind, name): tensor.clone() for kind, name, tensor in self.engine.state()}


def configured(stage: int, embedding: str) -> RunConfig:
    config = zero_worker.run_config(stage, optim={"lr": 1e-3, "grad_clip": 0.5})
    return dataclasses.replace(config, model=dataclasses.replace(config.model, embedding=embedding))


def furthest(found: State, expected: State) -> float:
    """Largest difference of any element of weights and moments."""
    assert found.keys() == expected.keys()
    return max(float((found[key] - expected[key]).abs().max()) for key in expected)


def compare(ranks: Ranks, stage: int) -> dict[str, Any]:
    """Two halves of a run with every pair of tables: how far each ends from the run that is dense throughout."""
    firsts, halves, ends, norms = {}, {}, {}, {}
    for kind in ("dense", "sharded"):
        run = Run(ranks, configured(stage, kind)).train(0, 1)
        firsts[kind] = run.state()
        halves[kind] = run.train(1, STEPS - 1).state()
        ends[kind, kind] = run.train(STEPS).state()
        norms[kind] = run.norms
        checks = reading(run.engine, ranks)
        run.engine.close()
    for first, second in (("dense", "sharded"), ("sharded", "dense")):
        run = Run(ranks, configured(stage, second), halves[first]).train(STEPS)
        ends[first, second] = run.state()
        run.engine.close()
    expected = ends["dense", "dense"]
    return {
        "differences": {f"{first} then {second}": furthest(end, expected) for (first, second), end in ends.items()},
        "first step": furthest(firsts["sharded"], firsts["dense"]),
        "norms": norms,
        **checks,
    }


def reading(engine: Engine, ranks: Ranks) -> dict[str, bool]:
    """Whether the whole table is on the rank that asks for it, and in the model that evaluation reads."""
    everywhere = {kind: tensor.clone() for kind, name, tensor in engine.state() if name == TABLE}
    receivers = {key: ranks.world_size - 1 for key in engine.state_names()}
    sent = {kind: tensor.clone() for kind, name, tensor in engine.state(receivers) if name == TABLE}
    expected_rows = VOCABULARY if ranks.rank == ranks.world_size - 1 else 0
    ids = torch.arange(VOCABULARY).view(2, 5, 10)
    with engine.whole_model() as model:
        looked_up = model.text.token_embedding(ids)
    return {
        "state on one rank": all(sent[kind].equal(everywhere[kind][:expected_rows]) for kind in ("weight", *MOMENTS))
        or engine._table is None,
        "whole model": looked_up.equal(everywhere["weight"].view(2, 5, 10, -1)),
    }


def exchange(ranks: Ranks, vocab_size: int) -> dict[str, bool]:
    """Rows and gradients of random ids, compared with sums written out in the order of ranks."""
    generator = torch.Generator().manual_seed(vocab_size)
    table = torch.randn(vocab_size, 16, generator=generator)
    ids = [torch.randint(0, vocab_size, (2, 3 + rank), generator=generator) for rank in range(ranks.world_size)]
    rows = RowExchange(vocab_size, ranks)
    own = rows.own_part(table)
    plan = rows.plan(ids[ranks.rank])
    fetched = rows.fetch(plan, own)
    by_id = {int(rows.layout.places(id)): id for id in torch.arange(vocab_size)}
    found_ids = torch.stack([by_id[int(place)] for place in plan.places_U])
    gradients = [torch.randn(vocab_size, 16, generator=generator) for _ in ids]
    means = rows.mean_gradients(plan, gradients[ranks.rank][found_ids])
    expected = torch.zeros_like(table)
    for rank_ids, gradient in zip(ids, gradients, strict=True):
        used = rank_ids.unique()
        expected[used] += gradient[used] / ranks.world_size
    return {
        f"{vocab_size}: fetched": fetched.equal(table[found_ids])
        and found_ids.sort().values.equal(ids[ranks.rank].unique()),
        f"{vocab_size}: summed": means.equal(rows.own_part(expected)[plan.touched_T]),
        f"{vocab_size}: gathered": rows.gather(own).equal(table),
    }


def main(out: Path, stages: list[int]) -> None:
    torch.set_num_threads(1)
    # Several blocks and slabs at the size of a test.
    row_adamw._BLOCK_BYTES["cpu"] = 4 * 48 * 8
    row_exchange._SLAB_BYTES = 4 * 48 * 20
    with process_group(timeout_s=120) as ranks:
        found = {
            "exchange": exchange(ranks, 7) | exchange(ranks, 300),
            "stages": {stage: compare(ranks, stage) for stage in stages},
        }
        (out / f"{ranks.rank}.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), [int(stage) for stage in sys.argv[2:]])
