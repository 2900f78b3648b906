"""The shell of every page: template values are always text, in any language; and every template is well formed."""

import base64
import re
import sys
from pathlib import Path

import jinja2
import pytest
from markupsafe import Markup

from mc2_hpc import pages
from mc2_hpc.pages import data_uri, language_tag, render, write_page
from mc2_hpc.pages.numbers import duration, grouped, percent, scientific, short_number, short_share
from mc2_hpc.pages.palette import DARK, LIGHT, SERIES

HOSTILE = "<script>alert('x')</script> & \"quoted\" {{ 7 * 7 }}"
MACROS = """{% extends "pages/base.html" %}
{% from "pages/macros.html" import bar_row, heading, numbers, number_heads, tiles, words %}
{% block title %}{{ text }}{% endblock %}
{% block main %}
{{ heading(text, text) }}{{ tiles([(text, text)]) }}{{ bar_row(text, 0.5, text, text) }}{{ words(text, text) }}
<table><tr>{{ number_heads(text) }}</tr><tr>{{ numbers(text) }}</tr></table>
<p title="{{ text }}" lang="{{ text | language_tag }}">{{ text }}</p>
{% endblock %}"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """``package(template)``: the name of a package with a single template, ``page.html``."""

    def make(template: str) -> str:
        folder = tmp_path / "pages_under_test"
        (folder / "templates").mkdir(parents=True)
        (folder / "__init__.py").touch()
        (folder / "templates" / "page.html").write_text(template, encoding="utf-8")
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.delitem(sys.modules, "pages_under_test", raising=False)  # from another test
        pages._environment.cache_clear()
        return "pages_under_test"

    yield make
    pages._environment.cache_clear()


def test_what_is_shown_is_text_wherever_it_stands(package, parse_page):
    page = render(package(MACROS), "page.html", {"text": HOSTILE})
    parsed = parse_page(page)
    assert "script" not in {tag for tag, _ in parsed.tags}
    assert parsed.text.count(HOSTILE) == 10
    assert parsed.attributes("title") == [HOSTILE] * 2
    assert {name for _, attributes in parsed.tags for name in attributes} <= {
        *("charset", "class", "content", "lang", "name", "scope", "style", "title", "aria-hidden"),
    }


def test_only_markup_made_here_is_taken_as_markup(package):
    page = render(package("{{ a }} {{ b }}"), "page.html", {"a": Markup("<b>1</b>"), "b": "<b>2</b>"})
    assert page == "<b>1</b> &lt;b&gt;2&lt;/b&gt;"


def test_a_value_that_is_not_there_is_an_error(package):
    with pytest.raises(jinja2.UndefinedError, match="absent"):
        render(package("{{ absent }}"), "page.html", {})


def test_a_page_is_written_whole_or_not_at_all(package, tmp_path):
    name = package("{{ text }}")
    assert write_page(tmp_path / "out" / "page.html", name, "page.html", {"text": "猫 & قطة"}).read_text("utf-8") == (
        "猫 &amp; قطة"
    )
    with pytest.raises(jinja2.UndefinedError):
        write_page(tmp_path / "out" / "page.html", name, "page.html", {})
    assert (tmp_path / "out" / "page.html").read_text("utf-8") == "猫 &amp; قطة"


def test_the_shell_has_a_title_a_style_for_dark_and_print_and_no_address(package):
    page = render(package(MACROS), "page.html", {"text": "x"})
    assert page.startswith("<!doctype html>\n<html lang=") and "<title>x</title>" in page
    for part in ("prefers-color-scheme: dark", "@media print", *LIGHT.values(), *DARK.values()):
        assert part in page
    assert not re.search(r"https?:|@import|url\(", page)


def test_the_words_of_a_page_are_words_of_a_language():
    assert [language_tag(code) for code in ("zh_classical", "en")] == ["zh-classical", "en"]
    assert data_uri(b"\xff\x00", "image/jpeg") == "data:image/jpeg;base64," + base64.b64encode(b"\xff\x00").decode()


def test_numbers():
    assert grouped(1234567.6) == "1,234,568" and percent(0.4567) == "45.7%" and percent(0.4567, 0) == "46%"
    shares = (0, 1, 0.99951, 0.4567, 0.0123, 0.00123, 0.0000123, 1e-9)
    assert [short_share(share) for share in shares] == [
        *("0%", "100%", "100%", "45.7%", "1.2%", "0.12%", "0.0012%", "<0.0001%"),
    ]
    assert [short_number(x) for x in (0, 0.25, 1.5, 320, 1000, 12_000, 3.4e6, 10.66e9, -2e3)] == [
        *("0", "0.25", "1.5", "320", "1k", "12k", "3.4M", "10.7B", "-2k"),
    ]
    assert [duration(s) for s in (0.2, 41.4, 60, 222.4)] == ["0 s", "41 s", "1 min 0 s", "3 min 42 s"]
    assert scientific(2.4e-6) == Markup("2.4·10<sup>−6</sup>") and scientific(0) == Markup("0")


def _luminance(colour: str) -> float:
    """Relative luminance of ``#rrggbb`` as WCAG 2.2 defines it."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _contrast(one: str, other: str) -> float:
    high, low = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("palette", [LIGHT, DARK], ids=["light", "dark"])
def test_colours_can_be_told_from_their_backgrounds(palette):
    assert palette.keys() == LIGHT.keys()
    assert len(set(palette.values())) == len(palette)  # a plot's colours are identified by value
    for background in ("paper", "card"):
        for text in ("ink", "soft", "accent", "good"):
            assert _contrast(palette[text], palette[background]) >= 4.5, (text, background)
        assert _contrast(palette["before"], palette[background]) >= 3, background


def test_lines_of_a_plot_can_be_told_from_white_and_from_each_other():
    assert len(set(SERIES)) == len(SERIES)
    assert all(_contrast(colour, LIGHT["card"]) >= 3 for colour in SERIES)


def test_no_template_turns_escaping_off():
    package = Path(pages.__file__).parents[1]
    templates = set(package.rglob("templates/*.html"))
    assert templates >= {package / "pages/templates/base.html", package / "quickstart/templates/report.html"}
    for path in templates:
        assert not re.search(r"\|\s*safe\b|autoescape", path.read_text(encoding="utf-8")), path
