"""The curation benchmarks: their inputs, their peer, what they derive from rows, and that they run."""

import numpy as np
import pyarrow as pa
import pytest

from benchmarks import bench_curation
from benchmarks import curation_corpus as corpora
from benchmarks import peer_release_curation as peer
from benchmarks import scale_curation as scale
from mc2_hpc.curation.matching.matcher import Matcher


def test_the_corpus_is_the_same_at_every_call(tmp_path):
    one, other = (corpora.english(2000, 500, data=tmp_path / "none") for _ in range(2))
    assert one == other and one.source == "generated"
    assert len(one.entries) == len(set(one.entries)) == 2000 and len(one.captions) == 500
    assert corpora.spaceless(300, 40) == corpora.spaceless(300, 40)


def test_the_peer_finds_what_the_matcher_finds(tmp_path):
    for corpus in (corpora.english(2000, 500, data=tmp_path / "none"), corpora.spaceless(500, 100)):
        offsets, ids = Matcher.build(corpus.entries, "compat").match(corpus.captions)
        theirs = peer.match_captions(corpus.captions, peer.build_automaton(corpus.entries))
        assert [sorted(found) for found in theirs] == [
            ids[start:stop].tolist() for start, stop in zip(offsets, offsets[1:], strict=False)
        ]
        assert len(ids) > len(corpus.captions)


def test_ratios_are_ours_over_the_peers():
    rates = {
        ("stage 1", "ours"): 800,
        ("stage 1", "release"): 100,
        ("sampling", "ours"): 3000,
        ("sampling", "release"): 150,
        ("matcher", "ours"): 9,
        ("matcher", "pyahocorasick"): 3,
        ("spaceless matcher", "ours"): 8,
        ("spaceless matcher", "pyahocorasick"): 2,
    }
    rows = [{"what": what, "who": who, "median": rate} for (what, who), rate in rates.items()]
    assert bench_curation.ratios([*rows, {"what": "tables", "who": "fixed"}]) == {
        "match_vs_release": 8,
        "sample_vs_release": 20,
        "matcher_vs_pyahocorasick": 3,
        "spaceless_vs_pyahocorasick": 4,
    }


def test_scale_is_extrapolated_from_the_steady_part():
    match = [
        {"stage": "match", "captions": millions * 10**6, "seconds": 20 + millions, "private_mb": mb}
        for millions, mb in ((1, 90), (2, 100), (3, 100), (5, 110))
    ]
    rows = [*match, {"stage": "balance", "captions": 10**6, "seconds": 3.6}]
    by = {row["extrapolated"]: row for row in scale.extrapolate(rows, workers=2)}
    assert by["match"]["core_hours"] == pytest.approx(2 * 1e10 / 1e6 / 3600)
    assert by["balance"]["core_hours"] == pytest.approx(2 * 1e4 * 3.6 / 3600)
    assert scale.ratios(rows) == pytest.approx({"second_half_vs_first_half": 1.0, "end_vs_middle_memory": 1.1})


def test_captions_for_scale_are_those_of_their_seed():
    words = pa.array([f"w{n}" for n in range(1000)])
    one, other = (scale.draw_captions(np.random.default_rng(3), words, 200) for _ in range(2))
    assert one == other and len(one) == 200
    assert all(len(text.split(" ")) == scale.WORDS for text in one.to_pylist())
    spaceless = scale.draw_captions(np.random.default_rng(3), pa.array(["一", "丁"]), 1).to_pylist()
    assert len(spaceless[0]) == scale.WORDS


@pytest.mark.slow
@pytest.mark.parametrize("benchmark", [bench_curation, scale], ids=["bench_curation", "scale_curation"])
def test_it_runs(benchmark):
    result = benchmark.run(quick=True)
    assert result["rows"] and all(value > 0 for value in result["ratios"].values())
