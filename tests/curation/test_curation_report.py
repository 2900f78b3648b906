"""The report shows the run's own numbers on one self-contained page, for two languages and for 329."""

import dataclasses
import html
import re
import struct
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from markupsafe import Markup

from mc2_hpc import jobs
from mc2_hpc.balancing.thresholds import entry_probabilities
from mc2_hpc.cli import main
from mc2_hpc.curation.balance import plan_balance
from mc2_hpc.curation.match import plan_match
from mc2_hpc.curation.report import plots
from mc2_hpc.curation.report.findings import gather, mass_curve
from mc2_hpc.curation.report.page import render_page, write_report
from mc2_hpc.drops import Drop
from mc2_hpc.errors import UserError
from mc2_hpc.metadata.languages import LANGUAGES
from mc2_hpc.pages import plots as page_plots
from mc2_hpc.pages.plots import new_figure, plot_style
from mc2_hpc.reading.json_file import ANYTHING, read_json
from mc2_hpc.storage import file_sha256, write_json

HOSTILE = "<script>tom & 'jerry'\"</script>"
NO_PLOTS = dict.fromkeys(("languages", "head_tail", "thresholds"), Markup(""))


def curate(folder: Path, entries: dict[str, list[str]], rows: list[tuple[str, str, str]], t_en: int) -> Path:
    for lang, words in entries.items():
        write_json(folder / "metadata" / f"{lang}.json", words)
    key, text, lang = zip(*rows, strict=True)
    (folder / "pool").mkdir()
    pq.write_table(pa.table({"key": key, "text": text, "lang": lang}), folder / "pool" / "0.parquet")
    jobs.run(plan_match(folder / "pool", folder / "metadata", folder / "out" / "matched"))
    jobs.run(plan_balance(folder / "out" / "matched", folder / "metadata", folder / "out" / "balance", t_en))
    return folder / "out"


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    """Two languages, dropped captions, and an entry that would break a page without escaping."""
    rows = [(f"k{n:03d}", f"dog {n}" if n % 3 else f"cat dog {n}", "en") for n in range(120)]
    rows += [(f"g{n:03d}", "Hund" if n % 4 else f"Hund {HOSTILE}", "de") for n in range(40)]
    rows += [("x", "nothing", "en"), ("y", "un chien", "fr"), ("z", " ", "en")]
    folder = tmp_path_factory.mktemp("two")
    return curate(folder, {"en": ["dog", "cat"], "de": ["Hund", HOSTILE], "it": ["cane"]}, rows, 50)


@pytest.fixture(scope="module")
def many(two, tmp_path_factory) -> Path:
    """329 balanced languages, some with codes that the language table does not have."""
    codes = ["en", *(code for code in LANGUAGES if code != "en"), *(f"x{n}" for n in range(329))][:329]
    run = tmp_path_factory.mktemp("many") / "out"
    template = read_json(two / "balance" / "balance.json", ANYTHING)
    rows, hashes = {}, {}
    for rank, lang in enumerate(codes):
        entries, counts = [f"{lang} {n}" for n in range(20)], np.arange(20, dtype=np.uint64) * (1 + 9000 // (rank + 1))
        write_json(run.parent / "metadata" / f"{lang}.json", entries)
        for name, array in (("counts", counts), ("probs", entry_probabilities(counts, 100))):
            (run / "balance" / name).mkdir(parents=True, exist_ok=True)
            np.save(run / "balance" / name / f"{lang}.npy", array)
        hashes[lang] = file_sha256(run.parent / "metadata" / f"{lang}.json")
        texts = int(counts.sum())
        rows[lang] = {**template["languages"]["de"], "texts": texts, "entries": 20, "expected_texts": texts / 3}
    sources = {**template["sources"], "metadata": hashes, "counts": hashes}
    report = {**template, "languages": rows, "t": dict.fromkeys(rows, 100), "sources": sources}
    write_json(run / "balance" / "balance.json", report)
    return run


@pytest.fixture(scope="module")
def page_path(two) -> Path:
    return write_report(two, metadata_of(two))


def metadata_of(run: Path) -> Path:
    return run.parent / "metadata"


def test_page_shows_the_numbers_of_the_run(two, page_path, parse_page):
    report = read_json(two / "balance" / "balance.json", ANYTHING)
    page = parse_page(page_path.read_text(encoding="utf-8"))
    for shown in ("160 of 163 captions matched", "English", "German", "t = 50", HOSTILE, "no_match", "caption_empty"):
        assert shown in page.text
    assert f"{report['languages']['en']['expected_texts']:,.0f}" in page.text
    assert report["sources"]["metadata"]["de"] in page.text and report["mode"] in page.text
    assert "Metadata without a match: 1" in page.text and "no caption of the pool is in this language" in page.text


def test_page_shows_captions_and_match_rate_of_each_language(two, page_path):
    table = page_path.read_text(encoding="utf-8").partition("<table>")[2].partition("</table>")[0]
    cells = [[html.unescape(re.sub(r"<[^>]*>", "", cell)).strip() for cell in re.findall(r"<t[hd].*?</t[hd]>", row)]
             for row in table.split("</tr>")]  # fmt: skip
    assert cells[0] == ["language", "captions", "matched", "match rate", "images", "matches", "matches per text"]
    assert cells[1] == ["English en", "121", "120", "99.2%", "120", "160", "1.3"]
    assert cells[2] == ["German de", "40", "40", "100%", "40", "50", "1.2"]
    english, german = gather(two, metadata_of(two)).languages
    assert (english.captions, german.captions) == (121, 40) and english.match_rate == pytest.approx(120 / 121)


def test_without_the_matched_pool_the_rate_is_not_known(many, parse_page):
    findings = gather(many, metadata_of(many))
    assert {row.captions for row in findings.languages} == {row.match_rate for row in findings.languages} == {None}
    assert "–" in parse_page(render_page(findings, NO_PLOTS)).text


def test_a_balance_of_an_earlier_match_is_refused(two, tmp_path):
    (tmp_path / "balance").symlink_to(two / "balance")
    settings = {"mode": "fixed", "metadata": {}, "language_id": "none", "shards": ["0"]}
    write_json(tmp_path / "matched" / "match.json", settings)
    counters = {
        "rows": 163,
        "matched": 161,
        "images": 1,
        "drops": {},
        "languages": {},
        "captions": {"en": 121, "de": 41},
    }
    write_json(tmp_path / "matched" / "stats" / "0.json", counters)
    with pytest.raises(UserError, match="run `mc2 curate balance` again"):
        gather(tmp_path, metadata_of(two))


def test_page_needs_nothing_but_itself(page_path, parse_page):
    text = page_path.read_text(encoding="utf-8")
    page = parse_page(text)
    assert "http:" not in text and "https:" not in text and not re.search(r"url\((?!#)", text) and "@import" not in text
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "img", "image"}
    drawings = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert len(drawings) == 3 and all(drawing["aria-label"] and drawing["viewbox"] for drawing in drawings)
    assert {address[0] for address in page.attributes("href")} == {"#"}
    files = sorted(file.name for file in page_path.parent.iterdir())
    assert files == ["curation.html", "head_tail.png", "languages.png", "thresholds.png"]
    for name in files[1:]:
        data = (page_path.parent / name).read_bytes()
        width, height = struct.unpack(">II", data[16:24])
        assert data.startswith(b"\x89PNG") and width > 1000 and height > 200


