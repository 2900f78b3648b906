"""Markup is removed, text stays."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mc2_hpc.metadata.wikitext import FILE_NAMESPACES, plain_text


@pytest.mark.parametrize(
    "wikitext, text",
    [
        ("'''Dog''' and ''cat''", ["Dog and cat"]),
        ("a <!-- no\nno --> b", ["a  b"]),
        ("a<ref>no</ref> b<ref name=x /> c<ref name='y'>no {{cite|a}}</ref> d", ["a b c d"]),
        ("<math>x^2</math>y <nowiki>z</nowiki>", ["y z"]),
        ("{{box|a=[[b]]|c={{d|e}}}}text{{x}}", ["text"]),
        ("a\n{| class=x\n! b\n|-\n| c || {{d}}\n{| inner\n|}\n|}\ne", ["a", "e"]),
        ("{{a\n{| b\n}} c {{d}} |} e", ["c  |} e"]),
        ("[[dog]]s, [[cat|cats]] and [[Paris (city)|]]", ["dogs, cats and Paris (city)"]),
        ("[[Star Wars: A New Hope]] [[:Category:Dogs|dogs]]", ["Star Wars: A New Hope dogs"]),
        ("a [[File:x.jpg|thumb|200px|a [[dog]] [[b|c]] [sic]]] b", ["a  b"]),
        ("a [[Bild:x.SVG|mini|Hund]] b[[Image:y.png]] [[Category:Dogs]] [[fr:Chien]]", ["a  b"]),
        ("see [https://a.org/b the page] or http://c.org/d?e=f now [//e.org]", ["see the page or  now"]),
        (
            "== History ==\n* one\n** two\n# three\n: four\n----\nfive",
            ["History", "one", "two", "three", "four", "five"],
        ),
        ("a&nbsp;b &amp; c &lt;b&gt;", ["a\xa0b & c <b>"]),
        ("a<br/>b<br>c <span style='x'>d</span>", ["a", "b", "c d"]),
        ("__NOTOC__ __KEIN_INHALT__ a_b", ["a_b"]),
        ("-{zh-hans:计算机;zh-hant:電腦}-和-{A|zh-cn:软件;zh-tw:軟體}-和-{字}--{H|x=>zh-cn:y}-", ["计算机和软件和字"]),
    ],
)
def test_markup(wikitext, text):
    assert plain_text(wikitext) == text


@pytest.mark.parametrize(
    "broken",
    [
        "before {{never closed\nafter",
        "before [[never closed\nafter",
        "before }} ]] |} after",
        "before <ref>open\nafter",
    ],
)
def test_broken_markup_costs_no_text(broken):
    text = " ".join(plain_text(broken))
    assert "before" in text and "after" in text


def test_own_names_of_the_file_namespace():
    assert plain_text("[[Datei:x|Hund]] a", FILE_NAMESPACES | {"datei"}) == ["a"]


@given(st.text(st.sampled_from("{}[]|<>=':*\n ab!-"), max_size=60))
def test_any_text_is_read(text):
    for line in plain_text(text):
        assert line == line.strip() != ""
