"""The proposed English threshold, alone and through ``--t-en auto``."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mc2_hpc import jobs
from mc2_hpc.balancing.thresholds import proposed_threshold, threshold_to_mass
from mc2_hpc.cli import main
from mc2_hpc.curation.balance import plan_balance
from mc2_hpc.curation.match import plan_match
from mc2_hpc.curation.propose import propose
from mc2_hpc.errors import UserError
from mc2_hpc.storage import file_sha256


@given(st.lists(st.integers(0, 60), min_size=1, max_size=40).filter(any), st.sampled_from([0.0, 0.06, 0.25, 0.5, 1.0]))
def test_no_other_threshold_comes_closer(values, p):
    counts = np.array(values, np.uint64)
    t = proposed_threshold(counts, p)
    distance = abs(threshold_to_mass(counts, t) - p)
    others = [abs(threshold_to_mass(counts, int(other)) - p) for other in set(values) if other]
    assert distance == pytest.approx(min(others))


def test_examples():
    """Of 100 matches, 6 belong to entries counted fewer than 24 times; where most entries matched once, it is 1."""
    assert proposed_threshold(np.array([1, 2, 3, 24, 30, 40, 0], np.uint64)) == 24
    assert proposed_threshold(np.array([1] * 900 + [50] * 10, np.uint64)) == 1
    with pytest.raises(UserError, match="must be in"):
        proposed_threshold(np.array([1], np.uint64), 2)


@pytest.fixture
def matched(make_pool, tmp_path):
    jobs.run(plan_match(make_pool(3), tmp_path / "metadata", tmp_path / "matched"))
    return tmp_path / "matched"


def test_outcomes_are_those_of_balancing(matched, tmp_path):
    outcomes = propose(matched, tmp_path / "metadata")
    assert [one.t_en for one in outcomes] == sorted({one.t_en for one in outcomes})
    for one in outcomes:
        report = jobs.run(plan_balance(matched, tmp_path / "metadata", tmp_path / f"{one.t_en}", one.t_en))
        english = report["languages"]["en"]
        assert report["p"] == one.tail_mass and english["expected_texts"] == pytest.approx(one.expected_texts)
        assert (english["texts"], english["entries_head"], english["entries_matched"]) == (
            one.texts,
            one.entries_head,
            one.entries_matched,
        )


def test_auto_takes_the_proposal(matched, tmp_path, capsys):
    words = ["--metadata", str(tmp_path / "metadata")]
    assert main(["curate", "thresholds", str(matched), *words, "--json", str(tmp_path / "t.json")]) == 0
    first = json.loads((tmp_path / "t.json").read_text())[0]
    assert f"--t-en {first['t_en']} (or auto)" in capsys.readouterr().out
    assert main(["curate", "balance", str(matched), *words, "--t-en", "auto", "--out", str(tmp_path / "b")]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["t_en"], report["p"]) == (first["t_en"], first["tail_mass"])
    assert main(["curate", "balance", str(matched), *words, "--t-en", "some", "--out", str(tmp_path / "c")]) == 2
    assert "--t-en some: must be a whole number" in capsys.readouterr().err


def test_the_metadata_is_that_of_matching(matched, tmp_path):
    path = tmp_path / "metadata" / "en.json"
    assert {one.metadata_sha256 for one in propose(matched, tmp_path / "metadata")} == {file_sha256(path)}
    path.write_text(json.dumps([*json.loads(path.read_text()), "another entry"]))
    with pytest.raises(UserError, match="metadata: not the metadata .*matched was matched with; name that one"):
        propose(matched, tmp_path / "metadata")


def test_a_pool_without_english(matched, tmp_path):
    (tmp_path / "metadata" / "en.json").unlink()
    with pytest.raises(UserError, match="no en.json; the threshold is that of English"):
        propose(matched, tmp_path / "metadata")
