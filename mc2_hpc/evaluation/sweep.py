"""Scores along the line between two models: how much a fine-tuned model forgets, and which mixture forgets least.

    sweep.json    scores of every alpha, and the best alpha of each set
    sweep.md      the same as a table
    sweep.png     the same as curves
    alphas/       one file per finished alpha: the same command continues after a kill

``alpha`` is the share of the first model.
"""

import dataclasses
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from mc2_hpc import __version__
from mc2_hpc.conversion.merge import Source, merged
from mc2_hpc.data.tokenizer import Tokenizer
from mc2_hpc.distributed import Ranks, first_error, on_first_rank
from mc2_hpc.errors import UserError
from mc2_hpc.evaluation.dual_encoders.ours import OurEncoder
from mc2_hpc.evaluation.encoder import Encoder
from mc2_hpc.evaluation.results import leading_metric
from mc2_hpc.evaluation.suite import Report, Suite, run_suite, to_json
from mc2_hpc.models.clip import build_clip
from mc2_hpc.pages.plots import new_figure, plot_style, png
from mc2_hpc.reading.json_file import ANYTHING, File, Foreign, read_json
from mc2_hpc.storage import atomic_path, file_sha256, write_json, write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

RESULT = "sweep.json"


class _Inputs(File):
    """``alphas/inputs.json``: digest of the models, the suite and the precision that alphas were scored with."""

    digest: str


class _Entry(Foreign):
    mean: dict[str, float] = {}


class _Scored(Foreign):
    """``alphas/<alpha>.json``."""

    sets: dict[str, _Entry]


def run_sweep(
    sources: Sequence[Source],
    alphas: Sequence[float],
    suite: Suite,
    ranks: Ranks,
    out: Path,
    *,
    batch: int = 64,
    precision: str = "fp32",
    progress: Report | None = None,
) -> dict[str, Any]:
    """Score ``alpha * sources[0] + (1 - alpha) * sources[1]`` for every alpha, and write the results. Collective.

    Returns:
        the content of ``sweep.json``

    Raises:
        UserError: ``out`` has alphas of other models, another suite or precision, or no set could be scored.
    """
    folder = out / "alphas"
    on_first_rank(ranks, lambda: _claim(folder, _digest(sources, suite, precision)))
    scored_before = {alpha: _scored(_path(folder, alpha)) for alpha in alphas}
    first_error(None)  # all ranks have looked before the first one writes
    first = sources[0]
    tokenizer = Tokenizer(first.tokenizer, first.card.tokenizer_style, first.card.arch.text.context_length)
    model = build_clip(first.card.arch, seed=0).eval().to(ranks.device)
    for alpha, before in scored_before.items():
        lacking = {name: config for name, config in suite.sets.items() if name not in before}
        if not lacking:
            continue
        get = merged(sources, (alpha, 1 - alpha))
        for name, tensor in model.state_dict().items():
            tensor.copy_(get(name))
        dual = OurEncoder(model, first.card, tokenizer, eval_resize=suite.eval_resize)
        encoder = Encoder(dual, ranks, batch=batch, precision=precision)
        found_now = to_json(run_suite(dataclasses.replace(suite, sets=lacking), encoder, progress))
        sets = {name: (before | found_now)[name] for name in suite.sets}
        if not any(entry.get("mean") for entry in sets.values()):
            raise UserError("none of the suite's sets could be scored; see the warnings above")
        if ranks.is_first:
            write_json(_path(folder, alpha), {"alpha": alpha, "sets": sets})
            logger.info("alpha %g: %s", alpha, _line(sets))
    found: dict[str, Any] = {}

    def write() -> None:
        scored = {alpha: read_json(_path(folder, alpha), _Scored, cure=f"remove {folder}") for alpha in alphas}
        found.update(_result(sources, scored, list(suite.sets)))
        write_json(out / RESULT, found)
        write_text(out / "sweep.md", markdown(found))
        with plot_style(), atomic_path(out / "sweep.png") as temporary:
            temporary.write_bytes(png(draw(found), 120))

    on_first_rank(ranks, write)
    return found


