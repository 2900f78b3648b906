"""The report page: self-contained, well formed, every caption as it was written; and its charts."""

import html
import math
import re
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mc2_hpc.quickstart.charts import head_tail, line_chart, moving_average, nice_ticks, short_number
from mc2_hpc.quickstart.report import duration, write_report

_VOID = {"meta", "img", "line", "circle", "path", "br"}


class WellFormed(HTMLParser):
    """Checks that every element is closed in order, and keeps text and attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""
        self.attributes: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag, attrs):
        self.attributes += attrs
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def report(tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.jpg").write_bytes(b"\xff\xd8 a picture")
    languages = ["en", "ar", "xx"]
    return {
        "seconds": 222.4,
        "languages": languages,
        "zero_shot": {"en": 0.93, "ar": 0.91, "xx": 0.9},
        "zero_shot_mean": 0.9133,
        "chance": 0.01,
        "retrieval": {
            "text_to_image": {"R@1": 0.9, "R@5": 0.95, "R@10": 1.0},
            "image_to_text": {"R@1": 0.8, "R@5": 0.85, "R@10": 0.99},
        },
        "retrieval_examples": [
            {
                "lang": "ar",
                "query": "العدد اثنان و أربعون",
                "number": 42,
                "hits": [{"image": "pictures/a.jpg", "number": 42}, {"image": "pictures/a.jpg", "number": 12}],
            }
        ],
        "english_share_before": 0.4,
        "english_share_after": 0.2,
        "samples_per_second": 987.6,
        "open_clip_max_abs_diff": 2.4e-6,
        "parameters": 712_345,
        "images": 16_000,
        "captions": 32_775,
        "heldout_images": 1_000,
        "processes": 2,
        "steps": 1_200,
        "global_batch": 128,
        "samples": [
            {
                "image": "pictures/a.jpg",
                "captions": [
                    {"lang": "en", "text": "<b>forty-two</b> & \"more\"", "noise": False},
                    {"lang": "ar", "text": "صفحة اثنان", "noise": True},
                ],
            }
        ],
        "balance": {"t_en": 40, "p": 0.24, "t": {"en": 40, "ar": 9, "xx": 1}},
        "curves": {
            "en": {"before": [500.0, 40.0, 3.0], "after": [40.0, 40.0, 3.0]},
            "ar": {"before": [90.0, 4.0, 0.0], "after": [12.0, 4.0, 0.0]},
            "xx": {"before": [1.0], "after": [1.0]},
        },
        "training": [{"step": 10 * i, "loss": 5 / i, "samples_per_second": 900 + i} for i in range(1, 40)],
        "stages": [{"name": "make a pool", "seconds": 4.2}],
        "skipped": {"no_match": 3849, "image_truncated": 0},
        "outputs": {"open_clip": "runs/q/open_clip", "train": "runs/q/train", "train.yaml": "runs/q/train.yaml"},
        "machine": "2 CPU cores",
        "versions": {"torch": "2.13.0"},
    }  # fmt: skip


def test_page_is_well_formed_and_needs_nothing_else(report, tmp_path):
    page = write_report(report, tmp_path).read_text(encoding="utf-8")
    parser = WellFormed()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    assert "<script" not in page and "@import" not in page and "url(" not in page
    sources = [value for name, value in parser.attributes if name in ("src", "href")]
    assert len(sources) == 3 and all(value.startswith("data:image/jpeg;base64,") for value in sources)


def test_page_says_what_the_report_says(report, tmp_path):
    parser = WellFormed()
    page = write_report(report, tmp_path).read_text(encoding="utf-8")
    parser.feed(page)
    for words in (
        "91.3%", "988/s", "3 min 42 s", "712,345", "<b>forty-two</b> & \"more\"", "صفحة اثنان", "العدد اثنان و أربعون",
        "40.0%", "20.0%", "English", "العربية", "xx", "make a pool", "no match", "3,849", "steps=2400",
    ):  # fmt: skip
        assert words in parser.text, words
    assert "truncated" not in parser.text
    rtl = re.search(r'<li dir="auto" lang="ar" class="noise">([^<]*)</li>', page)
    assert rtl and html.unescape(rtl[1]) == "صفحة اثنان"
    # Lowest accuracy first.
    assert parser.text.index("90.0%") < parser.text.index("91.0%") < parser.text.index("93.0%")


def test_equal_reports_give_equal_pages(report, tmp_path):
    first = write_report(report, tmp_path).read_bytes()
    assert write_report(report, tmp_path).read_bytes() == first


def test_duration():
    assert [duration(s) for s in (0.2, 41.4, 60, 222.4)] == ["0 s", "41 s", "1 min 0 s", "3 min 42 s"]


@given(
    low=st.floats(-1e9, 1e9), span=st.floats(0, 1e9), count=st.integers(2, 10)
)  # fmt: skip
def test_ticks_are_round_evenly_spaced_and_enclose_the_range(low, span, count):
    high = low + span
    ticks = nice_ticks(low, high, count)
    slack = 1e-6 * max(abs(low), abs(high), 1)
    assert ticks[0] <= low + slack and ticks[-1] >= high - slack
    steps = [b - a for a, b in zip(ticks, ticks[1:], strict=False)]
    assert steps and all(math.isclose(step, steps[0], rel_tol=1e-3, abs_tol=slack) for step in steps)
    assert len(ticks) <= count + 3


def test_short_numbers():
    assert [short_number(x) for x in (0, 0.25, 1.5, 320, 1000, 12_000, 3.4e6)] == [
        "0", "0.25", "1.5", "320", "1k", "12k", "3.4M",
    ]  # fmt: skip


def test_moving_average_is_the_mean_of_the_last_points():
    points = [(i, float(i * i)) for i in range(6)]
    assert moving_average(points, 1) == points
    assert moving_average(points, 3)[-1] == (5, (9 + 16 + 25) / 3) and moving_average(points, 3)[1] == (1, 0.5)


def test_charts_stay_inside_their_box():
    drawing = line_chart([(0, 0.0), (1, 5.0), (2, 2.0)], x_label="step", y_label="loss", width=400, height=200)
    drawing += head_tail([900.0, 20.0, 1.0, 0.0], [30.0, 20.0, 1.0, 0.0], threshold=30, width=400, height=200)
    for path in re.findall(r' d="([^"]*)"', drawing):
        for x, y in re.findall(r"(-?[\d.]+),(-?[\d.]+)", path):
            assert 0 <= float(x) <= 400 and 0 <= float(y) <= 200
