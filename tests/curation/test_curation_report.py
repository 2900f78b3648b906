"""The report shows the run's own numbers on one page that needs nothing else, for two languages and for 329."""

import re
import struct
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mc2_hpc.balancing.thresholds import entry_probabilities
from mc2_hpc.cli import main
from mc2_hpc.curation.pipeline import balance, match
from mc2_hpc.curation.report import plots
from mc2_hpc.curation.report.findings import gather, mass_curve
from mc2_hpc.curation.report.page import DROP_REASONS, render, write_report
from mc2_hpc.errors import UserError
from mc2_hpc.metadata.languages import LANGUAGES
from mc2_hpc.storage import file_sha256, read_json, write_json

HOSTILE = "<script>tom & 'jerry'\"</script>"


class Page(HTMLParser):
    """Collects elements and text; complains of tags that are not closed."""

    VOID = frozenset({"meta", "img", "link", "br"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        assert not self._open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.text += data


def curate(folder: Path, entries: dict[str, list[str]], rows: list[tuple[str, str, str]], t_en: int) -> Path:
    for lang, words in entries.items():
        write_json(folder / "metadata" / f"{lang}.json", words)
    key, text, lang = zip(*rows, strict=True)
    (folder / "pool").mkdir()
    pq.write_table(pa.table({"key": key, "text": text, "lang": lang}), folder / "pool" / "0.parquet")
    match(folder / "pool", folder / "metadata", folder / "out" / "matched")
    balance(folder / "out" / "matched", folder / "metadata", folder / "out" / "balance", t_en)
    return folder / "out"


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    """Two languages, dropped captions, an entry that would break a careless page."""
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
    template = read_json(two / "balance" / "balance.json")
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


def test_page_shows_the_numbers_of_the_run(two, page_path):
    report = read_json(two / "balance" / "balance.json")
    page = Page(page_path.read_text(encoding="utf-8"))
    for shown in ("160 of 163 captions matched", "English", "German", "t = 50", HOSTILE, "no_match", "empty_text"):
        assert shown in page.text
    assert f"{report['languages']['en']['expected_texts']:,.0f}" in page.text
    assert report["sources"]["metadata"]["de"] in page.text and report["mode"] in page.text
    assert "Metadata without a match: 1" in page.text and "no caption of the pool is in this language" in page.text


def test_page_needs_nothing_but_itself(page_path):
    html = page_path.read_text(encoding="utf-8")
    page = Page(html)
    assert "http:" not in html and "https:" not in html and "url(" not in html and "@import" not in html
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object"}
    images = [attrs["src"] for tag, attrs in page.tags if tag == "img"]
    assert len(images) == 3 and all(source and source.startswith("data:image/png;base64,") for source in images)
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


def test_packing_is_told_where_it_was_done(two, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "balance").symlink_to(two / "balance")
    write_json(out / "shards" / "pack.json", {"shards": ["a", "b"]})
    write_json(out / "shards" / "stats" / "a.json", {"images": 90, "texts": 91, "drops": {"missing_image": 7}})
    plots = dict.fromkeys(("languages", "head_tail", "thresholds"), b"")
    assert "missing_image" not in render(gather(out, metadata_of(two)), plots)
    write_json(out / "shards" / "stats" / "b.json", {"images": 10, "texts": 11, "drops": {"missing_image": 1}})
    text = Page(render(gather(out, metadata_of(two)), plots)).text
    assert "100 were packed" in text and "matched, but not in the tar" in text


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
    assert findings.drops == {"no_match": 1, "unknown_language": 1, "empty_text": 1}
    assert set(findings.drops) <= set(DROP_REASONS)


def test_329_languages_stay_readable(many):
    findings = gather(many, metadata_of(many))
    assert len(findings.languages) == 329 and findings.languages[0].code == "en"
    html = render(findings, plots.draw_plots(findings))
    page = Page(html)
    summaries = re.findall(r"<summary>(.*?)</summary>", html, re.S)
    assert any(summary.startswith("304 more languages") for summary in summaries)
    assert any(summary.startswith("317 more languages") for summary in summaries)
    open_part = re.sub(r"<details>.*?</details>", "", html, flags=re.S)
    assert open_part.count("<tr>") < 250
    assert len(html) < 4_000_000
    for language in findings.languages:
        assert f"<code>{language.code}</code>" in html
    assert page.text.count("Head and tail") == 1


@given(st.lists(st.integers(0, 50), min_size=1, max_size=30).filter(any))
def test_mass_curve(counts):
    counts_seen, mass = mass_curve(np.array(counts, np.uint64))
    assert counts_seen.tolist() == sorted({count for count in counts if count})
    for count, share in zip(counts_seen.tolist(), mass.tolist(), strict=True):
        assert share == pytest.approx(sum(c for c in counts if c <= count) / sum(counts))


def test_other_metadata_is_refused(two, tmp_path):
    for lang in ("en", "de"):
        write_json(tmp_path / "metadata" / f"{lang}.json", ["something", "else"])
    with pytest.raises(UserError, match="is not the metadata that"):
        write_report(two, tmp_path / "metadata")


def test_a_run_that_is_not_balanced(tmp_path, two):
    with pytest.raises(UserError, match="mc2 curate balance"):
        write_report(tmp_path, metadata_of(two))


def test_missing_matplotlib(two, monkeypatch):
    monkeypatch.setattr(plots, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'mc2_hpc\[curation\]'"):
        write_report(two, metadata_of(two))


def test_command(two, capsys):
    assert main(["curate", "report", str(two), "--metadata", str(metadata_of(two))]) == 0
    assert capsys.readouterr().out.strip() == str(two / "report" / "curation.html")
