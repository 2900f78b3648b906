"""Building metadata: order, caps, filters, merging, failures, the data card."""

import bz2
import dataclasses
import gzip
import json
import os

import pytest

from mc2_hpc.errors import UserError
from mc2_hpc.metadata import counting
from mc2_hpc.metadata.build import Caps, build_folder, build_metadata
from mc2_hpc.metadata.files import metadata_files, read_entries
from mc2_hpc.metadata.shortfalls import shortfalls
from mc2_hpc.metadata.sources import Sources, find_sources
from mc2_hpc.metadata.workers import Workers
from mc2_hpc.storage import file_sha256

ALL = Caps(unigram_share=1.0, bigram_share=1.0, title_share=1.0)


@pytest.fixture
def sources(tmp_path) -> Sources:
    (tmp_path / "wordnet.txt").write_text("hot_dog\ndog\n  \n!!\n7\n")
    (tmp_path / "corpus.txt").write_text("dog barks\ndog barks\nthe dog\nthe cat sat\n")
    (tmp_path / "titles.txt").write_text("Talk:Dog\t99\nSan_Marino\t5\ncat\t50\nAlps\t9\n" + "x" * 257 + "\t100\n")
    return Sources(
        wordnet=(tmp_path / "wordnet.txt",), corpus=(tmp_path / "corpus.txt",), titles=tmp_path / "titles.txt"
    )


def dump(path, articles):
    pages = "".join(
        f"<page><title>{number}</title><ns>0</ns><revision><text>{text}</text></revision></page>"
        for number, text in enumerate(articles)
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bz2.compress(f'<mediawiki xmlns="x">{pages}</mediawiki>'.encode()))


def hour(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode()))


def test_order_and_first_source_wins(sources):
    entries, counts = build_metadata("en", sources, ALL)
    assert entries[:100] == [str(number) for number in range(100)]
    assert entries[100:102] == ["hot dog", "dog"]  # "7" is already a number, "!!" is not a word
    assert entries[102:106] == ["barks", "the", "cat", "sat"]
    assert "dog barks" in entries[106:] and entries[-2:] == ["Alps", "San Marino"]  # by views; "cat" was added earlier
    assert counts["numbers"] == 100 and counts["wordnet"] == 2 and counts["unigrams"] == 4 and counts["titles"] == 2
    assert sum(counts.values()) == len(entries) == len(set(entries))


def test_caps_count_new_entries_only(sources):
    caps = Caps(unigrams=2, unigram_share=1.0, bigrams=1, bigram_share=1.0, titles=1, title_share=1.0)
    entries, counts = build_metadata("en", sources, caps)
    assert (counts["unigrams"], counts["bigrams"], counts["titles"]) == (2, 1, 1)
    assert entries[102:104] == ["barks", "the"]  # "dog", the most frequent, is the wordnet's
    assert entries[-1] == "cat"  # most viewed, but not among the two unigrams


def test_shares_cap_too(sources):
    caps = Caps(unigram_share=0.4, bigram_share=0.5, title_share=0.34)
    _, counts = build_metadata("en", sources, caps)
    assert (counts["unigrams"], counts["bigrams"], counts["titles"]) == (2, 1, 1)  # of 5 words, 2 unigrams, 3 titles


def test_bigrams_of_unspaced_languages_are_joined_without_a_space_except_between_other_scripts(tmp_path):
    (tmp_path / "zh.txt").write_text("狗吠\nNew York\n的的的的\n")
    entries, _ = build_metadata(
        "zh", Sources(numbers=False, corpus=(tmp_path / "zh.txt",)), ALL, segmenter="characters"
    )
    assert {"狗吠", "New York"} <= set(entries)
    assert [entry for entry in entries if " " in entry] == ["New York"]


def test_plus_is_dropped_from_lemmas_where_the_wordnet_joins_with_it(tmp_path):
    (tmp_path / "w.txt").write_text("a+b\n")
    sources = Sources(numbers=False, wordnet=(tmp_path / "w.txt",))
    assert build_metadata("fr", sources)[0] == ["ab"]
    assert build_metadata("de", sources)[0] == ["a+b"]


