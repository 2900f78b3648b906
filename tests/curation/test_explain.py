"""An explanation agrees with what the stages did to the same caption, and says why a caption was left out."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mc2_hpc import jobs
from mc2_hpc.cli import main
from mc2_hpc.curation.balance import plan_balance
from mc2_hpc.curation.explain import explain
from mc2_hpc.curation.match import plan_match
from mc2_hpc.curation.matched import read_matched
from mc2_hpc.curation.sample import plan_sample
from mc2_hpc.errors import UserError
from mc2_hpc.reading.json_file import ANYTHING, read_json
from mc2_hpc.shard_paths import list_shards
from mc2_hpc.storage import write_json

ENTRIES = {
    "en": ["dog", "big dog", "cat", "U.S.", "Zebra", "zebra crossing"],
    "ja": ["犬", "カメラ"],
    "it": ["cane"],  # the pool has no caption in it
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A curated pool: metadata, matched, balance."""
    folder = tmp_path_factory.mktemp("curated")
    for lang, entries in ENTRIES.items():
        write_json(folder / "metadata" / f"{lang}.json", entries)
    rows = [(f"k{n:03d}", "a big dog" if n % 4 == 0 else f"a dog, {n}", "en") for n in range(300)]
    rows += [(f"k{n:03d}", "a cat of the U.S.", "en") for n in range(0, 300, 15)]
    rows += [(f"j{n:03d}", "新しいカメラ", "ja") for n in range(10)]
    key, text, lang = zip(*rows, strict=True)
    (folder / "pool").mkdir()
    pq.write_table(pa.table({"key": key, "text": text, "lang": lang}), folder / "pool" / "0.parquet")
    jobs.run(plan_match(folder / "pool", folder / "metadata", folder / "matched"))
    jobs.run(plan_balance(folder / "matched", folder / "metadata", folder / "balance", 20))
    return folder


def curated(folder: Path) -> dict[str, Path]:
    return {"metadata": folder / "metadata", "matched": folder / "matched", "balance": folder / "balance"}


def test_agrees_with_the_stages(folder, tmp_path):
    jobs.run(plan_sample(folder / "matched", folder / "balance", tmp_path / "sample", seed=5, epoch=2))
    kept = {(row["key"], row["text"]) for row in rows_of(tmp_path / "sample")}
    verdicts = []
    for row in rows_of(folder / "matched")[:150]:
        told = explain(row["text"], **curated(folder), lang=row["lang"], key=row["key"], seed=5, epoch=2)
        assert [match.id for match in told.matches] == row["entries"]
        assert all(ENTRIES["en"][match.id] == match.entry for match in told.matches)
        if int(row["key"][1:]) % 15:  # the other images have two texts, one of which is drawn
            assert told.kept == ((row["key"], row["text"]) in kept)
            verdicts.append(told.kept)
    assert 10 < sum(verdicts) < 140


def rows_of(matched: Path) -> list[dict]:
    return [row for path in list_shards(matched, ".parquet") for row in read_matched(path).to_pylist()]


def test_counts_probabilities_and_places(folder):
    told = explain("dog  and a big dog", **curated(folder), lang="en")
    assert told.spaced_text == " dog and a big dog "
    dog, big_dog = told.matches
    assert (dog.entry, dog.id, dog.pattern, dog.at) == ("dog", 0, " dog ", [0, 14])
    assert (big_dog.entry, big_dog.at) == ("big dog", [10])
    assert (dog.count, big_dog.count) == (300, 75)
    assert dog.probability == pytest.approx(20 / 300) and big_dog.probability == pytest.approx(20 / 75)
    assert dog.part == big_dog.part == "head" and told.threshold == 20
    assert told.keep_probability == pytest.approx(1 - (1 - 20 / 300) * (1 - 20 / 75))
    assert told.draw is None and told.kept is None and told.drop_reason is None
    assert explain("dog dog", **curated(folder), lang="en").matches[0].at == [
        0,
        4,
    ]  # matches share a space


def test_the_tail_is_kept_whatever_the_draw(folder):
    told = explain("the U.S. dog", **curated(folder), lang="en")
    assert told.keep_probability == 1 and told.kept is True
    assert told.matches[1].count == told.threshold == 20  # a count at the threshold is still tail
    assert {match.entry: match.part for match in told.matches} == {"dog": "head", "U.S.": "tail"}


def test_without_balance_only_matches(folder):
    told = explain("a cat", folder / "metadata", lang="en")
    assert [(match.entry, match.count, match.probability) for match in told.matches] == [("cat", None, None)]
    assert told.mode == "fixed" and told.keep_probability is told.kept is told.threshold is None


def test_language_is_identified_where_not_given(folder):
    class Identifier:
        name = "always Japanese"

        def identify(self, texts):
            return ["ja"] * len(texts)

    told = explain("カメラ", folder / "metadata", identifier=Identifier())
    assert (told.lang, told.lang_from, [match.id for match in told.matches]) == ("ja", "always Japanese", [1])


