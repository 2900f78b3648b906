"""How a folder of sources is read, selected and grouped."""

import pytest

from mc2_hpc.errors import UserError
from mc2_hpc.metadata.sources import choose_languages, find_sources, group_by_curation
from mc2_hpc.metadata.wordnet import WNDB_FILES


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_layout(tmp_path):
    touch(tmp_path, "sw/corpus.txt", "sw/corpus-2.txt.gz", "sw/notes.txt", "sw/titles.txt", "sw/wordnet.txt")
    touch(tmp_path, "sw/swwiki-20240501-pages-articles.xml.bz2", "sw/.swwiki-20240501-pages-articles.xml.bz2")
    touch(tmp_path, "zh-yue/corpus.txt.part", "be_x_old/corpus.txt", "sv/swe.xml.gz", "pageviews/pageviews-1.gz")
    touch(tmp_path, *(f"en/wordnet/{name}" for name in WNDB_FILES))
    touch(tmp_path, "wordnet/wns/als/wn-data-als.tab", "wordnet/swe/wn-data-swe.tab", "sq/corpus.txt", "als/corpus.txt")
    found = find_sources(tmp_path, number_names=True)
    assert set(found) == {"als", "be_tarask", "en", "sq", "sv", "sw", "zh_yue"}
    sw = found["sw"]
    names = ["corpus-2.txt.gz", "corpus.txt", "swwiki-20240501-pages-articles.xml.bz2"]
    assert [path.name for path in sw.corpus] == names and sw.number_names
    assert [path.name for path in sw.files()] == ["wordnet.txt", *names, "titles.txt"]
    assert [path.name for path in sw.pageviews] == ["pageviews-1.gz"]
    assert found["en"].files() == [tmp_path / "en/wordnet" / name for name in WNDB_FILES]
    assert found["sq"].wordnet == (tmp_path / "wordnet/wns/als/wn-data-als.tab",)
    assert found["als"].wordnet == ()
    assert found["sv"].wordnet == (tmp_path / "sv/swe.xml.gz",)  # its own, not the shared one
    assert found["zh_yue"].corpus == ()


def test_wordnets_need_no_folder_of_their_language(tmp_path):
    touch(tmp_path, "wordnet/wn-data-heb.tab", "omw/wns/als/wn-data-als.tab.gz", "wn-data-pol.tab", "sw/corpus.txt")
    touch(
        tmp_path,
        "fra/wn-data-fra.tab",
        "wordnet/wn-data-eus.tab",
        "omw/wns/wikt/wn-wikt-swa.tab",
        ".git/wn-data-ita.tab",
    )
    found = find_sources(tmp_path)
    assert list(found) == ["eu", "fr", "he", "pl", "sq", "sw"]  # `omw` holds wordnets and is not a language
    assert found["sq"].wordnet == (tmp_path / "omw/wns/als/wn-data-als.tab.gz",)
    assert found["fr"].wordnet == (tmp_path / "fra/wn-data-fra.tab",)
    assert found["he"].lacks() == ["corpus", "titles"] and found["sw"].lacks(views=True) == ["wordnet"]


def test_a_tab_file_goes_by_its_name(tmp_path):
    touch(
        tmp_path,
        "als/wn-data-als.tab",
        "msa/wn-data-ind.tab",
        "msa/wn-data-zsm.tab",
        "xx/mine.tab",
        "yy/wn-data-xyz.tab",
    )
    found = find_sources(tmp_path)  # the folder layout of the Open Multilingual Wordnet
    assert {code: [path.name for path in sources.wordnet] for code, sources in found.items()} == {
        "id": ["wn-data-ind.tab"],
        "ms": ["wn-data-zsm.tab"],
        "sq": ["wn-data-als.tab"],
        "xx": ["mine.tab"],
        "yy": ["wn-data-xyz.tab"],
    }


def test_a_folder_without_sources_is_a_language_of_digits(tmp_path):
    touch(tmp_path, "zu/notes.md")
    assert find_sources(tmp_path)["zu"].lacks() == ["wordnet", "corpus", "titles"]


@pytest.mark.parametrize(
    "names, message",
    [
        ([], "no language folders"),
        (["pageviews/pageviews-1.gz"], "no language folders"),
        (["zh_yue/corpus.txt", "zh-yue/corpus.txt"], "a second folder for 'zh_yue'"),
        (["en/metadata.json", "en/corpus.txt"], "used unchanged, but there are other sources beside it"),
        (["en/wordnet/data.noun"], "missing files of WNDB: data.verb, data.adj, data.adv"),
        (
            ["sw/a-pages-articles.xml.bz2", "sw/a-pages-articles-multistream.xml.bz2"],
            "the same dump as multistream and as one stream",
        ),
    ],
)
def test_contradictions(tmp_path, names, message):
    touch(tmp_path, *names)
    with pytest.raises(UserError, match=message):
        find_sources(tmp_path)


def test_choice_by_own_code_or_the_one_merged_into(tmp_path):
    touch(tmp_path, "en/corpus.txt", "simple/corpus.txt", "de/corpus.txt", "zh-yue/corpus.txt")
    found = find_sources(tmp_path)
    assert set(choose_languages(found, ["en"])) == {"en", "simple"}
    assert set(choose_languages(found, ["simple", "zh-yue"])) == {"simple", "zh_yue"}
    with pytest.raises(UserError, match="no sources for fr, sw; there are de, en, simple, zh_yue"):
        choose_languages(found, ["sw", "de", "fr"])


def test_groups():
    codes = ["zh_classical", "simple", "tw", "zh", "gan", "en", "my-own"]
    assert group_by_curation(codes) == {
        "en": ["en", "simple"],
        "my-own": ["my-own"],
        "tw": ["tw"],
        "zh": ["zh", "gan", "zh_classical"],
    }
    assert group_by_curation(["tw", "aa"], merge_unknown=True) == {"other": ["aa", "tw"]}
