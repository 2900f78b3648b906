"""Filters by language, by lists of words, and by the sides of images."""

from pathlib import Path

import pyarrow as pa
import pytest

from mc2_hpc import filters, jobs
from mc2_hpc.curation.filtering.images import PoolImage
from mc2_hpc.curation.filters import parse_filter
from mc2_hpc.curation.match import plan_match
from mc2_hpc.errors import UserError
from mc2_hpc.filters import Aspect, Languages, Pattern, Size, Words
from mc2_hpc.jobs.named import Named
from tests.curation.image_server import encoded


def reasons(one, rows: list[tuple[str, str]]) -> list[str | None]:
    """What a filter answers for texts and languages."""
    columns = {"key": ["k"] * len(rows), "text": [text for text, _ in rows], "lang": [lang for _, lang in rows]}
    return one.drop_reasons(pa.table({name: pa.array(v, pa.large_string()) for name, v in columns.items()})).to_pylist()


def test_languages_are_kept_or_dropped_by_any_of_their_codes():
    rows = [("x", lang) for lang in ("en", "de", "zh-Hant-HK", "eng_Latn", "pt-BR", "", "??")]
    names = [None, "language", None, None, "language", "language", "language"]
    assert reasons(Languages(keep="en, zh"), rows) == names
    opposite = [None if name else "language" for name in names]
    assert reasons(Languages(drop="en,zh"), rows) == opposite
    assert reasons(Languages(keep="en"), []) == []


@pytest.mark.parametrize("code", ["en", "zh-Hant-HK", "eng_Latn", "tlh", "qaa", "other", "simple", "pt_BR.UTF-8"])
def test_every_code_of_a_language_is_accepted(code):
    """Also of one without a row in our table, for which a pool and metadata may have a code of their own."""
    assert reasons(Languages(keep=code), [("x", code)]) == [None]


def test_patterns_in_some_languages_alone():
    rows = [("eine Frau", "de"), ("eine Frau", "ger"), ("eine Frau", "en"), ("ein Mann", "de"), ("x", "")]
    assert reasons(Pattern(drop="Frau", languages="de,fr"), rows) == ["pattern", "pattern", None, None, None]
    assert reasons(Pattern(keep="Frau", languages="de"), rows) == [None, None, None, "pattern", None]
    with pytest.raises(UserError, match="'' is not the code of a language"):
        Pattern(drop="x", languages="de,")


@pytest.mark.parametrize("options", [{}, {"keep": "en", "drop": "de"}, {"keep": "en,,de"}, {"drop": "en,englsh"}])
def test_lists_of_languages_that_say_nothing(options):
    with pytest.raises(UserError, match="give either keep=|'(englsh)?' is not the code of a language; write"):
        Languages(**options)


@pytest.fixture
def lists(tmp_path) -> Path:
    """Word lists in three languages, one of them written without spaces."""
    folder = tmp_path / "lists"
    folder.mkdir()
    (folder / "en.txt").write_text("Darn\n\nbloody hell\ndarn\n", encoding="utf-8")
    (folder / "ja.txt").write_text("くそ\n", encoding="utf-8")
    (folder / "de.txt").write_text("Mist\nSTRASSE\n", encoding="utf-8")
    return folder


def test_words_of_each_language(lists):
    rows = {
        ("a DARN dog", "en"): True,
        ("“darn”, he said", "eng_Latn"): True,
        ("darned socks", "en"): False,
        ("bloody  hell!", "en"): True,
        ("bloody red", "en"): False,
        ("Mist", "en"): False,
        ("Mist am Morgen", "de"): True,
        ("die Straße", "de"): True,
        ("この犬はくそかわいい", "ja"): True,
        ("かわいい犬", "ja"): False,
        ("darn", "fr"): False,
        ("darn", ""): False,
    }
    expected = ["listed_word" if listed else None for listed in rows.values()]
    assert reasons(Words(lists=lists), list(rows)) == expected
    assert set(Words(lists=lists).sources()) == {"de.txt", "en.txt", "ja.txt"}


def test_one_list_for_every_language(lists):
    one = Words(lists=lists / "en.txt", reason="rude")
    assert reasons(one, [("darn", "en"), ("darn", "fr"), ("Darn!", ""), ("dog", "en")]) == [
        "rude",
        "rude",
        "rude",
        None,
    ]


def test_lists_that_cannot_be_used(tmp_path, monkeypatch, lists):
    (tmp_path / "empty").mkdir()
    for path in ("empty", "missing"):
        with pytest.raises(UserError, match=f"{path}: no file, and no folder of <lang>.txt files"):
            Words(lists=tmp_path / path)
    (lists / "notes.txt").write_text("read me")
    with pytest.raises(UserError, match="notes.txt: 'notes' is not the code of a language; name it <lang>.txt"):
        Words(lists=lists)
    (lists / "notes.txt").unlink()
    (tmp_path / "blank.txt").write_text("\n \n")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\n")
    for name, message in (("blank", "no list of words"), ("bytes", "is not UTF-8")):
        with pytest.raises(UserError, match=message):
            reasons(Words(lists=tmp_path / f"{name}.txt"), [("a", "en")])
    monkeypatch.chdir(lists)
    assert parse_filter(["mc2_hpc.filters.Words", "lists=."]).load().lists == lists


def test_matching_records_the_lists(make_pool, lists, tmp_path):
    pool = make_pool(1)
    words = Named("mc2_hpc.filters.Words", {"lists": str(lists)})
    (lists / "en.txt").write_text("cat\nBIG dog\n", encoding="utf-8")
    counters = jobs.run(plan_match(pool, tmp_path / "metadata", tmp_path / "out", filters=[words]))
    assert counters is not None and counters["drops"] == {"listed_word": 20}
    (lists / "en.txt").write_text("cat\n", encoding="utf-8")
    with pytest.raises(UserError, match="this folder was made with another filter_sources"):
        plan_match(pool, tmp_path / "metadata", tmp_path / "out", filters=[words])


def test_the_message_about_an_unknown_filter_names_all():
    with pytest.raises(UserError) as error:
        parse_filter(["Sizes"])
    assert all(name in str(error.value) for name in filters.__all__)


def test_sides():
    images = [PoolImage("k", "k.png", encoded("PNG", size=size)) for size in ((40, 20), (20, 40), (30, 30))]
    assert list(Size(least=1).scores(pa.table({}), images)) == [20, 20, 30]
    assert list(Aspect(most=3).scores(pa.table({}), images)) == [2, 2, 1]
    assert (Size(least=1).name, Aspect(most=1).name) == ("size", "aspect")
