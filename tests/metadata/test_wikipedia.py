"""Reading dumps: a synthetic one, truncated and broken ones, and a real one."""

import bz2
import re

import pytest

from mc2_hpc.errors import UserError
from mc2_hpc.metadata.wikipedia import read_articles
from mc2_hpc.metadata.wikitext import plain_text

HEAD = (
    '<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/"><siteinfo><namespaces>'
    '<namespace key="0"/><namespace key="6">Datei</namespace><namespace key="14">Kategorie</namespace>'
    '<namespace key="10">Vorlage</namespace></namespaces></siteinfo>\n'
)


def page(title, text, namespace=0, redirect=""):
    return (
        f"<page><title>{title}</title><ns>{namespace}</ns>{redirect}<revision><text>{text}</text></revision></page>\n"
    )


PAGES = [
    page("Hund", "Der '''Hund'''"),
    page("Vorlage:X", "nicht", namespace=10),
    page("Köter", "#REDIRECT", redirect='<redirect title="Hund"/>'),
    page("Leer", ""),
    page("Katze", "&lt;ref&gt;x&lt;/ref&gt;Die Katze"),
]


def test_articles_without_redirects_and_other_namespaces(tmp_path):
    path = tmp_path / "x.xml.bz2"
    path.write_bytes(bz2.compress((HEAD + "".join(PAGES) + "</mediawiki>").encode()))
    articles = list(read_articles(path))
    assert [text for text, _ in articles] == ["Der '''Hund'''", "", "<ref>x</ref>Die Katze"]
    assert articles[0][1] == {"file", "image", "media", "category", "datei", "kategorie"}


def test_multistream(tmp_path):
    path = tmp_path / "x.xml.bz2"
    path.write_bytes(b"".join(bz2.compress(part.encode()) for part in (HEAD, *PAGES, "</mediawiki>")))
    assert len(list(read_articles(path))) == 3


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "no such file"),
        (b"plain", "cannot be read beyond the beginning .*fetch it again"),
        (bz2.compress(b"no XML"), "line 1 is not a dump's XML"),
        (bz2.compress(b"<html><p>404</p></html>"), "no page in it"),
        (bz2.compress((HEAD + PAGES[0] + "\n<page><tit").encode()), "line 4 .*after page 'Hund'"),
        (bz2.compress((HEAD + "".join(PAGES) * 999).encode())[:-99], "cannot be read beyond|is not a dump's XML"),
    ],
)
def test_bad_dumps_are_named(tmp_path, content, message):
    path = tmp_path / "x.xml.bz2"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=rf"x\.xml\.bz2: {message}"):
        list(read_articles(path))


def test_a_real_dump(shared_data):
    (dump,) = (shared_data / "wikipedia").glob("*.xml.bz2")
    texts = ["\n".join(plain_text(text, names)) for text, names in read_articles(dump)]
    assert len(texts) == 106  # of 206 pages
    assert texts[0].startswith("Anarchism is a political philosophy that advocates self-governed societies")
    assert "although several authors have defined them" in texts[0]  # the text in between is a reference
    whole = "\n".join(texts)
    for mark in ("{{", "}}", "'''", "<ref", "</", "&nbsp;", "px|", "thumb|", "Category:", "style="):
        assert mark not in whole, mark
    assert len(re.findall(r"\[\[|\]\]", whole)) <= 1  # an author's typo: "[[a|b], c]"
