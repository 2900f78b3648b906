"""The report's plots, as PNG bytes; the same findings give the same bytes.

Labels are numbers, language codes and English names: metadata entries stay in HTML, where the browser has fonts for
every script.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from mc2_hpc.curation.report.findings import Findings, mass_curve
from mc2_hpc.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LANGUAGES = 30
_CURVES = 12
_LABELS = 16
_INK, _SOFT, _RULE, _BEFORE, _ACCENT = "#1d1b18", "#6d675e", "#e6e0d6", "#a89f90", "#b8442a"
_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "text.color": _INK,
    "axes.edgecolor": _RULE,
    "axes.labelcolor": _SOFT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "grid.color": _RULE,
    "grid.linewidth": 0.7,
    "xtick.color": _SOFT,
    "ytick.color": _SOFT,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "legend.frameon": False,
    "figure.facecolor": "white",
}


def require_matplotlib() -> None:
    """Raise a :class:`UserError` where the plots cannot be drawn; a long run can ask before it begins."""
    if find_spec("matplotlib") is None:
        raise UserError("the curation report needs matplotlib: pip install 'mc2_hpc[curation]'")


def draw_plots(findings: Findings) -> dict[str, bytes]:
    """PNG bytes of every plot by name: ``languages``, ``head_tail``, ``thresholds``.

    Raises:
        UserError: matplotlib is not installed.
    """
    require_matplotlib()
    import matplotlib

    plots = {"languages": _languages, "head_tail": _head_tail, "thresholds": _thresholds}
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # the reader's own settings would give other pictures
        matplotlib.rcParams.update(_STYLE)
        return {name: _png(plot(findings)) for name, plot in plots.items()}


def _languages(findings: Findings) -> Figure:
    """Share of the texts of the largest languages, before and after, on a log axis."""
    from matplotlib.ticker import LogLocator, NullFormatter

    shown = findings.languages[:_LANGUAGES]
    figure, (axes,) = _figure(9.6, 1.0 + 0.235 * len(shown))
    places = range(len(shown))
    before, after = [row.share_before for row in shown], [row.share_after for row in shown]
    axes.hlines(places, before, after, color=_RULE, linewidth=3, zorder=1)
    axes.scatter(before, places, color=_BEFORE, s=30, label="of matched texts", zorder=2)
    axes.scatter(after, places, color=_ACCENT, s=30, label="of texts expected after balancing", zorder=3)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(_percent)
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_yticks(places, [row.name for row in shown])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.spines["left"].set_visible(False)
    axes.margins(y=1.2 / max(len(shown), 2))
    figure.legend(loc="outside upper left", ncols=2)
    return figure


def _head_tail(findings: Findings) -> Figure:
    """Cumulative share of matches over entries sorted by count, with t and p, for the largest languages."""
    from matplotlib.ticker import NullFormatter

    shown = findings.languages[:_CURVES]
    columns = min(4, len(shown))
    rows = -(-len(shown) // columns)
    figure, panels = _figure(9.6, 0.5 + 1.95 * rows, rows, columns)
    p = findings.balance["p"]
    for axes, language in zip(panels, shown, strict=False):
        counts, mass = mass_curve(findings.folder.counts(language.code))
        t = language.threshold
        axes.axhline(p, color=_SOFT, linewidth=0.8, linestyle=(0, (4, 3)))
        axes.axvline(t, color=_ACCENT, linewidth=0.8, linestyle=(0, (4, 3)))
        axes.step(counts, mass, where="post", color=_INK, linewidth=1.4)
        axes.fill_between(counts, mass, step="post", where=counts <= t, color=_ACCENT, alpha=0.18, linewidth=0)
        axes.set_xscale("log")
        axes.set_xlim(*_whole_decades([1, int(counts[-1])]))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_ylim(0, 1.03)
        axes.yaxis.set_major_formatter(_percent)
        axes.label_outer(remove_inner_ticks=False)
        axes.tick_params(labelbottom=True)
        axes.set_title(language.name)
        axes.text(1, 1.04, f"t = {t:,}", transform=axes.transAxes, ha="right", color=_ACCENT, fontsize=8.5)
    for axes in panels[len(shown) :]:
        axes.set_visible(False)
    figure.supxlabel("on entries that occur in at most so many texts", color=_SOFT, fontsize=9)
    figure.supylabel("share of matches", color=_SOFT, fontsize=9)
    return figure


def _thresholds(findings: Findings) -> Figure:
    """Threshold of every language over its matched texts; the largest ones are named."""
    from matplotlib.ticker import NullFormatter

    figure, (axes,) = _figure(9.6, 4.2)
    languages = findings.languages
    texts, thresholds = [row.texts for row in languages], [row.threshold for row in languages]
    axes.scatter(texts, thresholds, s=22, color=_BEFORE, alpha=0.75, zorder=2)
    for row in languages[:_LABELS]:
        english = row.code == "en"
        axes.annotate(
            row.code,
            (row.texts, row.threshold),
            xytext=(5, 4),
            textcoords="offset points",
            color=_ACCENT if english else _INK,
            fontsize=8.5,
        )
        if english:
            axes.scatter([row.texts], [row.threshold], s=34, color=_ACCENT, zorder=3)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(*_whole_decades(texts))
    axes.set_ylim(*_whole_decades(thresholds))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(_number)
        axis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("matched texts of the language")
    axes.set_ylabel("threshold t")
    return figure


def _figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Figure, list[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False).ravel().tolist()


def _png(figure: Figure) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=180, metadata={"Software": None})
    return stream.getvalue()


def _whole_decades(values: Sequence[int]) -> tuple[float, float]:
    """Limits of a logarithmic axis that has two labelled powers of ten at least."""
    low = math.floor(math.log10(min(values)))
    high = max(math.ceil(math.log10(max(values))), low + 1)
    return 0.8 * 10.0**low, 1.25 * 10.0**high


def _percent(share: float, _: int) -> str:
    return f"{share:.3%}".rstrip("%").rstrip("0").rstrip(".") + "%" if share < 0.01 else f"{share:.0%}"


def _number(value: float, _: int) -> str:
    return f"{value:,.0f}"
