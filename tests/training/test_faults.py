"""Every row of the fault matrix: after any fault, the resumed run equals the undisturbed one."""

import json

import pytest

from tests.faults import matrix
from tests.faults.diary import account, count_samples, losses
from tests.faults.rows import ROWS, STEPS


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return matrix.prepare(tmp_path_factory.mktemp("pool"))


@pytest.fixture(scope="module")
def undisturbed(config, starter, tmp_path_factory):
    return matrix.run_undisturbed(config, tmp_path_factory.mktemp("undisturbed"), starter)


def test_undisturbed(undisturbed):
    """The reference for the rows: each epoch has every sample once."""
    assert account(undisturbed) == {"steps_lost": 0, "recovery_seconds": None}
    assert count_samples(undisturbed) == {"samples_lost": 0, "samples_repeated": 0}
    assert sorted(losses(undisturbed)) == list(range(1, STEPS + 1))


@pytest.mark.parametrize(
    "row",
    [pytest.param(row, id=f"{row.fault}: {row.moment}", marks=[pytest.mark.slow] if row.slow else []) for row in ROWS],
)
def test_row(row, config, undisturbed, starter, tmp_path):
    try:
        figures = matrix.run_row(row, config, tmp_path / "row", starter, undisturbed)
    except matrix.CannotMount as error:
        pytest.skip(str(error))
    print(figures)


def test_the_table_in_the_docs_is_the_newest_measured_one():
    results = sorted(matrix.RESULTS.glob("*_faults.json"))
    rows = json.loads(results[-1].read_text(encoding="utf-8"))["rows"] if results else None
    assert matrix.table(rows) in matrix.DOCS.read_text(encoding="utf-8")
    if rows is not None:
        measured = {(row["fault"], row["moment"], row["outcome"]) for row in rows}
        assert measured <= {(row.fault, row.moment, row.outcome) for row in ROWS}, "measure again"
