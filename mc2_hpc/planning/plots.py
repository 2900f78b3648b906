"""The plots of a plan's page: memory over the step, and the step from 1 to 4,096 GPUs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from mc2_hpc.pages.palette import LIGHT, SERIES
from mc2_hpc.pages.plots import new_figure, plot_style, short_ticks, svg
from mc2_hpc.planning.plan import RESERVE_BYTES, Plan
from mc2_hpc.planning.records import CATEGORIES
from mc2_hpc.planning.scaling import MOST_GPUS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_GIB = 1 << 30
_COLOURS = dict(zip(CATEGORIES, (*SERIES, LIGHT["before"], LIGHT["good"]), strict=True))
_NARROWEST_PHASE = 0.06
"""Of the step's operators: narrower phases have no room for their name."""


def draw_plots(plan: Plan, name: str) -> dict[str, Markup]:
    """The plots of a plan by name: ``memory`` and, for several GPUs, ``scaling``.

    Args:
        name: unique on the page.
    """
    drawings: dict[str, tuple[Callable[[Plan], Figure], str]] = {
        "memory": (_memory, "Memory of a rank over the operators of a step, by category"),
    }
    if plan.gpus > 1:
        drawings["scaling"] = (_scaling, "Predicted pairs per second from 1 to 4,096 GPUs")
    with plot_style():
        return {key: svg(draw(plan), f"{name}-{key}", title) for key, (draw, title) in drawings.items()}


def _memory(plan: Plan) -> Figure:
    """Stacked categories over operators, phases of the step, and the device's memory."""
    figure, (axes,) = new_figure(9.6, 4.4)
    timeline = plan.trace.timeline
    operators = [moment.operator for moment in timeline]
    used = [category for category in CATEGORIES if any(moment.by_category[category] for moment in timeline)]
    axes.stackplot(
        operators,
        [[moment.by_category[category] / _GIB for moment in timeline] for category in used],
        labels=used,
        colors=[_COLOURS[category] for category in used],
        linewidth=0,
    )
    limit = (plan.gpu.memory_bytes - RESERVE_BYTES) / _GIB
    top = plan.trace.peak.bytes / _GIB
    if limit < 3 * top:  # otherwise the step would be a strip at the bottom
        label = f"{plan.gpu_name}: {limit:.0f} GiB without a reserve of {RESERVE_BYTES / _GIB:.0f} GiB"
        axes.axhline(limit, color=LIGHT["ink"], linewidth=1, linestyle=(0, (4, 3)), label=label)
    axes.set_xlim(operators[0], operators[-1])
    axes.set_ylim(0, 1.12 * max(top, limit if limit < 3 * top else 0))
    for phase, begin, end in _phases(plan):
        axes.axvline(begin, color=LIGHT["rule"], linewidth=0.8)
        if end - begin > _NARROWEST_PHASE * operators[-1]:
            axes.text((begin + end) / 2, 0.97, phase, transform=axes.get_xaxis_transform(), ha="center", va="top")
    axes.set_xlabel("operators since the step began")
    axes.set_ylabel("GiB")
    short_ticks(axes.xaxis)
    figure.legend(loc="outside upper left", ncols=4)
    return figure


def _phases(plan: Plan) -> list[tuple[str, int, int]]:
    """Each phase with its first and last operator, in order; micro-batches alternate phases, which are merged."""
    spans: list[tuple[str, int, int]] = []
    for moment in plan.trace.timeline:
        if spans and spans[-1][0] == moment.phase:
            spans[-1] = (moment.phase, spans[-1][1], moment.operator)
        elif moment.phase:
            spans.append((moment.phase, moment.operator, moment.operator))
    return spans


def _scaling(plan: Plan) -> Figure:
    """Pairs per second, weak and strong, with and without the network; a ring marks where it takes over."""
    figure, (axes,) = new_figure(9.6, 4.4)
    for (name, strong), colour in zip((("weak", False), ("strong", True)), SERIES, strict=False):
        points = list(plan.scaling(strong=strong))
        gpus, rates = [point.gpus for point in points], [point.pairs_per_second for point in points]
        label = "weak: the same pairs per GPU" if not strong else "strong: the same global batch"
        axes.plot(gpus, rates, color=colour, linewidth=1.8, marker="o", markersize=3.5, label=label)
        alone = [point.pairs_per_second * point.seconds / (point.seconds - point.exposed) for point in points]
        axes.plot(gpus, alone, color=colour, linewidth=0.9, linestyle=(0, (4, 3)))
        first = next((point for point in points if point.network_bound), None)
        if first is not None:
            where = (first.gpus, first.pairs_per_second)
            axes.plot(*where, marker="o", markersize=11, markerfacecolor="none", markeredgecolor=colour)
            axes.annotate(
                f"{name}: the network takes over at {first.gpus:,}", where, (8, -14), textcoords="offset points"
            )
    axes.plot(
        [], [], color=LIGHT["soft"], linewidth=0.9, linestyle=(0, (4, 3)), label="without waiting for the network"
    )
    axes.axvline(plan.gpus, color=LIGHT["rule"], linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlim(0.8, 1.25 * MOST_GPUS)
    for axis in (axes.xaxis, axes.yaxis):
        short_ticks(axis)
    axes.xaxis.set_major_formatter(_whole)
    axes.set_xlabel("GPUs")
    axes.set_ylabel("pairs per second, predicted")
    figure.legend(loc="outside upper left", ncols=3)
    return figure


def _whole(value: float, _: Any) -> str:
    return f"{value:,.0f}"
