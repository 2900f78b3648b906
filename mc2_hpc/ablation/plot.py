"""One panel per ablation: each row's mean with its standard deviation, and a point for each seed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mc2_hpc.pages.palette import LIGHT
from mc2_hpc.pages.plots import new_figure, plot_style, png, require_plotting
from mc2_hpc.storage import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DPI = 120


def require_matplotlib() -> None:
    """Raise a :class:`UserError` if plots cannot be drawn; called before the first run."""
    require_plotting("the ablations' plots need", "curation")


def draw_panel(axes: Axes, table: Mapping[str, Any]) -> None:
    """Draw one ablation of ``ablations.json``: a group of bars per row, a bar per column."""
    rows, columns = table["rows"], list(table["rows"][0]["columns"])
    width = 0.8 / len(columns)
    for place, column in enumerate(columns):
        found = [row["columns"][column] for row in rows]
        centres = [number + (place - (len(columns) - 1) / 2) * width for number in range(len(rows))]
        axes.bar(
            centres,
            [100 * entry["mean"] for entry in found],
            0.92 * width,
            yerr=[100 * (entry["stdev"] or 0) for entry in found],
            error_kw={"elinewidth": 0.8, "ecolor": LIGHT["ink"]},
            alpha=0.75,
            label=column,
        )
        for centre, entry in zip(centres, found, strict=True):
            values = [100 * value for value in entry["values"]]
            axes.plot([centre] * len(values), values, ".", color=LIGHT["ink"], markersize=2)
    axes.set_xticks(range(len(rows)), [row["row"] for row in rows], rotation=20, ha="right", fontsize=7)
    axes.set_title(table["title"], fontsize=9)
    axes.set_ylabel("per cent")
    axes.grid(axis="x", visible=False)
    axes.margins(y=0.2)  # room for the legend
    axes.legend(fontsize=6.5, loc="upper center", ncols=len(columns), columnspacing=1, handlelength=1)


def draw(table: Mapping[str, Any], path: Path) -> None:
    """Write one ablation's plot as PNG."""
    with plot_style(), atomic_path(path) as temporary:
        figure, (axes,) = new_figure(2 + 1.3 * len(table["rows"]), 4)
        draw_panel(axes, table)
        temporary.write_bytes(png(figure, DPI))
