"""The repository's pages are consistent: every page is linked, links resolve, there is one version, and numbers are
those of the rows."""

import json
import re
from pathlib import Path

import pytest
import yaml

from mc2_hpc import __version__

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def links(page):
    """A page's links within the repository: (file, heading or nothing)."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in LINK.findall(text):
        if not re.match(r"[a-z]+:", target):
            path, _, heading = target.partition("#")
            yield (page.parent / path).resolve() if path else page, heading


def headings(page):
    """A page's headings, in the form used by links."""
    lines = re.findall(r"^#+ +(.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_resolves(page):
    for path, heading in links(page):
        assert path.exists(), f"{page.name} links to {path}"
        assert not heading or heading in headings(path), f"{page.name} links to {path.name}#{heading}"


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.name)
def test_the_readme_links_every_page(page):
    assert page in {path for path, _ in links(ROOT / "README.md")}


def test_the_version_is_one():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == __version__
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    released = re.findall(r"^## \[([\d.]+)\] - \d{4}-\d\d-\d\d$", changes, flags=re.MULTILINE)
    assert __version__ in released or f"To be {__version__}." in changes
    assert released and len(set(released)) == len(released)


def test_the_citation_names_what_it_must():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["license"] == "Apache-2.0"
    (paper,) = citation["references"]
    assert paper["identifiers"][0]["value"] == "arXiv:2507.22062" and paper["authors"]


def measured(benchmark):
    """The committed rows of a benchmark on CPUs."""
    (path,) = (ROOT / "benchmarks" / "results").glob(f"*_cpu_{benchmark}.json")
    return json.loads(path.read_text(encoding="utf-8"))


MEASURED = [
    ("training a small model", "train", "{samples_per_second_vs_open_clip:.2f}x; {full_vocab_vs_open_clip:.1f}x"),
    ("captions without padding", "packing", "{multi30k_text_tower_vs_padded:.1f}x; {multi30k_step_vs_padded:.1f}x"),
    (
        "contrastive loss of 8,192 pairs",
        "contrastive",
        "{speed_vs_open_clip_b8192:.2f}x faster; {vs_open_clip_b8192_memory:.2f}x",
    ),
    ("first curation stage", "curation", "{match_vs_release:.1f}x; {sample_vs_release:.1f}x"),
    (
        "reading tars",
        "loader",
        "{tar_vs_webdataset:.1f}x; {decode_fast_vs_open_clip:.1f}x, {decode_exact_vs_open_clip:.1f}x; "
        "{loader_vs_open_clip:.1f}x",
    ),
    ("retrieval on 3,600 images", "eval", "{retrieval_vs_clip_benchmark:.1f}x; {features_vs_open_clip:.1f}x"),
    ("copies among a million", "dedup", "{vs_faiss_multi_hash:.0f}x; {recall:.2f}, {precision:.2f}"),
    ("fetching images", "fetch", "{vs_img2dataset:.1f}x; {resized_vs_img2dataset:.1f}x"),
    ("how long training waits", "checkpoint", "{stall_vs_open_clip:.1f}x shorter"),
]


@pytest.mark.parametrize("begins, benchmark, result", MEASURED, ids=[one[1] for one in MEASURED])
def test_the_readme_has_the_ratios_of_the_rows(begins, benchmark, result):
    (line,) = re.findall(
        rf"^\| {begins}.* \| (.*) \|$", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.MULTILINE
    )
    assert line == result.format(**measured(benchmark)["ratios"])


def test_the_table_of_damaged_inputs_is_that_of_the_row():
    page, found = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8"), measured("fuzz")
    _, _, table = page.partition("| input | one line,")
    rows = {
        name: (int(line), int(done)) for name, line, done in re.findall(r"^\| (\w+) \| (\d+) \| (\d+) \|$", table, re.M)
    }
    assert rows.pop("all") == tuple(map(sum, zip(*rows.values(), strict=True)))
    assert rows == {row["input"]: (row["one line"], row["done"]) for row in found["rows"]} and not found["faults"]
    inputs, seconds = found["config"]["inputs"], found["seconds"]
    assert f"sends {inputs:,} damaged inputs" in page and f"{seconds} s on two cores" in page


def test_distillation_gains_and_patch_dropout_costs_what_the_page_says():
    """A distilled student gains at least 3 points; half of the patches with a tail cost at most 2."""
    page = (ROOT / "docs" / "ablations.md").read_text(encoding="utf-8")
    rows = {row["row"]: row["columns"]["mean"] for row in measured("digits_ablations")["rows"]}
    assert all(len(row["values"]) == 3 for row in rows.values())
    _, _, table = page.partition("| mean accuracy, per cent | |\n|---|---|\n")
    shown = re.findall(r"^\| .* \| ([\d.]+ ± [\d.]+) \|$", table, flags=re.MULTILINE)
    names = ("alone", "distilled", "every patch", "half of the patches, then all")
    assert shown == [f"{100 * rows[name]['mean']:.1f} ± {100 * rows[name]['stdev']:.1f}" for name in names]
    assert rows["distilled"]["mean"] >= rows["alone"]["mean"] + 0.03
    assert rows["half of the patches, then all"]["mean"] >= rows["every patch"]["mean"] - 0.02


def test_the_page_has_the_ratios_of_training_less():
    page = " ".join((ROOT / "docs" / "training.md").read_text(encoding="utf-8").split())
    ratios = measured("train_less")["ratios"]
    for who, shown in (
        ("step_vision_frozen", "{:.1f} times as fast with a frozen image tower"),
        ("step_stored_features", "{:.1f} times with stored features"),
        ("step_patch_dropout_0.5", "{:.1f} times with half of the patches dropped"),
        ("vision_tower_patch_dropout_0.5", "The image tower alone is {:.1f} times as fast on half of the patches"),
    ):
        assert shown.format(ratios[f"{who}_vs_whole"]) in page
    assert ratios["vision_tower_patch_dropout_0.5_vs_whole"] >= 1.5


def test_the_page_says_what_the_row_of_tuning_shows():
    page, found = " ".join((ROOT / "docs" / "tuning.md").read_text(encoding="utf-8").split()), measured("tune")
    search, ratios = found["config"], found["ratios"]
    fastest = ratios["tuned_vs_fastest_hand_written"]
    assert len(search["trials"]) <= 8 and search["seconds"] < 600 and fastest >= 1
    assert f"took {len(search['trials'])} trials and {search['seconds']:.0f} s" in page
    assert f"{fastest:.2f} times as fast as those of the fastest hand-written settings" in page
    assert f"{ratios['tuned_vs_default']:.2f} times as fast as the defaults'" in page
    tuned = next(row for row in found["rows"] if row["who"] == "tuned")
    assert tuned["max"] / tuned["min"] > fastest and "Single rounds spread by more than that." in page
    rounds = {len(row["samples"]) for row in found["rows"]}
    assert f"medians of {rounds.pop()} alternated rounds" in page and not rounds
