"""Lemmas of each wordnet format."""

import gzip
from pathlib import Path

import pytest

from mc2_hpc.errors import UserError
from mc2_hpc.metadata.wordnet import WNDB_FILES, read_lemmas, wordnet_files

LICENCE = "  1 This software and database is being provided to you ...  \n"
NOUN = "00001740 03 n 01 entity 0 003 ~ 00001930 n 0000 | that which is perceived  \n"
HOT_DOG = "07697537 13 n 02 Hot_Dog 0 hotdog 0 001 @ 07695965 n 0000 | a frankfurter  \n"
ADJECTIVE = "00014490 00 a 01 galore(ip) 0 001 & 00013887 a 0000 | in great numbers  \n"

TAB = """\
# Albanet\tals\thttp://fjalnet.com/\tCC BY 3.0
00001740-n\tals:lemma\tentitet
00001740-n\tals:def\t0\tajo që është
00001740-n\tals:exe\t0\tshembull
00002084-n\tlemma\tqen_gjahu
00002084-n\tals:lemma:root\trr
"""

LMF = """\
<?xml version="1.0" encoding="UTF-8"?>
<LexicalResource><Lexicon id="x" language="sv">
<LexicalEntry id="a"><Lemma writtenForm="hund" partOfSpeech="n"/><Sense id="s" synset="t"/></LexicalEntry>
<LexicalEntry id="b"><Lemma writtenForm="varm_korv" partOfSpeech="n"/><Form writtenForm="nej"/></LexicalEntry>
<Synset id="t"><Definition>ett djur</Definition></Synset>
</Lexicon></LexicalResource>
"""


def test_word_list(tmp_path):
    (tmp_path / "wordnet.txt").write_text("hot_dog\na+b\n")
    assert list(read_lemmas("de", tmp_path / "wordnet.txt")) == ["hot dog", "a+b"]
    for lang in ("fr", "ja", "zh"):
        assert list(read_lemmas(lang, tmp_path / "wordnet.txt")) == ["hot dog", "ab"]


@pytest.mark.parametrize("packed", [False, True])
def test_tab(tmp_path, packed):
    path = tmp_path / ("wn-data-als.tab" + ".gz" * packed)
    path.write_bytes(gzip.compress(TAB.encode()) if packed else TAB.encode())
    assert list(read_lemmas("sq", path)) == ["entitet", "qen gjahu"]


def test_albanian_is_not_alemannic(tmp_path):
    (tmp_path / "wn-data-als.tab").write_text(TAB)
    with pytest.raises(UserError, match="the wordnet of Albanian; move it to the folder sq/"):
        list(read_lemmas("als", tmp_path / "wn-data-als.tab"))


@pytest.mark.parametrize("packed", [False, True])
def test_lmf(tmp_path, packed):
    path = tmp_path / ("swe.xml" + ".gz" * packed)
    path.write_bytes(gzip.compress(LMF.encode()) if packed else LMF.encode())
    assert list(read_lemmas("sv", path)) == ["hund", "varm korv"]


def test_lmf_is_streamed_past_what_is_forgotten(tmp_path):
    entries = "".join(f'<LexicalEntry id="{n}"><Lemma writtenForm="w{n}"/></LexicalEntry>' for n in range(3000))
    (tmp_path / "a.xml").write_text(f"<LexicalResource><Lexicon>{entries}</Lexicon></LexicalResource>")
    assert list(read_lemmas("sv", tmp_path / "a.xml")) == [f"w{n}" for n in range(3000)]


@pytest.fixture
def wndb(tmp_path) -> Path:
    folder = tmp_path / "wordnet"
    folder.mkdir()
    for name, lines in zip(WNDB_FILES, (NOUN + HOT_DOG, "", ADJECTIVE, ""), strict=True):
        (folder / name).write_text(LICENCE + lines)
    return folder


def test_wndb_gives_the_names_of_synsets(wndb):
    assert list(read_lemmas("en", wndb)) == ["entity", "hot dog", "galore"]
    assert wordnet_files(wndb) == [wndb / name for name in WNDB_FILES]


def test_the_recipes_number_of_english_synset_names():
    folder = Path("/usr/share/wordnet")
    if not (folder / "data.noun").is_file():
        pytest.skip("WordNet 3.0 is not installed: apt-get install wordnet-base")
    names = set(read_lemmas("en", folder))
    assert len(names) == 86_571
    released = {name.partition(".")[0] for name in names} - {""} | {str(number) for number in range(100)}
    assert len(released) == 86_654  # MetaCLIP 1's table; its script truncates names at the first full stop


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.tab", "00001740-n\tals:lemma\n", "line 1: .* is not <synset> TAB <type> TAB <lemma>"),
        ("a.tab", None, "no such file"),
        ("a.xml", None, "no such file"),
        ("a.xml", "<a>\n<b>", "line 2 is not XML"),
        ("a.xml", "<a><b/></a>", "no Lemma in it"),
        ("a.xml.gz", "no gzip", "cannot be read"),
        ("wordnet", "entity\n", "line 1 is not a synset"),
    ],
)
def test_bad_wordnets_are_named(tmp_path, name, content, message):
    path = tmp_path / name
    if name == "wordnet":
        path.mkdir()
        (path / "data.noun").write_text(content)
    elif content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=rf"{name}.*{message}"):
        list(read_lemmas("en", path))
