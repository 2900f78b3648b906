"""Curated shards and tokenizers of a row: their contents, and that the same settings are processed only once."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from mc2_hpc.ablation import prepare
from mc2_hpc.ablation.addresses import address, content
from mc2_hpc.ablation.settings import CurationSettings, DataPaths, TokenizerSettings
from mc2_hpc.balancing.thresholds import entry_probabilities
from mc2_hpc.errors import UserError
from mc2_hpc.shard_paths import list_shards


@pytest.fixture
def make(data, tmp_path):
    """``make(**settings)``: the curated folder for these settings."""
    paths = DataPaths(pool=str(data / "pool"), metadata=str(data / "metadata"))
    pool, metadata = content(data / "pool"), content(data / "metadata")

    def curate(**settings):
        chosen = CurationSettings(**{"t_en": 5, **settings})
        made = prepare.curate(chosen, paths, pool, metadata, tmp_path / "out")
        return made, prepare.english_share(chosen, made.path)

    return curate


def texts(folder):
    """(language, text) of every row of the shards."""
    rows = [pq.read_table(path).to_pylist() for path in list_shards(folder.path / "shards", ".parquet")]
    return {(row["lang"], row["text"]) for shard in rows for row in shard}


def report(folder):
    return json.loads((folder.path / "balance" / "balance.json").read_text(encoding="utf-8"))


def test_the_recipe_and_one_threshold_for_all(make):
    recipe, recipe_share = make()
    same, same_share = make(thresholds="same")
    assert texts(recipe) == texts(same) and {lang for lang, _ in texts(recipe)} == {"en", "de", "fr"}
    assert not any("IMG" in text for _, text in texts(recipe))
    t = report(recipe)["t"]
    assert t["en"] == 5 and t["de"] < 5
    assert report(same)["t"] == {"en": 5, "de": 5, "fr": 5}
    expected = {}
    for lang in t:
        counts = np.load(same.path / "balance" / "counts" / f"{lang}.npy")
        assert np.array_equal(counts, np.load(recipe.path / "balance" / "counts" / f"{lang}.npy"))
        probs = np.load(same.path / "balance" / "probs" / f"{lang}.npy")
        assert np.array_equal(probs, entry_probabilities(counts, 5))
        expected[lang] = float((counts * probs.astype(float)).sum())  # each caption here has one entry
        row = report(same)["languages"][lang]
        assert row["expected_texts"] == pytest.approx(expected[lang]) and row["entries_head"] == (counts > 5).sum()
    assert same_share == pytest.approx(expected["en"] / sum(expected.values())) and same_share < recipe_share
    assert report(same)["english_share_after"] == pytest.approx(same_share)
    assert recipe_share == pytest.approx(report(recipe)["english_share_after"])


def test_some_languages_keep_the_thresholds_of_all(make):
    everything, _ = make()
    english, share = make(languages=["en"])
    others, none = make(languages=["de", "fr"])
    assert (share, none) == (1.0, 0.0)
    assert texts(english) | texts(others) == texts(everything) and not texts(english) & texts(others)
    assert {lang for lang, _ in texts(others)} == {"de", "fr"}
    assert report(others)["t"] == report(english)["t"] == report(everything)["t"]
    with pytest.raises(UserError, match="no caption in language 'xx'; there are de, en, fr"):
        make(languages=["xx"])


def test_one_metadata_for_all_texts(make, data):
    everything, _ = make()
    merged, share = make(metadata="merged")
    english, _ = make(metadata="english")
    assert share is None
    assert {text for _, text in texts(merged)} == {text for _, text in texts(everything)}
    assert {lang for lang, _ in texts(merged)} == {"en"} and report(merged)["languages"]["en"]["entries"] == 12
    assert {text for _, text in texts(english)} == {text for lang, text in texts(everything) if lang == "en"}


def test_the_same_settings_are_curated_once(make, monkeypatch):
    first, _ = make(languages=["en"])
    monkeypatch.setattr(prepare, "plan_match", lambda *_: pytest.fail("curated again"))
    assert make(languages=["en"])[0] == first
    with pytest.raises(pytest.fail.Exception, match="curated again"):
        make(languages=["de"])


def test_half_curated_is_finished_to_the_same_bytes(make, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(prepare, "plan_pack", stop)
        make(languages=["de"], thresholds="same")
    half, _ = make(languages=["de"], thresholds="same")
    whole, _ = make(languages=["de"], thresholds="same", t_en=5)
    assert half == whole and texts(half) and {lang for lang, _ in texts(half)} == {"de"}


def test_a_tokenizer_is_trained_once_on_all_captions(data, tmp_path, monkeypatch):
    paths = DataPaths(pool=str(data / "pool"), metadata=str(data / "metadata"))
    sizes = {}
    for style in ("xlmv", "mt5", "gemma"):
        settings = TokenizerSettings(style=style, vocab_size=400)
        sizes[style] = prepare.tokenize(settings, paths, "pool", tmp_path)
    assert len({made.address for made in sizes.values()}) == 3
    assert [sizes[style].eos_id for style in ("xlmv", "mt5", "gemma")] == [2, 1, 1]
    monkeypatch.setattr(prepare, "train_tokenizer", lambda *_, **__: pytest.fail("trained again"))
    assert prepare.tokenize(TokenizerSettings(style="xlmv", vocab_size=400), paths, "pool", tmp_path) == sizes["xlmv"]
    with pytest.raises(pytest.fail.Exception, match="trained again"):
        prepare.tokenize(TokenizerSettings(style="xlmv", vocab_size=400), paths, "another pool", tmp_path)


def test_addresses_follow_content_not_place(data, tmp_path):
    (tmp_path / "a" / "in").mkdir(parents=True)
    (tmp_path / "a" / "in" / "x").write_text("1")
    (tmp_path / "b" / "in").mkdir(parents=True)
    (tmp_path / "b" / "in" / "x").write_text("1")
    assert content(tmp_path / "a") == content(tmp_path / "b")
    (tmp_path / "b" / ".lock").write_text("hidden")
    assert content(tmp_path / "a") == content(tmp_path / "b")
    (tmp_path / "b" / "in" / "x").write_text("2")
    assert content(tmp_path / "a") != content(tmp_path / "b")
    (tmp_path / "a" / "in" / "x").rename(tmp_path / "a" / "in" / "y")
    assert content(tmp_path / "a") != content(tmp_path / "b")
    with pytest.raises(UserError, match="no such file or folder"):
        content(tmp_path / "c")
    assert address(a=1, b=[2]) == address(b=[2], a=1) != address(a=1, b=[3])
