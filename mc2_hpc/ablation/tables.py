"""Tables from every seed's numbers: means, sample standard deviations, and the paper's numbers beside ours."""

from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any


def table_row(
    name: str, seeds: Sequence[int], numbers: Sequence[Mapping[str, float]], paper: Mapping[str, float]
) -> dict[str, Any]:
    """A row of :func:`markdown` and of ``ablations.json``.

    Args:
        numbers: by column, in [0, 1], one mapping per seed.

    Returns:
        ``columns``: for each, its ``values`` (one per seed), ``mean`` and ``stdev``, the sample standard deviation
        (divided by n - 1), which is null for one seed.
    """
    columns = {}
    for column in numbers[0]:
        values = [of_seed[column] for of_seed in numbers]
        columns[column] = {
            "values": values,
            "mean": fmean(values),
            "stdev": stdev(values) if len(values) > 1 else None,
        }
    return {"row": name, "seeds": list(seeds), "n": len(seeds), "columns": columns, "paper": dict(paper)}


def markdown(tables: Sequence[Mapping[str, Any]]) -> str:
    """Every ablation's title, what the paper found, and its table, in per cent."""
    return "\n".join(line for table in tables for line in _section(table))


def _section(table: Mapping[str, Any]) -> list[str]:
    ours = list(table["rows"][0]["columns"])
    paper = list(dict.fromkeys(column for row in table["rows"] for column in row["paper"]))
    head = ["row", "pairs seen", "English share", *ours, *(f"paper: {column}" for column in paper)]
    about = [f"Mirrors {table['mirrors']}."] if table["mirrors"] else []
    about += [table["finding"]] if table["finding"] else []
    lines = [f"## {table['title']}", "", *([" ".join(about), ""] if about else [])]
    lines += [_line(head), f"|{'---|' * len(head)}"]
    for row in table["rows"]:
        share = row["english_share"]
        cells = [row["row"], f"{row['pairs']:,}", "-" if share is None else f"{100 * share:.0f}"]
        cells += [_spread(row["columns"][column]) for column in ours]
        cells += [f"{row['paper'][column]:.1f}" if column in row["paper"] else "-" for column in paper]
        lines.append(_line(cells))
    counts = sorted({row["n"] for row in table["rows"]})
    seeds = " or ".join(map(str, counts))
    return [*lines, "", f"Per cent, mean ± sample standard deviation over {seeds} seed{'s' * (counts != [1])}.", ""]


def _spread(column: Mapping[str, Any]) -> str:
    mean = f"{100 * column['mean']:.1f}"
    return mean if column["stdev"] is None else f"{mean} ± {100 * column['stdev']:.1f}"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"
