"""``mc2 ablate``: train each row of several ablations once per seed, and write tables and plots.

out/curated, tokenizers, runs     results by content address, shared between rows and files (prepare, training_runs)
out/ablations.json, ablations.md  the tables
out/<ablation>.png                one plot per ablation
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mc2_hpc.ablation.addresses import address, content
from mc2_hpc.ablation.plot import draw, require_matplotlib
from mc2_hpc.ablation.prepare import curate, english_share, tokenize
from mc2_hpc.ablation.processes import run_all
from mc2_hpc.ablation.settings import Ablation, Row, load_ablation
from mc2_hpc.ablation.tables import markdown, table_row
from mc2_hpc.ablation.training_runs import TrainingRun, plan_run, read_columns
from mc2_hpc.errors import UserError
from mc2_hpc.evaluation.suite import load_suite
from mc2_hpc.storage import exclusive_folder, write_json, write_text

Report = Callable[[str, int, int, str], None]
"""Called with (stage, done, total, what was just done)."""

Planned = list[tuple[Row, float | None, list[TrainingRun]]]
"""Rows with their expected English share and one run per seed."""


def ablate(
    files: Sequence[str | Path], overrides: Sequence[str], out: str | Path, *, jobs: int, report: Report
) -> list[dict[str, Any]]:
    """Execute the runs in the files that are not done yet; write tables and plots to ``out``.

    Args:
        jobs: training runs at a time, one thread each.

    Returns:
        the tables, in the form of ``ablations.json``

    Raises:
        UserError: bad files, data or settings (before any run starts), or a run failed (the message names its log).
    """
    require_matplotlib()
    out = Path(out)
    ablations = [load_ablation(path, overrides) for path in files]
    names = [ablation.name for ablation in ablations]
    for path, name in zip(files, names, strict=True):
        if names.count(name) > 1:
            raise UserError(f"{path}: another file is also called {name!r}; rename one, plots are named after files")
    with exclusive_folder(out):
        planned = _plan(ablations, out, report)
        runs = {run.results: run for rows in planned for _, _, of_row in rows for run in of_row}
        missing = [run for run in runs.values() if not run.done]
        if missing:
            run_all(missing, jobs, lambda done, total, title: report("runs", done, total, title))
        tables = [_table(ablation, rows) for ablation, rows in zip(ablations, planned, strict=True)]
        write_json(out / "ablations.json", {"ablations": tables})
        write_text(out / "ablations.md", markdown(tables))
        for table in tables:
            draw(table, out / f"{table['name']}.png")
    return tables


def _plan(ablations: Sequence[Ablation], out: Path, report: Report) -> list[Planned]:
    """All runs of all rows; their shards and tokenizers are made here."""
    contents = _Contents()
    planned: list[Planned] = []
    total = sum(len(ablation.rows) for ablation in ablations)
    done = 0
    for ablation in ablations:
        data = ablation.data
        pool, metadata, suite = contents.of(data.pool), contents.of(data.metadata), _suite_address(ablation, contents)
        rows: Planned = []
        for row in ablation.rows:
            curated = curate(row.curation, data, pool, metadata, out)
            tokenizer = tokenize(row.tokenizer, data, pool, out)
            runs = [plan_run(ablation, row, seed, curated, tokenizer, suite, out) for seed in ablation.seeds]
            rows.append((row, english_share(row.curation, curated.path), runs))
            done += 1
            report("curate", done, total, f"{ablation.name}: {row.name}")
        planned.append(rows)
    return planned


class _Contents:
    """Content addresses, each computed once."""

    def __init__(self) -> None:
        self._known: dict[Path, str] = {}

    def of(self, path: str | Path) -> str:
        path = Path(path)
        if path not in self._known:
            self._known[path] = content(path)
        return self._known[path]


def _suite_address(ablation: Ablation, contents: _Contents) -> str:
    """Address of the suite's settings and of the files at its sets' paths."""
    suite = load_suite(ablation.suite)
    return address(
        sets={
            name: {**dataclasses.asdict(entry), "content": contents.of(Path(suite.root) / entry.path)}
            for name, entry in suite.sets.items()
        }
    )


def _table(ablation: Ablation, planned: Planned) -> dict[str, Any]:
    rows = []
    for row, share, runs in planned:
        numbers = [read_columns(run, ablation.columns) for run in runs]
        rows.append(
            {
                **table_row(row.name, ablation.seeds, numbers, row.paper),
                "pairs": runs[0].pairs,
                "english_share": share,
                "curation": dataclasses.asdict(row.curation),
                "tokenizer": dataclasses.asdict(row.tokenizer),
                "runs": [run.folder.name for run in runs],
            }
        )
    about = {key: getattr(ablation, key) for key in ("name", "title", "mirrors", "finding")}
    return {**about, "rows": rows}