def test_the_first_english_lists_minimums(tmp_path):
    (tmp_path / "corpus.txt").write_text("new york\n" * 4 + "the dog\n" + "the cat the owl\n" * 9)
    (tmp_path / "titles.txt").write_text("Alps\t70\nDog\t69\nunranked\n")
    sources = Sources(numbers=False, corpus=(tmp_path / "corpus.txt",), titles=tmp_path / "titles.txt")
    caps = Caps(
        unigram_share=1, bigram_share=1, title_share=1, unigram_min_count=4, bigram_min_pmi=3, title_min_views=70
    )
    # PMI of "new york" in bits: log2(4 * 46 / (4 * 4)) = 3.52
    entries, _ = build_metadata("en", sources, caps)
    assert entries == ["the", "cat", "owl", "new", "york", "new york", "Alps", "unranked"]
    assert "new york" not in build_metadata("en", sources, dataclasses.replace(caps, bigram_min_pmi=3.6))[0]
    assert build_metadata("en", Sources(numbers=False), caps, views={"Alps": 70, "Dog": 69})[0] == ["Alps"]
    with pytest.raises(UserError, match="bigram_min_pmi=nan"):
        Caps(bigram_min_pmi=float("nan"))


def test_what_languages_lacked_is_told(world, tmp_path):
    (world / "wordnet" / "wn-data-heb.tab").write_text("1-n\tlemma\t[[כלב]]\n2-n\tlemma\t[edytuj]\n")
    (world / "zu").mkdir()
    card = build_world(world, tmp_path / "out")
    parts = {code: facts for row in card["languages"].values() for code, facts in row["wikipedias"].items()}
    assert parts["he"]["lacks"] == ["corpus", "titles"] and parts["sw"]["lacks"] == ["wordnet"]
    assert parts["en"]["lacks"] == [] and parts["zu"]["lacks"] == ["wordnet", "corpus", "titles"]
    assert parts["he"]["lemmas"] == {"cleaned": 1, "refused": 1, "examples": ["[edytuj]"]}
    assert read_entries(tmp_path / "out" / "he.json")[100:] == ["כלב"]
    assert shortfalls(card, card["languages"]) == [
        "no wordnet: 4 of 6 (simple, sw, zh_yue, zu)",
        "no corpus: 2 of 6 (he, zu)",
        "no titles: 2 of 6 (he, zu)",
        "he: markup in the wordnet: 1 lemmas cleaned, 1 refused ('[edytuj]')",
        "warning: only the digits 0-99 in 1 of 5 languages (zu): too little text, or no file is named as "
        "docs/metadata.md says",
    ]
    assert shortfalls(card, ["en"]) == ["no wordnet: 1 of 2 (simple)"]


def test_entries_of_nothing_but_marks_are_left_out(tmp_path):
    (tmp_path / "w.txt").write_text("\u200e\nـ\nَ\n\u200d!\nقلم\n")
    assert build_metadata("ar", Sources(numbers=False, wordnet=(tmp_path / "w.txt",)))[0] == ["قلم"]


def test_titles_without_views_keep_their_order(tmp_path):
    (tmp_path / "t.txt").write_text("b\na\n")
    sources = Sources(numbers=False, titles=tmp_path / "t.txt")
    assert build_metadata("en", sources, ALL)[0] == ["b", "a"]


def test_number_names():
    pytest.importorskip("num2words", reason="num2words is not installed")
    german, counts = build_metadata("de", Sources(number_names=True))
    assert german[142] == "zweiundvierzig" and counts["number_names"] == 100
    _, counts = build_metadata("ceb", Sources(number_names=True))  # num2words would treat it as Chechen
    assert counts["number_names"] == 0


def test_entries_taken_as_they_are(tmp_path):
    (tmp_path / "en").mkdir()
    (tmp_path / "en" / "metadata.json").write_text('["b", "a", "!"]')
    hour(tmp_path / "pageviews" / "pageviews-1.gz", "en Dog 99 0\n")
    card = build_folder(find_sources(tmp_path), tmp_path / "out", ALL)["languages"]["en"]
    assert read_entries(tmp_path / "out" / "en.json") == ["b", "a", "!"]
    assert card["wikipedias"]["en"]["by_source"] == {"ready": 3}
    assert card["wikipedias"]["en"]["files"][0]["name"] == "metadata.json"


