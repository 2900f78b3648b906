"""Plots: the same bytes every time, text that stays text, and several drawings on one page."""

import re
import warnings
import xml.etree.ElementTree as ElementTree

import matplotlib
import pytest

from mc2_hpc.errors import UserError
from mc2_hpc.pages import plots
from mc2_hpc.pages.palette import LIGHT
from mc2_hpc.pages.plots import new_figure, plot_style, png, require_plotting, short_ticks, svg

HOSTILE = '<b>$\\frac{1}{$ & "猫" \'</text><script>'


def draw(title: str = "title", name: str = "plot"):
    with plot_style():
        figure, (axes,) = new_figure(3, 2)
        axes.plot([1, 10, 300], [2, 900, 40_000], marker="o", label="a line")
        axes.fill_between([1, 10], [2, 900], color=LIGHT["before"])
        axes.set(xscale="log", yscale="log", title=title)
        axes.legend()
        for axis in (axes.xaxis, axes.yaxis):
            short_ticks(axis)
        return png(figure), svg(figure, name, title)


def test_the_same_figure_gives_the_same_bytes_whatever_the_readers_settings():
    first = draw()
    with matplotlib.rc_context({"axes.facecolor": "yellow", "font.size": 20, "svg.hashsalt": "other"}):
        before = dict(matplotlib.rcParams)
        assert draw() == first
        assert dict(matplotlib.rcParams) == before


def test_a_drawing_is_one_element_without_addresses_dates_or_rules_for_the_page():
    drawing = draw()[1]
    root = ElementTree.fromstring(drawing)  # well-formed, no prefix left
    assert root.tag == "svg" and root.attrib["class"] == "plot" and root.attrib["role"] == "img"
    assert not re.search(r"https?:|xmlns|xlink|<style|<metadata|<\?xml|Matplotlib|font-family", drawing)
    assert root.find("title").text == root.attrib["aria-label"] == "title"


def test_text_stays_text():
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no letter is reported as missing
        drawing = draw(HOSTILE)[1]
    root = ElementTree.fromstring(drawing)
    assert HOSTILE in [element.text for element in root.iter("text")]
    assert root.find("title").text == root.attrib["aria-label"] == HOSTILE
    assert "script" not in {element.tag for element in root.iter()}
    labels = {element.text for element in root.iter("text")}
    assert {"1", "10", "100", "10k", "a line"} <= labels


def test_colours_are_the_pages():
    drawing = draw()[1]
    for colour in ("ink", "soft", "rule", "before", "accent"):
        assert f"var(--{colour})" in drawing and LIGHT[colour] not in drawing


def test_drawings_on_one_page_share_no_id_and_each_finds_its_parts():
    both = draw(name="a")[1] + draw(name="b")[1]
    ids = re.findall(r'\bid="([^"]*)"', both)
    assert ids and len(set(ids)) == len(ids)
    used = set(re.findall(r'href="#([^"]*)"', both)) | set(re.findall(r"url\(#([^)]*)\)", both))
    assert used == set(ids)


def test_missing_matplotlib_is_one_line_that_names_the_extra(monkeypatch):
    monkeypatch.setattr(plots, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"^the report needs matplotlib: pip install 'mc2_hpc\[curation\]'$"):
        require_plotting("the report needs", "curation")
