"""The curation report's plots. Labels are numbers, language codes and English names; entries appear only in HTML."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from markupsafe import Markup

from mc2_hpc.curation.report.findings import Findings, mass_curve
from mc2_hpc.pages.palette import LIGHT
from mc2_hpc.pages.plots import new_figure, plot_style, png, require_plotting, short_ticks, svg

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LANGUAGES = 30
_CURVES = 12
_COLUMNS = 4
_LABELS = 24
_LONGEST_TITLE = 27
_LONGEST_LABEL = 44
_POINTS_PER_DECADE = 80
_DOT = 4
"""Radius reserved for a dot, in pixels."""


@dataclass(frozen=True)
class Plot:
    """One plot in both formats."""

    png: bytes
    svg: Markup


def require_matplotlib() -> None:
    """Raise a :class:`UserError` if the plots cannot be drawn; a long run can check before it starts."""
    require_plotting("the curation report needs", "curation")


def draw_plots(findings: Findings) -> dict[str, Plot]:
    """Every plot by name: ``languages``, ``head_tail``, ``thresholds``.

    Raises:
        UserError: matplotlib is not installed.
    """
    require_matplotlib()
    plots = {}
    with plot_style():
        for name, (draw, title) in _PLOTS.items():
            figure = draw(findings)
            plots[name] = Plot(png(figure), svg(figure, name, title))
    return plots


def _languages(findings: Findings) -> Figure:
    """The largest languages' share of the texts, before and after, on a log axis."""
    from matplotlib.ticker import LogLocator, NullLocator

    shown = findings.languages[:_LANGUAGES]
    figure, (axes,) = new_figure(9.6, 1.0 + 0.235 * len(shown))
    places = range(len(shown))
    before, after = [row.share_before for row in shown], [row.share_after for row in shown]
    axes.hlines(places, before, after, color=LIGHT["rule"], linewidth=3, zorder=1)
    axes.scatter(before, places, color=LIGHT["before"], s=30, label="of matched texts", zorder=2)
    axes.scatter(after, places, color=LIGHT["accent"], s=30, label="of texts expected after balancing", zorder=3)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(_percent)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_yticks(places, [shortened(row.name, _LONGEST_LABEL) for row in shown])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.spines["left"].set_visible(False)
    axes.margins(y=1.2 / max(len(shown), 2))
    figure.legend(loc="outside upper left", ncols=2)
    return figure


