"""``mc2 plan --html FILE``: plans on one self-contained page, without scripts or network."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from mc2_hpc.pages import write_page
from mc2_hpc.planning.plan import Plan, Total
from mc2_hpc.planning.plots import draw_plots
from mc2_hpc.planning.scaling import Point, takes_over


@dataclass(frozen=True, kw_only=True)
class Cost:
    """A part of the predicted step."""

    name: str
    seconds: float
    share: float
    """Of the step."""
    of_most: float
    """Of the largest part."""
    limit: str
    """``flops``, ``memory`` or ``network``."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """The predicted step at one number of GPUs; strong scaling ends earlier."""

    gpus: int
    weak: Point
    strong: Point | None


@dataclass(frozen=True, kw_only=True)
class View:
    """One plan as the template shows it."""

    name: str
    plan: Plan
    values: Mapping[str, Any]
    """As ``--json`` has them."""
    costs: Sequence[Cost]
    scales: Sequence[Scale]
    weak_bound: int | None
    """GPUs from which the network bounds the step."""
    strong_bound: int | None
    plots: Mapping[str, Markup]


def write_plan_page(path: Path, names: Sequence[str], plans: Sequence[Plan], total: Total | None = None) -> Path:
    """Write the page of plans; returns ``path``.

    Args:
        names: of the configs, or of the stages of one.
        total: of all stages, if they are planned.
    """
    views = [_view(name, plan, f"plan{number}") for number, (name, plan) in enumerate(zip(names, plans, strict=True))]
    return write_page(path, "mc2_hpc.planning", "plan.html", {"views": views, "total": total})


def costs(plan: Plan) -> list[Cost]:
    """The parts of the step, largest first: classes of kernels, and communication that they do not hide."""
    parts = [(name, seconds, plan.step.limits[name]) for name, seconds in plan.step.compute.items()]
    parts.append(("exposed communication", plan.step.exposed, "network"))
    most = max(seconds for _, seconds, _ in parts)
    return [
        Cost(name=name, seconds=seconds, share=seconds / plan.step.seconds, of_most=seconds / most, limit=limit)
        for name, seconds, limit in sorted(parts, key=lambda part: -part[1])
    ]


def _view(name: str, plan: Plan, prefix: str) -> View:
    weak, strong = (list(plan.scaling(strong=each)) if plan.gpus > 1 else [] for each in (False, True))
    return View(
        name=name,
        plan=plan,
        values=plan.to_json(),
        costs=costs(plan),
        scales=[
            Scale(gpus=point.gpus, weak=point, strong=strong[place] if place < len(strong) else None)
            for place, point in enumerate(weak)
        ],
        weak_bound=takes_over(iter(weak)),
        strong_bound=takes_over(iter(strong)),
        plots=draw_plots(plan, prefix),
    )