def _claim(folder: Path, digest: str) -> None:
    path = folder / "inputs.json"
    if not path.is_file():
        write_json(path, msgspec.to_builtins(_Inputs(digest=digest)))
    elif read_json(path, _Inputs, cure=f"remove {folder}").digest != digest:
        raise UserError(
            f"{folder}: was written with other models, another suite or precision; choose another --out or remove it"
        )


def _digest(sources: Sequence[Source], suite: Suite, precision: str) -> str:
    """Of everything besides alpha that scores depend on, apart from the sets' own files."""
    weights = [[path.name, file_sha256(path)] for source in sources for path in source.files.paths()]
    decisive = [__version__, weights, precision, msgspec.to_builtins(suite)]
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def _path(folder: Path, alpha: float) -> Path:
    return folder / f"{alpha!r}.json"


def _scored(path: Path) -> dict[str, Mapping[str, Any]]:
    """The sets that an alpha has scores of, as in its file; a set that was missing may be there now."""
    if not path.is_file():
        return {}
    cure = f"remove {path}"
    scored = read_json(path, _Scored, cure=cure).sets
    whole: Mapping[str, Mapping[str, Any]] = read_json(path, ANYTHING, cure=cure)["sets"]
    return {name: entry for name, entry in whole.items() if scored[name].mean}


def _line(sets: Mapping[str, Mapping[str, Any]]) -> str:
    leading = ((name, entry["mean"]) for name, entry in sets.items() if entry.get("mean"))
    return ", ".join(f"{name} {100 * mean[leading_metric(mean)]:.1f}" for name, mean in leading) or "no set scored"


def _result(sources: Sequence[Source], scored: Mapping[float, _Scored], names: Sequence[str]) -> dict[str, Any]:
    sets: dict[str, dict[str, Any]] = {}
    for name in names:
        entries = [found.sets.get(name, _Entry()).mean for found in scored.values()]
        for metric in dict.fromkeys(metric for entry in entries for metric in entry):
            values = [entry.get(metric) for entry in entries]
            best = max((value, alpha) for alpha, value in zip(scored, values, strict=True) if value is not None)
            sets.setdefault(name, {})[metric] = {"values": values, "best": best[0], "best_alpha": best[1]}
    first, second = (source.name.absolute().name for source in sources)
    return {"alpha_of": first, "rest_of": second, "alphas": list(scored), "sets": sets, "version": __version__}


def leading_columns(found: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """``set, metric`` -> its column of ``sweep.json``, for the leading metric of each set."""
    chosen = {name: leading_metric(metrics) for name, metrics in found["sets"].items()}
    return {f"{name}, {metric}": found["sets"][name][metric] for name, metric in chosen.items()}


def markdown(found: Mapping[str, Any]) -> str:
    """A row per alpha, in per cent, and the best alpha of each column."""
    columns = leading_columns(found)
    rows = [
        [f"{alpha:g}", *(_percent(column["values"][place]) for column in columns.values())]
        for place, alpha in enumerate(found["alphas"])
    ]
    rows.append(["best alpha", *(f"{column['best_alpha']:g}" for column in columns.values())])
    head = ["alpha", *columns]
    lines = [f"| {' | '.join(cell.replace('|', ' ') for cell in row)} |" for row in (head, *rows)]
    lines.insert(1, "|" + "---|" * len(head))
    said = f"alpha is the share of {found['alpha_of']}, the rest is {found['rest_of']}; in per cent."
    return "\n".join([*lines, "", said, ""])


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def draw(found: Mapping[str, Any]) -> "Figure":
    """A curve per set over alpha."""
    figure, (axes,) = new_figure(6, 3.6)
    for label, column in leading_columns(found).items():
        values = [float("nan") if value is None else 100 * value for value in column["values"]]
        axes.plot(found["alphas"], values, marker="o", label=label)
    axes.set_xlabel(f"alpha: 0 is {found['rest_of']}, 1 is {found['alpha_of']}")
    axes.set_ylabel("per cent")
    axes.legend()
    return figure
