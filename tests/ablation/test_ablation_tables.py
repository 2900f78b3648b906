"""Means, sample standard deviations, and the table that shows them beside the paper's numbers."""

import json
from pathlib import Path
from statistics import stdev

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mc2_hpc.ablation.settings import Column
from mc2_hpc.ablation.tables import markdown, table_row
from mc2_hpc.ablation.training_runs import TrainingRun, read_columns
from mc2_hpc.errors import UserError


def table(*rows):
    known = {"pairs": 12_800, "english_share": 0.44}
    return {"title": "T", "mirrors": "table 2", "finding": "F.", "rows": [{**known, **row} for row in rows]}


def test_mean_and_sample_deviation_over_seeds():
    row = table_row("r", [0, 1, 2], [{"English": 0.1}, {"English": 0.2}, {"English": 0.3}], {"ImageNet": 64.7})
    entry = row["columns"]["English"]
    assert row["n"] == 3 and entry["values"] == [0.1, 0.2, 0.3]
    assert entry["mean"] == pytest.approx(0.2) and entry["stdev"] == pytest.approx(0.1)  # n - 1, not n
    assert table_row("r", [7], [{"English": 0.5}], {})["columns"]["English"]["stdev"] is None


@given(st.lists(st.floats(0, 1), min_size=2, max_size=9))
def test_they_are_numpys(values):
    entry = table_row("r", range(len(values)), [{"c": value} for value in values], {})["columns"]["c"]
    assert entry["mean"] == pytest.approx(np.mean(values))
    assert entry["stdev"] == pytest.approx(np.std(values, ddof=1), abs=1e-9)
    assert entry["stdev"] == stdev(values)


def test_the_papers_row_stands_beside_ours():
    rows = [
        table_row("one|two", [0, 1], [{"English": 0.5}, {"English": 0.6}], {"ImageNet": 67.5}),
        table_row("three", [0, 1], [{"English": 0.25}, {"English": 0.25}], {"ImageNet": 61.1, "Babel": 31.5}),
    ]
    rows[1]["english_share"] = None
    text = markdown([table(*rows)])
    assert "| row | pairs seen | English share | English | paper: ImageNet | paper: Babel |" in text
    assert "| one/two | 12,800 | 44 | 55.0 ± 7.1 | 67.5 | - |" in text
    assert "| three | 12,800 | - | 25.0 ± 0.0 | 61.1 | 31.5 |" in text
    assert "over 2 seeds" in text and "Mirrors table 2. F." in text
    single = markdown([table(table_row("r", [0], [{"English": 0.5}], {}))])
    assert "| 50.0 |" in single and "over 1 seed." in single


@pytest.mark.parametrize(
    "about, line",
    [({"mirrors": ""}, "F."), ({"finding": ""}, "Mirrors table 2."), ({"mirrors": "", "finding": ""}, None)],
)
def test_missing_texts_are_not_printed(about, line):
    lines = markdown([{**table(table_row("r", [0], [{"English": 0.5}], {})), **about}]).splitlines()
    assert lines[0] == "## T" and lines[1] == ""
    assert lines[2].startswith("| row |") if line is None else lines[2:4] == [line, ""]
    assert "Mirrors ." not in lines and not any("none" in text.lower() for text in lines)


@pytest.fixture
def run(tmp_path):
    groups = {"en": {"top1": 0.6}, "de": {"top1": 0.5}, "fr": {"top1": 0.1}}
    sets = {"good": {"groups": groups}, "bad": {"error": "test.parquet: no such file"}}
    (tmp_path / "results.json").write_text(json.dumps({"sets": sets}))
    return TrainingRun(title="t", folder=Path("f"), results=tmp_path / "results.json", commands=[], pairs=1)


def test_columns_choose_languages_and_how_to_join_them(run):
    columns = {
        "all": Column(set="good"),
        "English": Column(set="good", languages=["en"]),
        "others": Column(set="good", without=["en"]),
        "worst": Column(set="good", reduce="min"),
        "worst but fr": Column(set="good", without=["fr"], reduce="min"),
    }
    expected = {"all": 0.4, "English": 0.6, "others": 0.3, "worst": 0.1, "worst but fr": 0.5}
    assert read_columns(run, columns) == pytest.approx(expected)


@pytest.mark.parametrize(
    "column, message",
    [
        (Column(set="bad"), "was not scored: test.parquet: no such file; fix it and delete"),
        (Column(set="good", languages=["xx"]), "no language 'xx'; it has en, de, fr"),
        (Column(set="good", without=["xx"]), "no language 'xx'"),
        (Column(set="good", languages=["en"], without=["en"]), "leaves out every language"),
        (Column(set="good", metric="R@1"), "no metric 'R@1' in 'en'; it has top1"),
    ],
)
def test_a_number_that_is_not_there_is_an_error(column, message, run):
    with pytest.raises(UserError, match=message):
        read_columns(run, {"c": column})