@pytest.fixture
def world(tmp_path):
    """A folder of sources for four Wikipedias, two of which share a curation language."""
    folder = tmp_path / "world"
    dump(folder / "en" / "enwiki-20240501-pages-articles.xml.bz2", ["The '''red house''' {{x}} [[sky|skies]]"] * 30)
    dump(folder / "simple" / "simplewiki-20240501-pages-articles.xml.bz2", ["A red kite and a red house"] * 9)
    dump(folder / "zh_yue" / "zh_yuewiki-20240501-pages-articles.xml.bz2", ["香港", "的的的"] * 9)
    (folder / "sw").mkdir()
    (folder / "sw" / "corpus.txt").write_text("mbwa mweusi\nna na na\n" * 9)
    (folder / "wordnet").mkdir()
    (folder / "wordnet" / "wn-data-eng.tab").write_text("1-n\tlemma\tkite\n")
    views = "en Berlin 90 0\nen.m Rome 95 0\nsimple Kite_flying 70 0\nsw Kenya 60 0\nzh-yue 港島 66 0\n"
    hour(folder / "pageviews" / "pageviews-20240501-120000.gz", views)
    return folder


def build_world(world, out, **options):
    return build_folder(find_sources(world), out, ALL, segmenters={"zh_yue": "characters"}, **options)


def test_wikipedias_of_one_curation_language_become_one_file(world, tmp_path):
    card = build_world(world, tmp_path / "out")["languages"]
    assert set(metadata_files(tmp_path / "out")) == set(card) == {"en", "sw", "zh_yue"}
    entries = read_entries(tmp_path / "out" / "en.json")
    assert entries[100] == "kite" and entries.index("Rome") < entries.index("Berlin") < entries.index("and")
    assert entries[-1] == "Kite flying" and "x" not in entries and "skies" in entries
    parts = card["en"]["wikipedias"]
    assert list(parts) == ["en", "simple"] and parts["simple"]["by_source"]["titles"] == 1
    assert parts["en"]["segmenter"] == {"name": "spaces", "versions": {}}
    assert parts["en"]["pageviews"]["files"] == 1 and card["en"]["versions"]["unicode"]
    assert {"mbwa mweusi", "Kenya"} <= set(read_entries(tmp_path / "out" / "sw.json"))
    assert {"香港", "港島"} <= set(read_entries(tmp_path / "out" / "zh_yue.json"))


def test_same_bytes_twice_and_on_two_processes(world, tmp_path, monkeypatch):
    monkeypatch.setattr(counting, "_BATCH_CHARS", 100)
    for name, workers in (("one", 1), ("two", 2)):
        build_world(world, tmp_path / name, workers=workers)
    monkeypatch.undo()
    build_world(world, tmp_path / "again")
    for file in ("en.json", "sw.json", "zh_yue.json", "card.json"):
        one = (tmp_path / "one" / file).read_bytes()
        assert one == (tmp_path / "two" / file).read_bytes() == (tmp_path / "again" / file).read_bytes(), file


def test_unknown_to_language_id_goes_to_other_only_when_asked(tmp_path):
    requests = {"tw": Sources(), "de": Sources()}
    build_folder(requests, tmp_path / "own")
    build_folder(requests, tmp_path / "merged", merge_unknown=True)
    assert set(metadata_files(tmp_path / "own")) == {"de", "tw"}
    assert set(metadata_files(tmp_path / "merged")) == {"de", "other"}


def test_a_broken_language_is_named_and_the_others_are_built(world, tmp_path):
    broken = world / "sw" / "swwiki-20240501-pages-articles.xml.bz2"
    broken.write_bytes(b"no dump")
    (world / "ja").mkdir()
    (world / "ja" / "corpus.txt").write_bytes("東京".encode("shift_jis"))
    with pytest.raises(UserError) as error:
        build_world(world, tmp_path / "out", workers=2)
    message = str(error.value)
    assert message.startswith("2 of 4 languages failed, the others are built: ja: ") and "\n" not in message
    assert "corpus.txt: line 1 is not UTF-8" in message or "fugashi" in message
    assert f"sw: {broken}: cannot be read" in message
    assert set(json.loads((tmp_path / "out" / "card.json").read_text())["languages"]) == {"en", "zh_yue"}


