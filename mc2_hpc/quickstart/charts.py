"""The quickstart report's plots, as inline SVG."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from mc2_hpc.pages.numbers import short_number
from mc2_hpc.pages.palette import LIGHT
from mc2_hpc.pages.plots import new_figure, plot_style, short_ticks, svg

Point = tuple[float, float]


def line_chart(name: str, points: Sequence[Point], smooth: Sequence[Point], *, x_label: str, y_label: str) -> Markup:
    """``points`` as a faint line with ``smooth`` on top, y starting at 0, the last value marked.

    Args:
        name: of the drawing, unique on the page.
        points: (x, y), x ascending; at least one.
        smooth: likewise.
    """
    with plot_style():
        figure, (axes,) = new_figure(5.2, 2.6)
        axes.plot(*zip(*points, strict=True), color=LIGHT["before"], linewidth=0.8, alpha=0.6)
        axes.plot(*zip(*smooth, strict=True), color=LIGHT["accent"], linewidth=1.8)
        axes.plot(*smooth[-1], "o", color=LIGHT["accent"], markersize=5)
        axes.set(xlabel=x_label, ylabel=y_label)
        axes.set_ylim(0, 1.05 * max(max(y for _, y in points), 1e-9))
        axes.margins(x=0.02)
        axes.grid(axis="x", visible=False)
        for axis in (axes.xaxis, axes.yaxis):
            short_ticks(axis)
        ends = [short_number(y) for y in (smooth[0][1], smooth[-1][1])]
        return svg(figure, name, f"{y_label}: {ends[0]} at the start, {ends[1]} at the end")


def head_tail(name: str, before: Sequence[float], after: Sequence[float], *, threshold: float) -> Markup:
    """Entry counts, most frequent first, before (filled) and after balancing (line), on a log scale.

    Args:
        name: of the drawing, unique on the page.
        before: counts in descending order; zeros end the curve.
        after: expected counts after balancing, in descending order.
        threshold: drawn as a dashed line.
    """
    from matplotlib.ticker import LogLocator

    ranks = range(1, len(before) + 1)
    highest = max(before[0], threshold, 10.0)
    with plot_style():
        figure, (axes,) = new_figure(2.5, 1.45)
        axes.fill_between(
            ranks, [max(count, 0.5) for count in before], 0.5, color=LIGHT["before"], alpha=0.55, linewidth=0
        )
        axes.axhline(threshold, color=LIGHT["ink"], linewidth=0.9, linestyle=(0, (4, 3)))
        kept = [(rank, count) for rank, count in zip(ranks, after, strict=True) if count >= 0.5]
        if kept:
            axes.plot(*zip(*kept, strict=True), color=LIGHT["accent"], linewidth=1.8)
        axes.set_yscale("log")
        axes.set_ylim(0.5, 1.3 * highest)
        axes.set_xlim(0.5, max(len(before), 2) + 0.5)
        axes.yaxis.set_major_locator(LogLocator(numticks=5))
        short_ticks(axes.yaxis)
        axes.set_xticks([1, max(len(before), 2)], ["most frequent", "rarest"])
        for label, side in zip(axes.get_xticklabels(), ("left", "right"), strict=True):
            label.set_horizontalalignment(side)
        axes.grid(axis="x", visible=False)
        title = f"most frequent: {before[0]:,.0f} before, {after[0]:,.0f} after; threshold {threshold:,.0f}"
        return svg(figure, name, title)


def moving_average(points: Sequence[Point], window: int) -> list[Point]:
    """Trailing mean of y over up to ``window`` points."""
    return [
        (x, sum(y for _, y in points[max(0, i - window + 1) : i + 1]) / (i - max(0, i - window + 1) + 1))
        for i, (x, _) in enumerate(points)
    ]