def _head_tail(findings: Findings) -> Figure:
    """Cumulative share of matches over entries sorted by count, with t and p, for the largest languages."""
    shown = findings.languages[:_CURVES]
    rows = -(-len(shown) // _COLUMNS)
    figure, panels = new_figure(9.6, 0.5 + 2.1 * rows, rows, min(_COLUMNS, len(shown)))
    p = findings.balance["p"]
    for axes, language in zip(panels, shown, strict=False):
        counts, mass = thinned(*mass_curve(findings.folder.counts(language.code)))
        t = language.threshold
        axes.axhline(p, color=LIGHT["soft"], linewidth=0.8, linestyle=(0, (4, 3)))
        axes.axvline(t, color=LIGHT["accent"], linewidth=0.8, linestyle=(0, (4, 3)))
        axes.step(counts, mass, where="post", color=LIGHT["ink"], linewidth=1.4)
        axes.fill_between(counts, mass, step="post", where=counts <= t, color=LIGHT["accent"], alpha=0.18, linewidth=0)
        axes.set_xscale("log")
        axes.set_xlim(*_whole_decades([1, int(counts[-1])]))
        _thousands(axes.xaxis)
        axes.set_ylim(0, 1.03)
        axes.yaxis.set_major_formatter(_percent)
        axes.label_outer(remove_inner_ticks=False)
        axes.tick_params(labelbottom=True)
        # t has its own line because it would overlap a long name beside it.
        axes.set_title(shortened(language.name, _LONGEST_TITLE), pad=16)
        axes.text(0, 1.035, f"t = {t:,}", transform=axes.transAxes, color=LIGHT["accent"], fontsize=8.5)
    for axes in panels[len(shown) :]:
        axes.set_visible(False)
    figure.supxlabel("on entries that occur in at most this many texts", color=LIGHT["soft"], fontsize=9)
    figure.supylabel("share of matches", color=LIGHT["soft"], fontsize=9)
    return figure


def _thresholds(findings: Findings) -> Figure:
    """Threshold of every language over its matched texts; the largest are labelled where there is room."""
    figure, (axes,) = new_figure(9.6, 4.6)
    languages = findings.languages
    texts, thresholds = [row.texts for row in languages], [row.threshold for row in languages]
    colours = [LIGHT["accent"] if row.code == "en" else LIGHT["before"] for row in languages]
    axes.scatter(texts, thresholds, s=22, color=colours, zorder=2)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(*_whole_decades(texts))
    axes.set_ylim(*_whole_decades(thresholds))
    for axis in (axes.xaxis, axes.yaxis):
        short_ticks(axis)
    axes.set_xlabel("matched texts of the language")
    axes.set_ylabel("threshold t")
    _name_points(figure, axes, {row.code: (row.texts, row.threshold) for row in languages})
    return figure


_PLOTS: Mapping[str, tuple[Callable[[Findings], Figure], str]] = {
    "languages": (_languages, "Share of each language before and after balancing"),
    "head_tail": (_head_tail, "Cumulative share of matches over entries sorted by count"),
    "thresholds": (_thresholds, "Threshold of each language over its matched texts"),
}


def _name_points(figure: Figure, axes: Any, points: Mapping[str, tuple[float, float]]) -> None:
    """Label the first points, leaving out names that would cover a point or another name on every side."""
    figure.draw_without_rendering()  # fixes the layout, so that positions are known
    dots = axes.transData.transform(list(points.values()))
    taken: list[Any] = []
    sides = ((6, 0, "left"), (-6, 0, "right"), (0, 8, "center"), (0, -8, "center"))
    for place, (name, point) in enumerate(points.items()):
        if place == _LABELS:
            break
        for x, y, align in sides:
            colour = LIGHT["accent"] if name == "en" else LIGHT["ink"]
            label = axes.annotate(
                name, point, (x, y), textcoords="offset points", ha=align, va="center", color=colour, fontsize=8.5
            )
            box = label.get_window_extent()
            covers_dot = box.padded(_DOT).count_contains(np.delete(dots, place, axis=0))
            if not covers_dot and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
            label.remove()


def shortened(name: str, longest: int) -> str:
    """The name, truncated if it is longer than its place."""
    return name if len(name) <= longest else name[: longest - 1].rstrip() + "\N{HORIZONTAL ELLIPSIS}"


def thinned(
    counts: npt.NDArray[np.uint64], mass: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.float64]]:
    """The curve with no more points than a log axis can show apart: the last of each narrow band, and both ends."""
    bands = np.floor(np.log10(counts.astype(np.float64)) * _POINTS_PER_DECADE)
    last = np.append(bands[1:] != bands[:-1], True)
    last[0] = True
    return counts[last], mass[last]


def _thousands(axis: Any) -> None:
    """At most five ticks of a log axis, as 1, 1k, 1M."""
    from matplotlib.ticker import LogLocator

    axis.set_major_locator(LogLocator(numticks=5))
    short_ticks(axis)


def _whole_decades(values: Sequence[int]) -> tuple[float, float]:
    """Limits of a logarithmic axis that has at least two labelled powers of ten."""
    low = math.floor(math.log10(min(values)))
    high = max(math.ceil(math.log10(max(values))), low + 1)
    return 0.8 * 10.0**low, 1.25 * 10.0**high


def _percent(share: float, _: int) -> str:
    return f"{share:.3%}".rstrip("%").rstrip("0").rstrip(".") + "%" if share < 0.01 else f"{share:.0%}"