def test_a_language_without_spaces_needs_its_segmenter(tmp_path):
    for lang in ("shn", "de"):
        (tmp_path / "sources" / lang).mkdir(parents=True)
        (tmp_path / "sources" / lang / "corpus.txt").write_text("ၵႂၢမ်းတႆး\n")
    sources = find_sources(tmp_path / "sources")
    with pytest.raises(UserError, match="shn: Shan is written without spaces .*--segmenter shn=characters"):
        build_folder(sources, tmp_path / "out")
    assert set(metadata_files(tmp_path / "out")) == {"de"}
    build_folder(sources, tmp_path / "out", segmenters={"shn": "characters"})
    assert set(metadata_files(tmp_path / "out")) == {"de", "shn"}


def test_progress_is_told(world, tmp_path):
    seen = []
    build_world(world, tmp_path / "out", progress=lambda *report: seen.append(report))
    assert [report for report in seen if report[0] == "metadata"] == [
        ("metadata", 1, 3, "en"),
        ("metadata", 2, 3, "sw"),
        ("metadata", 3, 3, "zh_yue"),
    ]
    assert ("page views", 1, 1, "pageviews-20240501-120000.gz") in seen
    assert [report[1:3] for report in seen if report[0] == "texts"] == [(30, 0), (39, 0), (57, 0), (75, 0)]


def test_a_card_with_hashes(sources, tmp_path):
    build_folder({"en": sources, "de": Sources()}, tmp_path / "one", ALL)
    card = json.loads((tmp_path / "one" / "card.json").read_text())["languages"]
    assert card["en"]["sha256"] == file_sha256(tmp_path / "one" / "en.json")
    files = card["en"]["wikipedias"]["en"]["files"]
    assert [file["name"] for file in files] == ["wordnet.txt", "corpus.txt", "titles.txt"]
    assert files[0]["sha256"] == file_sha256(tmp_path / "wordnet.txt")
    assert read_entries(tmp_path / "one" / "en.json") == build_metadata("en", sources, ALL)[0]


def test_a_later_build_keeps_the_other_languages_in_the_card(tmp_path):
    build_folder({"en": Sources(), "de": Sources()}, tmp_path)
    (tmp_path / "de.json").unlink()
    build_folder({"fr": Sources()}, tmp_path)
    assert set(json.loads((tmp_path / "card.json").read_text())["languages"]) == {"en", "fr"}


@pytest.mark.parametrize("lang", ["../x", ".x", "card"])
def test_language_that_is_no_file_name(tmp_path, lang):
    with pytest.raises(UserError, match="cannot be a file name"):
        build_folder({lang: Sources()}, tmp_path)


def test_nothing_to_build_from():
    with pytest.raises(UserError, match="no entries"):
        build_metadata("en", Sources(numbers=False))


def test_bad_views(tmp_path):
    (tmp_path / "t.txt").write_text("fine\t3\nDog\tmany\n")
    with pytest.raises(UserError, match="t.txt: line 2: 'many' is not a number of views"):
        build_metadata("en", Sources(titles=tmp_path / "t.txt"))


def test_bad_caps_and_workers():
    with pytest.raises(UserError, match="unigram_share"):
        Caps(unigram_share=10)
    with pytest.raises(UserError, match="titles=-1"):
        Caps(titles=-1)
    with pytest.raises(UserError, match="workers=0"):
        Workers(0)


@pytest.mark.parametrize(
    "content, message",
    [
        ("{}", r"not metadata, a list of texts: \$: expected a list, found an object"),
        ("[]", "no entries"),
        ('["a", 1]', r"\$\[1\]: expected text, found a whole number"),
        ('["a", " "]', "entry 1 is blank"),
        ('["a", "b", "a"]', "entries 0 and 2 are both 'a'"),
        ('["a", "\\ud800"]', r"\$\[1\]: has a lone surrogate"),
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


def test_languages_whose_files_must_not_even_be_hashed(tmp_path):
    os.mkfifo(tmp_path / "de.json")
    with pytest.raises(UserError, match="de.json: is a named pipe"):
        metadata_files(tmp_path)
    (tmp_path / "de.json").unlink()
    with open(tmp_path / "de.json", "wb") as file:
        file.truncate(64 << 30)
    with pytest.raises(UserError, match="de.json: larger than 1,073,741,824 bytes"):
        metadata_files(tmp_path)
