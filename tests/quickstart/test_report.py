"""The report page (self-contained, well formed, captions unchanged) and its charts."""

import html
import re
import xml.etree.ElementTree as ElementTree

import pytest

from mc2_hpc.errors import UserError
from mc2_hpc.pages import plots as page_plots
from mc2_hpc.quickstart.charts import head_tail, line_chart, moving_average
from mc2_hpc.quickstart.report import write_report


@pytest.fixture
def report(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").write_bytes(b"\xff\xd8 an image")
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
                "hits": [{"image": "images/a.jpg", "number": 42}, {"image": "images/a.jpg", "number": 12}],
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
                "image": "images/a.jpg",
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


def test_page_is_well_formed_and_needs_nothing_else(report, tmp_path, parse_page):
    page = write_report(report, tmp_path).read_text(encoding="utf-8")
    parsed = parse_page(page)
    assert "<script" not in page and "@import" not in page and not re.search(r"url\((?!#)|https?:", page)
    sources = parsed.attributes("src")
    assert len(sources) == 3 and all(value.startswith("data:image/jpeg;base64,") for value in sources)
    assert {address[0] for address in parsed.attributes("href")} == {"#"}
    assert sum(tag == "svg" for tag, _ in parsed.tags) == 2 + len(report["languages"])


def test_page_says_what_the_report_says(report, tmp_path, parse_page):
    page = write_report(report, tmp_path).read_text(encoding="utf-8")
    text = parse_page(page).text
    for words in (
        "91.3%", "988/s", "3 min 42 s", "712,345", "<b>forty-two</b> & \"more\"", "صفحة اثنان", "العدد اثنان و أربعون",
        "40.0%", "20.0%", "English", "العربية", "xx", "make a pool", "no match", "3,849", "steps=2400",
    ):  # fmt: skip
        assert words in text, words
    assert "truncated" not in text
    rtl = re.search(r'<li dir="auto" lang="ar" class="noise">([^<]*)</li>', page)
    assert rtl and html.unescape(rtl[1]) == "صفحة اثنان"
    # Lowest accuracy first.
    assert text.index("90.0%") < text.index("91.0%") < text.index("93.0%")


def test_hostile_words_stay_words(report, tmp_path, parse_page):
    hostile = "\"'><script>alert(1)</script><!-- {{ 1 }}"
    report["samples"][0]["captions"] = [{"lang": hostile, "text": hostile, "noise": True}]
    report["retrieval_examples"][0].update(query=hostile, lang=hostile)
    report["outputs"] = dict.fromkeys(report["outputs"], hostile)
    report.update(machine=hostile, versions={hostile: hostile}, skipped={hostile: 1})
    report["stages"][0]["name"] = hostile
    parsed = parse_page(write_report(report, tmp_path).read_text(encoding="utf-8"))
    assert not {tag for tag, _ in parsed.tags} & {"script", "iframe"}
    assert parsed.text.count(hostile) >= 10
    assert not any(name.startswith("on") for _, attributes in parsed.tags for name in attributes)


def test_equal_reports_give_equal_pages(report, tmp_path):
    first = write_report(report, tmp_path).read_bytes()
    assert write_report(report, tmp_path).read_bytes() == first


def test_moving_average_is_the_mean_of_the_last_points():
    points = [(i, float(i * i)) for i in range(6)]
    assert moving_average(points, 1) == points
    assert moving_average(points, 3)[-1] == (5, (9 + 16 + 25) / 3) and moving_average(points, 3)[1] == (1, 0.5)


def _points(drawing: str) -> list[list[tuple[float, float]]]:
    """The drawn points of every path in a plot."""
    root = ElementTree.fromstring(drawing)
    defined = {path.attrib["id"]: path for path in root.findall(".//defs/path")}
    drawn = [(path, 0.0, 0.0) for path in root.iter("path") if path not in defined.values()]
    for use in root.iter("use"):
        path = defined[use.attrib["href"].removeprefix("#")]
        drawn.append((path, float(use.attrib["x"]), float(use.attrib["y"])))
    number = r"(-?[\d.]+)"
    return [
        [(left + float(x), top + float(y)) for x, y in re.findall(rf"[ML] {number} {number}", path.attrib["d"])]
        for path, left, top in drawn
    ]


def test_charts_stay_inside_their_box():
    points = [(0, 0.0), (1, 5.0), (2, 2.0)]
    for drawing in (
        line_chart("a", points, moving_average(points, 2), x_label="step", y_label="loss"),
        head_tail("b", [900.0, 20.0, 1.0, 0.0], [30.0, 20.0, 1.0, 0.0], threshold=30),
    ):
        width, height = map(float, re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', drawing).groups())
        paths = _points(drawing)
        assert len(paths) > 5
        for x, y in (point for path in paths for point in path):
            assert 0 <= x <= width and 0 <= y <= height


def test_a_line_chart_tells_its_ends_and_draws_every_step():
    points = [(step, 5 / step) for step in range(1, 40)]
    drawing = line_chart("a", points, moving_average(points, 2), x_label="step", y_label="loss")
    assert 'aria-label="loss: 5 at the start, 0.13 at the end"' in drawing
    assert ">step</text>" in drawing and ">loss</text>" in drawing
    heights = [y for _, y in max(_points(drawing), key=len)]
    assert len(heights) > 20 and heights == sorted(heights)  # falls from left to right: y grows downwards


@pytest.mark.parametrize(
    "before, after, threshold",
    [
        ([1.0], [1.0], 1),
        ([0.0, 0.0], [0.0, 0.0], 1),
        ([5e7, 3.0], [20_000.0, 0.0], 20_000),
        ([2.0] * 300, [2.0] * 300, 9),
    ],
)
def test_any_curve_can_be_drawn(before, after, threshold):
    drawing = head_tail("c", before, after, threshold=threshold)
    assert "most frequent" in drawing and "rarest" in drawing and "nan" not in drawing.lower()


def test_equal_values_and_a_single_step_can_be_drawn():
    for points in ([(1, 0.0)], [(1, 3.0), (2, 3.0)], [(10, 1e-12), (20, 1e-12)]):
        assert "nan" not in line_chart("a", points, points, x_label="step", y_label="loss").lower()


def test_missing_matplotlib_is_one_line(report, tmp_path, monkeypatch):
    monkeypatch.setattr(page_plots, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"report needs matplotlib: pip install 'mc2_hpc\[quickstart\]'"):
        write_report(report, tmp_path)
    assert not (tmp_path / "report.html").exists()
