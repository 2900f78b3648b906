"""The evaluation report's page: names are text, and languages go from worst to best down each column."""

import re

import pytest

from mc2_hpc.evaluation.results import Example
from mc2_hpc.pages import render

HOSTILE = "\"'><script>alert(1)</script>"


def page(name="model", groups=(), examples=(), **changes):
    section = {
        "name": name,
        "error": "",
        "tiles": [("50.0", f"{name}, %")],
        "number_scored": 5,
        "left_out": {},
        "metric": "top1",
        "groups": list(groups),
        "examples": list(examples),
        **changes,
    }
    return render("mc2_hpc.evaluation", "report.html", {"name": name, "model": name, "sections": [section]})


def test_names_and_captions_are_text(parse_page):
    example = (Example(HOSTILE, HOSTILE, [0], 1), [("", "data:,"), ("missed", "data:,")])
    groups = [(HOSTILE, 0.1, 5), (HOSTILE + "2", 0.2, 5)]
    text = page(HOSTILE, groups, [example], left_out={HOSTILE: 3}, metric=HOSTILE)
    parsed = parse_page(text)
    assert "script" not in {tag for tag, _ in parsed.tags}
    assert parsed.text.count(HOSTILE) == 11
    assert re.search(r'<p class="query" dir="auto">', text)
    failed = parse_page(page(HOSTILE, error=HOSTILE))
    assert f"Not scored: {HOSTILE}" in failed.text and "script" not in {tag for tag, _ in failed.tags}


@pytest.mark.parametrize("own, shown", [(True, "✓ its own"), (False, "its own, missed")])
def test_a_missed_captions_own_image_is_shown(own, shown, parse_page):
    hits = [("", "data:,1"), ("right" if own else "", "data:,2")] + ([] if own else [("missed", "data:,3")])
    parsed = parse_page(page(examples=[(Example("de", "eine Katze", [0, 1], 1 if own else 2), hits)]))
    assert parsed.attributes("src") == ["data:,1", "data:,2"] + ([] if own else ["data:,3"])
    assert shown in parsed.text and ("its own, missed" in parsed.text) is not own


@pytest.mark.parametrize("width, columns", [(1400, 2), (700, 1)])
def test_worst_to_best_runs_down_each_column(width, columns, measure):
    """In screen order: down the first column, then down the next."""
    groups = [(f"language {n:02d}", n / 50, 100) for n in range(21)]
    script = "[...document.querySelectorAll('.bars .row')].map(row => row.getBoundingClientRect()).map(b => [b.x, b.y])"
    places = measure(page(groups=groups), script, width)
    assert len(places) == 21 and places == sorted(places)
    assert len({x for x, _ in places}) == columns
