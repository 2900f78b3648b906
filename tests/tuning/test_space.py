"""The settings that may be tuned: which, in which order, and what none of them touches."""

import dataclasses

import pytest

from mc2_hpc.config import RunConfig, config_to_dict, with_settings
from mc2_hpc.tuning.breakdown import Breakdown
from mc2_hpc.tuning.space import KEYS, combinations, fattest, is_valid, leaner, moves, shipped, text_of
from tests.tuning.conftest import WAITS

UNTOUCHED = ("global_batch", "precision", "seed", "optim", "freeze", "distill", "data.lanes", "data.seed", "data.train")


def test_nothing_that_changes_the_training_is_tuned():
    assert set(KEYS) == {
        "micro_batch",
        *(f"model.{name}" for name in ("recompute", "text_packing", "attention", "norm", "activation", "compile")),
        "model.embedding",
        *("loss.backend", "loss.exchange", "zero.stage", "zero.bucket_elements"),
        *("data.workers", "data.prefetch", "data.decode"),
    }
    assert not any(key == name or key.startswith(f"{name}.") for key in KEYS for name in UNTOUCHED)


def test_every_move_is_one_that_the_config_accepts(config, machine):
    gpu = dataclasses.replace(machine, device_type="cuda", has_triton=True, has_xformers=True, has_dali=True)
    slow = with_settings(
        config,
        {"model.recompute": "full", "micro_batch": 4, "data.decode": "pil", "data.workers": 1, "zero.stage": 3},
    )
    for where in (machine, gpu):
        found = moves(slow, where, WAITS)
        assert len(found) == len({tuple(move.items()) for move in found})
        assert all(is_valid(slow, move, where) for move in found)
        assert {"model.recompute": "none"} in found and {"micro_batch": 0} in found
        assert all(set(move) <= set(KEYS) for move in found)
    assert {"data.decode": "dali"} in moves(slow, gpu, WAITS) and {"data.decode": "turbo"} in moves(
        slow, machine, WAITS
    )


def test_only_what_this_machine_has_is_tried(config, machine):
    found = moves(config, machine, WAITS)
    values = {value for move in found for value in move.values()}
    assert not values & {"triton", "xformers", "dali", "apex"}
    assert {"model.compile": True} in found
    without = dataclasses.replace(machine, can_compile=False, ranks=1, ranks_per_node=1)
    keys = {key for move in moves(config, without, WAITS) for key in move}
    assert not keys & {"model.compile", "loss.exchange", "model.embedding", "zero.bucket_elements"}


@pytest.mark.parametrize(
    "cause, keys",
    [
        ("data", {"data.workers", "data.decode", "data.prefetch"}),
        ("network", {"zero.stage", "model.embedding", "loss.exchange", "zero.bucket_elements", "micro_batch"}),
    ],
)
def test_what_limits_the_step_comes_first(config, machine, cause, keys):
    waits = Breakdown(**{**dict.fromkeys(("data", "host", "compute", "network"), 0.05), cause: 0.85})
    slow = with_settings(config, {"data.decode": "pil", "data.workers": 1})
    first, second, *_ = moves(slow, machine, waits)
    assert {*first, *second} <= keys


def test_more_workers_stay_within_lanes_and_cores(config, machine):
    waits = Breakdown(data=1, host=0, compute=0, network=0)
    tried = [move["data.workers"] for move in moves(config, machine, waits) if "data.workers" in move]
    assert tried == [1]
    busy = with_settings(config, {"data.workers": 4})
    assert all(move.get("data.workers", 0) <= 4 for move in moves(busy, machine, waits))


def test_shipped_defaults_undo_everything_tuned(config, machine):
    changed = {"model.recompute": "full", "data.prefetch": 7, "zero.stage": 3, "micro_batch": 4}
    found = shipped(with_settings(config, changed), machine)
    standard = RunConfig()
    assert {key: found[key] for key in changed} == {
        "model.recompute": standard.model.recompute,
        "data.prefetch": standard.data.prefetch,
        "zero.stage": standard.zero.stage,
        "micro_batch": standard.micro_batch,
    }
    assert found["data.workers"] == 1  # of two cores per rank


def test_leaner_settings_end_in_small_passes(config, machine):
    found = leaner(config, machine)
    assert found[0] == {"model.recompute": "selective"}
    sizes = [each["micro_batch"] for each in found if "micro_batch" in each]
    assert sizes == [8, 4, 2] and found[-1]["zero.stage"] == 3
    large = with_settings(config, {"global_batch": 8 * 4096})
    last = leaner(large, machine)[-1]["micro_batch"]
    assert 4 * 4096 / last <= 8  # passes, because more take long to trace and save little


def test_a_config_that_excludes_a_stage_still_gets_leaner(config, machine):
    found = leaner(with_settings(config, {"zero.reduction": "scatter"}), machine)
    assert [each["micro_batch"] for each in found if "micro_batch" in each] == [8, 4, 2]
    assert {each.get("zero.stage", 1) for each in found} <= {1, 2}


def test_stage_3_is_leaner_than_compiled_blocks(config, machine):
    """Which configs refuse together."""
    found = leaner(with_settings(config, {"model.compile": True}), machine)
    assert found[-1]["zero.stage"] == 3 and found[-1]["model.compile"] is False


def test_the_fattest_settings_are_a_config(config, machine):
    for each in fattest(machine):
        assert config_to_dict(with_settings(config, each))["micro_batch"] == 0


def test_gains_are_combined_best_first_without_a_second_value_of_a_setting():
    gains = [
        ({"zero.stage": 0}, 1.1),
        ({"zero.stage": 2}, 1.3),
        ({"data.workers": 1}, 1.2),
        ({"loss.exchange": "x"}, 1.02),
    ]
    all_of_them = {"zero.stage": 2, "data.workers": 1, "loss.exchange": "x"}
    assert combinations(gains) == [all_of_them, {"zero.stage": 2, "data.workers": 1}, {"zero.stage": 2}]
    assert combinations([]) == []


def test_settings_as_words():
    assert text_of({"b.c": True, "a": 0}) == ["a=0", "b.c=true"]
