"""A panel an ablation: every row's mean with its standard deviation, every seed a point."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mc2_hpc.errors import UserError
from mc2_hpc.storage import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def require_matplotlib() -> None:
    """Raise a :class:`UserError` where nothing could be drawn; asked before the first run."""
    if find_spec("matplotlib") is None:
        raise UserError("the ablations' plots need matplotlib: pip install 'mc2_hpc[curation]'")


def draw_panel(axes: Axes, table: Mapping[str, Any]) -> None:
    """Draw one ablation of ``ablations.json``, a group of bars a row, a bar a column."""
    rows, columns = table["rows"], list(table["rows"][0]["columns"])
    width = 0.8 / len(columns)
    for place, column in enumerate(columns):
        found = [row["columns"][column] for row in rows]
        centres = [number + (place - (len(columns) - 1) / 2) * width for number in range(len(rows))]
        axes.bar(
            centres,
            [100 * entry["mean"] for entry in found],
            width,
            yerr=[100 * (entry["stdev"] or 0) for entry in found],
            error_kw={"elinewidth": 0.8},
            alpha=0.6,
            label=column,
        )
        for centre, entry in zip(centres, found, strict=True):
            values = [100 * value for value in entry["values"]]
            axes.plot([centre] * len(values), values, "k.", markersize=2)
    axes.set_xticks(range(len(rows)), [row["row"] for row in rows], rotation=20, ha="right", fontsize=7)
    axes.set_title(table["title"], fontsize=9)
    axes.set_ylabel("per cent")
    axes.grid(axis="y", alpha=0.3)
    axes.margins(y=0.2)  # room for the legend
    axes.legend(fontsize=6, loc="upper center", ncols=len(columns), frameon=False, columnspacing=1, handlelength=1)


def draw(table: Mapping[str, Any], path: Path) -> None:
    """Write one ablation's plot as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2 + 1.3 * len(table["rows"]), 4), layout="constrained")
    draw_panel(figure.add_subplot(), table)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120, metadata={"Software": None})
