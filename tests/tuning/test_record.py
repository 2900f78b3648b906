"""``trials.jsonl`` survives being read again, and says which line is damaged."""

import pytest

from mc2_hpc.errors import UserError
from mc2_hpc.tuning.record import TRIALS, Record, TrialResult, combined, run_hash, trial_key
from tests.tuning.conftest import WAITS


def result(key, **values):
    return TrialResult(key=key, settings={"micro_batch": 4}, steps=8, status="ok", seconds=1.5, waits=WAITS, **values)


def test_results_are_read_back(tmp_path):
    record = Record(tmp_path)
    record.add(result("a", pairs_per_second=3.5))
    record.add(TrialResult(key="b", settings={}, steps=8, status="crash", seconds=2.0, error="no\nsuch thing"))
    assert Record(tmp_path).results == record.results
    assert len((tmp_path / TRIALS).read_text().splitlines()) == 2


def test_a_damaged_line_is_named(tmp_path):
    Record(tmp_path).add(result("a"))
    with open(tmp_path / TRIALS, "a") as file:
        file.write('{"key": "b"}\n')
    with pytest.raises(UserError, match=r"trials.jsonl, line 2: .*'settings' is missing; delete the line"):
        Record(tmp_path)


def test_keys_depend_on_run_settings_steps_and_turn_alone():
    run, other = run_hash({"a": 1, "b": (2,)}), run_hash({"a": 2, "b": (2,)})
    assert run == run_hash({"b": [2], "a": 1})
    settings = ({}, {"micro_batch": 4})
    keys = {trial_key(r, s, n, turn) for r in (run, other) for s in settings for n in (4, 8) for turn in (0, 1)}
    assert len(keys) == 16
    assert trial_key(run, {"a": 1, "b": 2}, 4, 0) == trial_key(run, {"b": 2, "a": 1}, 4, 0)


def test_turns_are_one_result():
    turns = [
        result(str(rate), pairs_per_second=rate, slowest=rate - spread, fastest=rate + spread)
        for rate, spread in ((70.0, 1.0), (74.0, 3.0), (73.0, 9.0))
    ]
    found = combined(turns)
    assert (found.key, found.pairs_per_second, found.slowest, found.fastest) == ("73.0", 73.0, 64.0, 82.0)
    assert (found.turns, found.seconds, found.waits) == (3, 4.5, WAITS)
    assert combined(turns[:2]).pairs_per_second == 70.0 and combined(turns[:1]) == turns[0]
    failed = TrialResult(key="b", settings={"micro_batch": 4}, steps=8, status="crash", seconds=2.0, error="no")
    assert combined([*turns, failed]) == failed