def test_same_run_same_bytes(two, page_path):
    before = {path.name: path.read_bytes() for path in page_path.parent.iterdir()}
    write_report(two, metadata_of(two))
    assert {path.name: path.read_bytes() for path in page_path.parent.iterdir()} == before


def test_packing_is_told_where_it_was_done(two, tmp_path, parse_page):
    out = tmp_path / "out"
    out.mkdir()
    (out / "balance").symlink_to(two / "balance")
    write_json(out / "shards" / "pack.json", {"shards": ["a", "b"]})
    write_json(out / "shards" / "stats" / "a.json", {"images": 90, "texts": 91, "drops": {"image_missing": 7}})
    assert "image_missing" not in render_page(gather(out, metadata_of(two)), NO_PLOTS)
    write_json(out / "shards" / "stats" / "b.json", {"images": 10, "texts": 11, "drops": {"image_missing": 1}})
    text = parse_page(render_page(gather(out, metadata_of(two)), NO_PLOTS)).text
    assert "100 were packed" in text and "a caption without an image" in text


def test_findings(two):
    findings = gather(two, metadata_of(two))
    english, german = findings.languages
    assert (english.code, english.texts, german.code, german.texts) == ("en", 120, "de", 40)
    assert (english.share_before, german.share_before) == (0.75, 0.25)
    assert english.share_after == pytest.approx(findings.balance["english_share_after"])
    assert english.share_after + german.share_after == pytest.approx(1)
    assert (english.threshold, english.entries, english.entries_matched, english.entries_head) == (50, 2, 2, 1)
    assert english.kept == pytest.approx((80 * 50 / 120 + 40) / 120)
    assert [(top.entry, top.count, round(top.probability, 4)) for top in english.top] == [
        ("dog", 120, round(50 / 120, 4)),
        ("cat", 40, 1),
    ]
    assert findings.drops == {"no_match": 1, "language_unknown": 1, "caption_empty": 1}
    assert set(findings.drops) <= set(Drop)


def test_329_languages_stay_readable(many, parse_page):
    findings = gather(many, metadata_of(many))
    assert len(findings.languages) == 329 and findings.languages[0].code == "en"
    text = render_page(findings, {name: plot.svg for name, plot in plots.draw_plots(findings).items()})
    page = parse_page(text)
    summaries = re.findall(r"<summary>(.*?)</summary>", text, re.S)
    assert sum(summary.startswith("304 more languages") for summary in summaries) == 2
    assert any(summary.startswith("317 more languages") for summary in summaries)
    open_part = re.sub(r"<details>.*?</details>", "", text, flags=re.S)
    assert open_part.count("<tr>") < 250
    assert len(text) < 4_000_000
    for language in findings.languages:
        assert f"<code>{language.code}</code>" in text
    assert page.text.count("Head and tail") == 1


