"""The result of a tuning as a table, as YAML overrides, as a plot, and as a copy of the config."""

from collections.abc import Sequence
from pathlib import Path

from mc2_hpc.config import yaml_text
from mc2_hpc.pages.palette import LIGHT, SERIES
from mc2_hpc.pages.plots import new_figure, plot_style, png, require_plotting
from mc2_hpc.storage import atomic_path, write_json, write_text
from mc2_hpc.tuning.breakdown import CAUSES
from mc2_hpc.tuning.record import TrialResult
from mc2_hpc.tuning.rewrite import nested, rewritten
from mc2_hpc.tuning.space import name_of
from mc2_hpc.tuning.tune import Tuning

_DPI = 120
_COLUMNS = ("pairs/s", "steps", "ms/step", *CAUSES)


def require_matplotlib() -> None:
    """Raise a :class:`UserError` if the plot cannot be drawn; called before the first trial."""
    require_plotting("the plot of mc2 tune needs", "curation")


def ranked(results: Sequence[TrialResult]) -> list[TrialResult]:
    """The fastest first; those that failed last."""
    return sorted(results, key=lambda result: (not result.ok, -result.pairs_per_second))


def table(tuning: Tuning) -> list[str]:
    """One line per trial: the rate, and the step in milliseconds by what it is spent on."""
    rows = [(*_numbers(result), name_of(result.settings)) for result in ranked(tuning.results)]
    lines = ["".join(f"{name:>9}" for name in _COLUMNS) + "  settings"]
    for *numbers, name in rows:
        lines.append("".join(f"{number:>9}" for number in numbers) + f"  {name}")
    return lines


def _numbers(result: TrialResult) -> list[str]:
    if not result.ok:
        return [*("" for _ in _COLUMNS[:-1]), result.status]
    waits = result.waits
    parts = [f"{1e3 * getattr(waits, cause):,.0f}" if waits is not None else "-" for cause in CAUSES]
    seconds = f"{1e3 * waits.seconds:,.0f}" if waits is not None else "-"
    return [f"{result.pairs_per_second:,.1f}", _steps(result), seconds, *parts]


def _steps(result: TrialResult) -> str:
    return str(result.steps) if result.turns == 1 else f"{result.turns}x{result.steps}"


def summary(tuning: Tuning) -> list[str]:
    """What was found, in a few lines."""
    best = tuning.best
    lines = [f"{best.pairs_per_second:,.1f} pairs/s: {name_of(best.settings)}"]
    if tuning.given is None:
        lines.append("as given, the config does not fit into memory")
    elif best.settings:
        lines.append(f"{tuning.gain:.2f}x the config as it is given ({tuning.given.pairs_per_second:,.1f} pairs/s)")
    else:
        lines.append("nothing that was tried is faster than the config as it is given")
    if best.waits is not None:
        share = getattr(best.waits, best.waits.limit) / best.waits.seconds
        lines.append(f"what limits it: {best.waits.limit}, {share:.0%} of the step")
    return lines


def header(tuning: Tuning) -> list[str]:
    """The measured rows, for the head of a file."""
    machine = tuning.machine
    return [f"mc2 tune on {machine.name}, {machine.ranks} rank(s):", *summary(tuning), *table(tuning)]


def write_report(tuning: Tuning, out: Path) -> None:
    """Write ``best.yaml``, ``tune.json`` and ``tune.png``."""
    write_json(out / "tune.json", tuning.to_json())
    settings = yaml_text(nested(tuning.best.settings)) if tuning.best.settings else "{}\n"
    write_text(out / "best.yaml", _commented(header(tuning)) + settings)
    draw(tuning, out / "tune.png")


def write_config(tuning: Tuning, source: Path, overrides: Sequence[str], target: Path) -> None:
    """Write a copy of the config with its overrides and the best settings, and the measured rows in its header.

    Raises:
        UserError: the copy would not be the config that was measured.
    """
    text = rewritten(source, overrides, tuning.best.settings)
    write_text(target, _commented(header(tuning)) + text)


def _commented(lines: Sequence[str]) -> str:
    return "".join(f"# {line}".rstrip() + "\n" for line in lines)


def draw(tuning: Tuning, path: Path) -> None:
    """A bar per trial: its rate with the range of its rows, and its step by what it is spent on."""
    results = [result for result in ranked(tuning.results) if result.ok]
    names = [f"{name_of(result.settings)}, {_steps(result)} steps" for result in results]
    places = range(len(results))
    with plot_style(), atomic_path(path) as temporary:
        figure, (left, right) = new_figure(11, 1.6 + 0.32 * len(results), 1, 2)
        rates = [result.pairs_per_second for result in results]
        spread = [
            [result.pairs_per_second - result.slowest for result in results],
            [result.fastest - result.pairs_per_second for result in results],
        ]
        left.barh(places, rates, xerr=spread, color=LIGHT["accent"], alpha=0.55, ecolor=LIGHT["ink"], height=0.7)
        left.set_yticks(places, names, fontsize=7)
        left.set_title("pairs per second")
        begins = [0.0] * len(results)
        for cause, colour in zip(CAUSES, SERIES, strict=False):
            parts = [1e3 * getattr(result.waits, cause) if result.waits is not None else 0.0 for result in results]
            right.barh(places, parts, left=begins, color=colour, height=0.7, label=cause)
            begins = [begin + part for begin, part in zip(begins, parts, strict=True)]
        right.set_yticks(places, [""] * len(results))
        right.set_title("milliseconds of a step")
        right.legend(ncols=len(CAUSES), loc="upper center", bbox_to_anchor=(0.5, -0.12))
        for axis in (left, right):
            axis.invert_yaxis()
            axis.grid(axis="y", visible=False)
        temporary.write_bytes(png(figure, _DPI))
