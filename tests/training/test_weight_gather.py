"""Weights gathered while the next forward pass runs: their values, and who waits for what."""

import json
from collections.abc import Iterable

import pytest
import torch
from safetensors.torch import load_file

from mc2_hpc.training.weight_gather import only_in_products
from tests.training import gather_worker as worker

pytestmark = pytest.mark.timeout(900)

CASES_BY_RANKS = {1: ["both"], 2: list(worker.CASES), 3: ["both_2"], 4: ["fp32", "both"]}
CASES = [(ranks, name) for ranks, names in CASES_BY_RANKS.items() for name in names]
ON_SEVERAL_RANKS = [case for case in CASES if case[0] > 1]


class Found:
    """What the ranks of a job wrote."""

    def __init__(self, folder):
        self._folder = folder
        self.rows = json.loads((folder / "found.json").read_text())

    def state(self, name, way):
        return load_file(self._folder / f"{name}.{way}.safetensors")


@pytest.fixture(scope="module")
def found(ranks_of, tmp_path_factory):
    """By number of ranks."""
    results = {}
    for ranks, names in CASES_BY_RANKS.items():
        folder = tmp_path_factory.mktemp(f"gather{ranks}")
        ranks_of(ranks, worker.__file__, folder, *names, timeout=600)
        results[ranks] = Found(folder)
    return results


def assert_same(state, expected):
    """Bit for bit, and numbers."""
    assert state.keys() == expected.keys()
    assert [key for key, value in expected.items() if not torch.equal(value, state[key])] == []
    assert all(bool(value.isfinite().all()) for value in expected.values())


@pytest.mark.parametrize("way", ["undisturbed", "resumed"])
@pytest.mark.parametrize("ranks, name", CASES)
def test_trains_as_with_deepspeeds_gather(found, ranks, name, way):
    """In fp32, at the end of its step. Masters, moments and average; in one go, and resumed after three of five
    steps."""
    assert_same(found[ranks].state(name, way), found[ranks].state(name, f"deepspeed.{worker.STEPS - 1}"))


@pytest.mark.parametrize("ranks, name", CASES)
def test_a_state_read_right_after_a_step_is_that_steps(found, ranks, name):
    for step in range(worker.STEPS):
        assert_same(found[ranks].state(name, f"read.{step}"), found[ranks].state(name, f"deepspeed.{step}"))


@pytest.mark.parametrize("ranks, name", CASES)
def test_evaluation_right_after_a_step_uses_that_steps_weights(found, ranks, name):
    used, state = (found[ranks].state(name, way) for way in ("used", "undisturbed"))
    rounds = worker.configured(name).zero.gather_dtype == "bf16"
    for key, value in used.items():
        master = state[f"weight/{key}"]
        assert torch.equal(value, master.bfloat16().float() if rounds and only_in_products(key) else master), key


@pytest.mark.parametrize("ranks, name", CASES)
def test_nothing_uses_weights_that_have_not_arrived(found, ranks, name):
    """They are NaN until someone waits for them, and are not sent before."""
    assert_same(found[ranks].state(name, "late"), found[ranks].state(name, f"deepspeed.{worker.STEPS - 1}"))


def user(name: str) -> str:
    """Which module's forward pass first uses a parameter, as the worker calls it."""
    tower, _, rest = name.partition(".")
    if rest.startswith("transformer."):
        return f"{tower}.blocks.{rest.split('.')[2]}"
    return f"{tower}.end" if rest.startswith(("norm_post", "norm_final", "projection")) else f"{tower}.start"


def first_user(names: Iterable[str], order: list[str]) -> str:
    return min((user(name) for name in names), key=order.index)


@pytest.mark.parametrize("ranks, name", ON_SEVERAL_RANKS)
def test_all_messages_are_in_flight_when_forward_begins_and_a_module_waits_for_its_own(found, ranks, name):
    row = found[ranks].rows[name]
    events, members = [tuple(event) for event in row["events"]], row["members"]
    num_buckets = len(members)
    assert events[:num_buckets] == [("starts", number) for number in range(num_buckets)]
    order = [f"{tower}.{place}" for tower in ("vision", "text") for place in ("start", "blocks.0", "blocks.1", "end")]
    assert [what for kind, what in events if kind == "runs"][: len(order)] == order
    waited: dict[str, list[int]] = {}
    since: list[int] = []
    for kind, what in events[num_buckets:]:
        if kind == "waits":
            since.append(what)
        elif since:
            waited[what], since = since, []
    assert not since  # nothing is left to wait for when the step ends
    expected: dict[str, list[int]] = {}
    for number, names in enumerate(members):
        expected.setdefault(first_user(names, order), []).append(number)
    assert waited == expected
    firsts = [order.index(first_user(names, order)) for names in members]
    assert firsts == sorted(firsts)  # sent in the order of their use
    if name != "muon":  # whose matrices, most of the model, are not DeepSpeed's
        assert num_buckets >= 20 and len(waited["vision.start"]) <= 3


def test_the_steps_of_micro_batches_gather_once(found):
    events = [tuple(event) for event in found[2].rows["both_2"]["events"]]
    assert sum(event == ("runs", "vision.start") for event in events) == 4
    assert sum(kind == "starts" for kind, _ in events) == len(found[2].rows["both_2"]["members"])