@pytest.mark.parametrize("width", [1400, 900])
def test_no_column_is_cut(many, measure, width):
    """The layout in a browser, with long names and large numbers."""
    findings = gather(many, metadata_of(many))
    large = {"texts": 123_456_789, "captions": 234_567_890, "matches": 345_678_901, "images": 99_999_999,
             "expected_texts": 12_345_678.9, "threshold": 1_234_567, "entries": 999_999}  # fmt: skip
    longest = sorted((language.name for language in LANGUAGES.values()), key=len)[-45:]
    rows = [
        dataclasses.replace(row, name=name, **large) for row, name in zip(findings.languages, longest, strict=False)
    ]
    page = render_page(dataclasses.replace(findings, languages=rows), NO_PLOTS)
    script = """[...document.querySelectorAll("html, .wide, .card, .tile, figure")].filter(
        e => e.scrollWidth > e.clientWidth + 1).map(e => [e.tagName, e.className, e.scrollWidth, e.clientWidth])"""
    assert len(rows) == 45 and measure(page, script, width) == []


def test_names_of_points_cover_neither_points_nor_each_other():
    """In a crowd, only points with room get a name, earlier points first."""
    points = {f"x{n}": (10.0 + n % 5, 10.0 + n // 5) for n in range(20)} | {"en": (900.0, 900.0)}
    points = {"en": points.pop("en"), **points}
    with plot_style():
        figure, (axes,) = new_figure(9.6, 4.6)
        axes.set(xscale="log", yscale="log", xlim=(1, 1000), ylim=(1, 1000))
        plots._name_points(figure, axes, points)
        figure.draw_without_rendering()
        boxes = {label.get_text(): label.get_window_extent() for label in axes.texts}
        dots = dict(zip(points, axes.transData.transform(list(points.values())), strict=True))
    assert "en" in boxes and 1 < len(boxes) < 20
    for name, box in boxes.items():
        assert not any(box.overlaps(other) for key, other in boxes.items() if key != name)
        assert not any(box.contains(*dot) for key, dot in dots.items() if key != name)


def test_titles_end_where_the_next_panel_begins(many):
    """Neither a language's name nor its threshold overlaps the panel beside it, however long they are."""
    findings = gather(many, metadata_of(many))
    named = [dataclasses.replace(row, name="Belarusian (Taraškievica) of " * 3, threshold=10**9)
             for row in findings.languages]  # fmt: skip
    with plot_style():
        figure = plots._head_tail(dataclasses.replace(findings, languages=named))
        figure.draw_without_rendering()
        boxes = [text.get_window_extent() for axes in figure.axes for text in (axes._left_title, *axes.texts)]
    assert len(boxes) == 24
    for place, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[place + 1 :])


@given(st.lists(st.integers(1, 10**9), min_size=1, max_size=300, unique=True))
def test_a_thinned_curve_keeps_its_ends_and_no_more_than_can_be_seen(counts):
    counts = np.sort(np.array(counts, np.uint64))
    mass = np.arange(1, len(counts) + 1) / len(counts)
    fewer, their_mass = plots.thinned(counts, mass)
    assert fewer[0] == counts[0] and fewer[-1] == counts[-1] and their_mass[-1] == 1
    assert len(fewer) <= 2 + 80 * 9 and set(fewer.tolist()) <= set(counts.tolist())
    # If a point was left out, the next kept point is so close that both fall on the same pixel.
    after = fewer[np.searchsorted(fewer, counts)]
    assert (np.log10(after.astype(float)) - np.log10(counts.astype(float)) <= 1 / 80).all()


@given(st.lists(st.integers(0, 50), min_size=1, max_size=30).filter(any))
def test_mass_curve(counts):
    counts_seen, mass = mass_curve(np.array(counts, np.uint64))
    assert counts_seen.tolist() == sorted({count for count in counts if count})
    for count, share in zip(counts_seen.tolist(), mass.tolist(), strict=True):
        assert share == pytest.approx(sum(c for c in counts if c <= count) / sum(counts))


def test_other_metadata_is_refused(two, tmp_path):
    for lang in ("en", "de"):
        write_json(tmp_path / "metadata" / f"{lang}.json", ["something", "else"])
    with pytest.raises(UserError, match="was curated with another"):
        write_report(two, tmp_path / "metadata")


def test_a_run_that_is_not_balanced(tmp_path, two):
    with pytest.raises(UserError, match="mc2 curate balance"):
        write_report(tmp_path, metadata_of(two))


def test_missing_matplotlib(two, monkeypatch):
    monkeypatch.setattr(page_plots, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"the curation report needs matplotlib: pip install 'mc2_hpc\[curation\]'"):
        write_report(two, metadata_of(two))


def test_command(two, capsys):
    assert main(["curate", "report", str(two), "--metadata", str(metadata_of(two))]) == 0
    assert capsys.readouterr().out.strip() == str(two / "report" / "curation.html")