@pytest.mark.parametrize(
    ("caption", "lang", "mode", "reason", "near"),
    [
        ("the U.S. flag", "en", "compat", "no_match", [("U.S.", "matches by the rules of mode fixed")]),
        ("DOG", "en", "fixed", "no_match", [("dog", "would match if case were ignored")]),
        ("a zebra", "en", "fixed", "no_match", [("Zebra", "would match if case were ignored")]),
        ("hotdogs", "en", "fixed", "no_match", [("dog", "is inside a longer word")]),
        ("nothing", "en", "fixed", "no_match", []),
        ("a dog", "xx", "fixed", "language_unknown", []),
        (" \t", "en", "fixed", "caption_empty", []),
    ],
)
def test_why_a_caption_is_dropped(folder, caption, lang, mode, reason, near):
    told = explain(caption, folder / "metadata", lang=lang, mode=mode)
    assert told.drop_reason == reason and told.kept is False and told.matches == []
    assert [(miss.entry, miss.reason) for miss in told.near_misses] == near


def test_drop_reasons_are_those_of_match(folder, tmp_path):
    captions = {"k0": ("hotdogs", "en"), "k1": ("a dog", "xx"), "k2": (" \t", "en"), "k3": ("a dog", "en")}
    table = {
        "key": list(captions),
        "text": [c for c, _ in captions.values()],
        "lang": [x for _, x in captions.values()],
    }
    (tmp_path / "pool").mkdir()
    pq.write_table(pa.table(table), tmp_path / "pool" / "0.parquet")
    drops = jobs.run(plan_match(tmp_path / "pool", folder / "metadata", tmp_path / "matched"))["drops"]
    told = [explain(caption, folder / "metadata", lang=lang).drop_reason for caption, lang in captions.values()]
    assert sorted(drops) == sorted(reason for reason in told if reason) and told[3] is None


def test_mode_of_the_folders_counts(folder, tmp_path):
    jobs.run(plan_match(folder / "pool", folder / "metadata", tmp_path / "compat", "compat"))
    assert explain("the U.S.", folder / "metadata", matched=tmp_path / "compat", lang="en").mode == "compat"
    with pytest.raises(UserError, match="was made in mode compat, not fixed"):
        explain("the U.S.", folder / "metadata", matched=tmp_path / "compat", mode="fixed", lang="en")
    with pytest.raises(UserError, match="was made in mode fixed, not compat"):
        explain("the U.S.", folder / "metadata", matched=tmp_path / "compat", balance=folder / "balance", lang="en")


def test_foreign_metadata_is_refused(folder, tmp_path):
    write_json(tmp_path / "metadata" / "en.json", ["cat", "dog"])
    for name in ("matched", "balance"):
        with pytest.raises(UserError, match=f"en.json: not the metadata .*{name} was made with"):
            explain("a dog", tmp_path / "metadata", **{name: folder / name}, lang="en")
    with pytest.raises(UserError, match="not a matched pool"):
        explain("a dog", tmp_path / "metadata", matched=tmp_path, lang="en")


def test_a_language_that_the_pool_does_not_have(folder):
    assert explain("un cane", folder / "metadata", lang="it").matches
    with pytest.raises(UserError, match="no threshold for 'it'"):
        explain("un cane", **curated(folder), lang="it")


def test_a_caption_that_is_not_utf8(folder):
    with pytest.raises(UserError, match="not valid UTF-8"):
        explain("a dog \udcff", folder / "metadata", lang="en")


def test_command(folder, capsys):
    flags = [word for name, path in curated(folder).items() for word in (f"--{name}", str(path))]
    assert main(["curate", "explain", "a big dog [x]", "--lang", "en", *flags, "--key", "k001"]) == 0
    shown = capsys.readouterr().out
    assert "language en, mode fixed" in shown and "·a·big·dog·[·x·]·" in shown
    assert "·big·dog·" in shown and "75" in shown and "0.267" in shown and "(t = 20), draw 0." in shown
    assert main(["curate", "explain", "hotdogs", "--lang", "en", *flags]) == 0
    shown = capsys.readouterr().out
    assert "near: 'dog' (entry 0) is inside a longer word" in shown and "dropped: no_match" in shown
    assert main(["curate", "explain", "a dog", "--lang", "en", *flags, "--json", "-"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["matches"][0]["count"] == 300 and told["kept"] is None
    assert main(["curate", "explain", "a dog", "--lang", "en", "--metadata", flags[1], "--key", "k"]) == 2
    assert "--balance" in capsys.readouterr().err


def test_saved_tables_are_used(folder, monkeypatch):
    """With a matched pool, no tables are built for one caption."""
    from mc2_hpc.curation.matching.matcher import Matcher

    monkeypatch.setattr(Matcher, "build", lambda *_: pytest.fail("built tables that were saved"))
    assert read_json(folder / "matched" / "match.json", ANYTHING)["mode"] == "fixed"
    assert explain("a dog", folder / "metadata", matched=folder / "matched", lang="en").matches
