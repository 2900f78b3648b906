"""The search alone: its rounds, what it combines, and that it ends with the fastest."""

import math

import pytest

from mc2_hpc.config import with_settings
from mc2_hpc.tuning.record import TrialResult
from mc2_hpc.tuning.search import TURNS, Search, rungs
from tests.tuning.conftest import WAITS

FACTORS = {
    ("model.recompute", "none"): 1.3,
    ("micro_batch", 0): 1.2,
    ("zero.stage", 0): 1.1,
    ("loss.backend", "reference"): 0.5,
}


@pytest.mark.parametrize("trials", range(1, 40))
def test_rounds_use_the_trials_and_halve(trials):
    sizes = rungs(trials)
    assert sum(sizes) == trials
    assert all(after == math.ceil(before / 2) for before, after in zip(sizes[1:], sizes[2:], strict=False))
    assert len(sizes) < 2 or sizes[1] <= max(2, math.ceil(sizes[0] / 2))
    assert (sizes[-1] == 2 and len(sizes) > 1) or trials < 4


def search(config, machine, *, trials, rate, that_fit=list):
    calls = []

    def measure(settings, steps, turns):
        calls.append((list(settings), steps, turns))
        return [result(each, steps, rate(each)) for each in settings]

    found = Search(config=config, machine=machine, that_fit=that_fit, measure=measure, trials=trials, steps=4)
    found.run({})
    return found, calls


def result(settings, steps, rate):
    status = rate if isinstance(rate, str) else "ok"
    return TrialResult(
        key=str((settings, steps)),
        settings=dict(settings),
        steps=steps,
        status=status,
        seconds=1.0,
        pairs_per_second=rate if status == "ok" else 0.0,
        waits=WAITS if status == "ok" else None,
    )


def product(settings):
    return 100 * math.prod(FACTORS.get(each, 0.99) for each in settings.items())


@pytest.fixture
def slow(config):
    return with_settings(config, {"model.recompute": "full", "micro_batch": 4, "data.workers": 1})


def test_gains_are_found_and_combined(slow, machine):
    found, calls = search(slow, machine, trials=12, rate=product)
    assert len(found.results) == 12 and sum(len(settings) for settings, *_ in calls) == 12
    assert {"model.recompute": "none", "micro_batch": 0}.items() <= found.best.settings.items()
    assert found.best.pairs_per_second == max(each.pairs_per_second for each in found.results)
    steps = [count for _, count, _ in calls]
    assert steps == sorted(steps) and steps[-1] == 4 * 2 ** (len(set(steps)) - 1)


def test_a_gain_within_the_noise_joins_the_combination(config, machine):
    factors = {("zero.stage", 0): 1.1, ("loss.backend", "reference"): 1.004}

    def rate(settings):
        return 100 * math.prod(factors.get(each, 0.99) for each in settings.items())

    found, _ = search(config, machine, trials=12, rate=rate)
    assert found.best.settings == {"zero.stage": 0, "loss.backend": "reference"}
    second = [each.settings for each in found.results if each.steps == 8]
    assert second[:2] == [{"zero.stage": 0, "loss.backend": "reference"}, {"zero.stage": 0}]


def test_the_last_two_are_measured_in_turn_and_one_is_as_given(slow, machine):
    found, calls = search(slow, machine, trials=8, rate=product)
    *before, (settings, _, turns) = calls
    assert [each[2] for each in before] == [1] * len(before) and turns == TURNS > 1
    assert settings == [found.best.settings, {}] and found.best.settings
    assert found.given.steps == found.best.steps


def test_what_only_seemed_faster_is_not_the_result(slow, machine):
    """Lucky trials of a few steps; in turn with the config as it is given, the gain is gone."""
    seen = []

    def rate(settings):
        seen.append(settings)
        return 101.5 if settings and seen.count(settings) == 1 else 100.0

    found, calls = search(slow, machine, trials=8, rate=rate)
    assert calls[-1][0][0] and found.best.settings == {}


def test_it_is_deterministic(slow, machine):
    once, again = (search(slow, machine, trials=10, rate=product)[1] for _ in range(2))
    assert once == again


def test_never_more_than_the_trials_it_may_use(slow, machine):
    for trials in range(1, 9):
        found, _ = search(slow, machine, trials=trials, rate=product)
        assert len(found.results) <= trials
        assert found.best is not None


def test_what_gains_nothing_is_left_as_it_is(config, machine):
    found, _ = search(config, machine, trials=10, rate=lambda settings: 100.0 if not settings else 100.5)
    assert found.best.settings == {}


def test_what_does_not_fit_is_not_tried(slow, machine):
    def without_wholes(settings):
        return [each for each in settings if each.get("micro_batch", 4) != 0]

    found, _ = search(slow, machine, trials=10, rate=product, that_fit=without_wholes)
    assert all(each.settings.get("micro_batch", 4) != 0 for each in found.results)


def test_failures_are_results_and_not_repeated(slow, machine):
    def rate(settings):
        if settings.get("model.recompute") == "none":
            return "out of memory"
        return "crash" if settings.get("data.workers") == 0 else product(settings)

    found, calls = search(slow, machine, trials=12, rate=rate)
    failed = [each for each in found.results if not each.ok]
    assert {each.status for each in failed} == {"out of memory", "crash"}
    assert all(steps == 4 for settings, steps, _ in calls for each in settings if each.get("data.workers") == 0)
    assert found.best.settings["micro_batch"] == 0


def test_a_config_that_runs_out_of_memory_gets_leaner(config, machine):
    def rate(settings):
        return "out of memory" if settings.get("model.recompute", "none") == "none" else product(settings)

    found, calls = search(config, machine, trials=6, rate=rate)
    assert calls[0] == ([{}], 4, 1) and calls[1] == ([{"model.recompute": "selective"}], 4, 1)
    assert found.given is None and found.best.settings["model.recompute"] != "none"


def test_without_time_there_is_no_best(config, machine):
    found = Search(config=config, machine=machine, that_fit=list, measure=lambda *_: [], trials=8, steps=4)
    found.run({})
    assert found.best is None and found.given is None
