"""Building metadata: order, caps, filters, the data card."""

import json

import pytest

from mc2_hpc.errors import UserError
from mc2_hpc.metadata.build import Caps, Sources, build_folder, build_metadata
from mc2_hpc.metadata.files import metadata_files, read_entries
from mc2_hpc.storage import file_sha256

ALL = Caps(unigram_share=1.0, bigram_share=1.0, title_share=1.0)


@pytest.fixture
def sources(tmp_path) -> Sources:
    (tmp_path / "wordnet.txt").write_text("hot_dog\ndog\n  \n!!\n7\n")
    (tmp_path / "corpus.txt").write_text("dog barks\ndog barks\nthe dog\nthe cat sat\n")
    (tmp_path / "titles.txt").write_text("Talk:Dog\t99\nSan_Marino\t5\ncat\t50\nAlps\t9\n" + "x" * 257 + "\t100\n")
    return Sources(wordnet=tmp_path / "wordnet.txt", corpus=(tmp_path / "corpus.txt",), titles=tmp_path / "titles.txt")


def test_order_and_first_source_wins(sources):
    entries, counts = build_metadata("en", sources, ALL)
    assert entries[:100] == [str(number) for number in range(100)]
    assert entries[100:102] == ["hot dog", "dog"]  # "7" is a number already, "!!" is no word
    assert entries[102:106] == ["barks", "the", "cat", "sat"]
    assert "dog barks" in entries[106:] and entries[-2:] == ["Alps", "San Marino"]  # by views; "cat" came earlier
    assert counts["numbers"] == 100 and counts["wordnet"] == 2 and counts["unigrams"] == 4 and counts["titles"] == 2
    assert sum(counts.values()) == len(entries) == len(set(entries))


def test_caps_count_new_entries_only(sources):
    caps = Caps(unigrams=2, unigram_share=1.0, bigrams=1, bigram_share=1.0, titles=1, title_share=1.0)
    entries, counts = build_metadata("en", sources, caps)
    assert (counts["unigrams"], counts["bigrams"], counts["titles"]) == (2, 1, 1)
    assert entries[102:104] == ["barks", "the"]  # "dog", the most frequent, is the wordnet's
    assert entries[-1] == "cat"  # most viewed, and not among the two unigrams


def test_shares_cap_too(sources):
    caps = Caps(unigram_share=0.4, bigram_share=0.5, title_share=0.34)
    _, counts = build_metadata("en", sources, caps)
    assert (counts["unigrams"], counts["bigrams"], counts["titles"]) == (2, 1, 1)  # of 5 words, 2 unigrams, 3 titles


def test_bigrams_of_unspaced_languages_are_joined_without_a_space(tmp_path):
    (tmp_path / "zh.txt").write_text("狗吠\n狗吠\n猫叫\n狗叫\n")
    entries, _ = build_metadata("zh", Sources(numbers=False, corpus=(tmp_path / "zh.txt",)), ALL)
    assert "狗吠" in entries and not any(" " in entry for entry in entries)


def test_plus_is_dropped_from_lemmas_where_the_wordnet_joins_with_it(tmp_path):
    (tmp_path / "w.txt").write_text("a+b\n")
    sources = Sources(numbers=False, wordnet=tmp_path / "w.txt")
    assert build_metadata("fr", sources)[0] == ["ab"]
    assert build_metadata("de", sources)[0] == ["a+b"]


def test_titles_without_views_keep_their_order(tmp_path):
    (tmp_path / "t.txt").write_text("b\na\n")
    sources = Sources(numbers=False, titles=tmp_path / "t.txt")
    assert build_metadata("en", sources, ALL)[0] == ["b", "a"]


def test_number_names():
    pytest.importorskip("num2words", reason="num2words is not installed")
    german, counts = build_metadata("de", Sources(number_names=True))
    assert german[142] == "zweiundvierzig" and counts["number_names"] == 100
    _, counts = build_metadata("ceb", Sources(number_names=True))  # num2words would take it for Chechen
    assert counts["number_names"] == 0


def test_same_inputs_same_bytes_and_a_card_with_hashes(sources, tmp_path):
    for name in ("one", "two"):
        build_folder({"en": sources, "de": Sources()}, tmp_path / name, ALL)
    for file in ("en.json", "de.json", "card.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    card = json.loads((tmp_path / "one" / "card.json").read_text())["languages"]
    assert card["en"]["sha256"] == file_sha256(tmp_path / "one" / "en.json")
    assert [file["name"] for file in card["en"]["files"]] == ["wordnet.txt", "corpus.txt", "titles.txt"]
    assert set(metadata_files(tmp_path / "one")) == {"de", "en"}
    assert read_entries(tmp_path / "one" / "en.json") == build_metadata("en", sources, ALL)[0]


def test_a_later_build_keeps_the_other_languages_in_the_card(tmp_path):
    build_folder({"en": Sources(), "de": Sources()}, tmp_path)
    (tmp_path / "de.json").unlink()
    build_folder({"fr": Sources()}, tmp_path)
    assert set(json.loads((tmp_path / "card.json").read_text())["languages"]) == {"en", "fr"}


@pytest.mark.parametrize("lang", ["../x", ".x", "card"])
def test_language_that_is_no_file_name(tmp_path, lang):
    with pytest.raises(UserError, match="not a name for a file"):
        build_folder({lang: Sources()}, tmp_path)


def test_nothing_to_build_from():
    with pytest.raises(UserError, match="no entries"):
        build_metadata("en", Sources(numbers=False))


def test_bad_views(tmp_path):
    (tmp_path / "t.txt").write_text("fine\t3\nDog\tmany\n")
    with pytest.raises(UserError, match="t.txt: line 2: 'many' is not a number of views"):
        build_metadata("en", Sources(titles=tmp_path / "t.txt"))


def test_bad_caps():
    with pytest.raises(UserError, match="unigram_share"):
        Caps(unigram_share=10)
    with pytest.raises(UserError, match="titles=-1"):
        Caps(titles=-1)


@pytest.mark.parametrize(
    "content, message",
    [
        ("{}", "must be a JSON list"),
        ("[]", "no entries"),
        ('["a", 1]', "entry 1 is 1"),
        ('["a", " "]', "entry 1 is blank"),
        ('["a", "b", "a"]', "entries 0 and 2 are both 'a'"),
        ('["a", "\\ud800"]', "entry 1 .* lone surrogate"),
        ("[", "not valid JSON"),
    ],
)
def test_bad_metadata_file_is_named(tmp_path, content, message):
    path = tmp_path / "xx.json"
    path.write_text(content)
    with pytest.raises(UserError, match=f"xx.json: .*{message}"):
        read_entries(path)


def test_missing_metadata_folder(tmp_path):
    with pytest.raises(UserError, match="no such metadata folder"):
        metadata_files(tmp_path / "none")
    with pytest.raises(UserError, match="no <language>.json"):
        metadata_files(tmp_path)
