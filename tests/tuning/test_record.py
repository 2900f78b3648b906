"""``trials.jsonl`` survives being read again, and says which line is damaged."""

import pytest

from mc2_hpc.errors import UserError
from mc2_hpc.tuning.record import TRIALS, Record, TrialResult, run_hash, trial_key
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


def test_keys_depend_on_run_settings_and_steps_alone():
    run, other = run_hash({"a": 1, "b": (2,)}), run_hash({"a": 2, "b": (2,)})
    assert run == run_hash({"b": [2], "a": 1})
    keys = {trial_key(r, s, n) for r in (run, other) for s in ({}, {"micro_batch": 4}) for n in (4, 8)}
    assert len(keys) == 8
    assert trial_key(run, {"a": 1, "b": 2}, 4) == trial_key(run, {"b": 2, "a": 1}, 4)
