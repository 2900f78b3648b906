"""``curation.html``: a curation run on one self-contained page, without scripts or network; also its plots as PNG."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup

from mc2_hpc.curation.report.findings import Findings, gather
from mc2_hpc.curation.report.plots import draw_plots, require_matplotlib
from mc2_hpc.pages import render
from mc2_hpc.pages.reasons import reason_rows
from mc2_hpc.storage import atomic_path, write_text

_ROWS = 25
_CARDS = 12
_ENTRIES_OF_OTHERS = 5


def write_report(run: str | Path, metadata: str | Path) -> Path:
    """Write ``run/report/curation.html`` and its plots as ``*.png`` beside it; returns the page's path.

    Args:
        run: the output folder of ``mc2 curate run``, balanced.
        metadata: the folder it was matched with.

    Raises:
        UserError: the run is not balanced yet or used other metadata, or matplotlib is not installed.
    """
    require_matplotlib()
    findings = gather(run, metadata)
    folder = Path(run) / "report"
    plots = draw_plots(findings)
    for name, plot in plots.items():
        with atomic_path(folder / f"{name}.png") as temporary:
            temporary.write_bytes(plot.png)
    write_text(folder / "curation.html", render_page(findings, {n: plot.svg for n, plot in plots.items()}))
    return folder / "curation.html"


def render_page(findings: Findings, plots: Mapping[str, Markup]) -> str:
    """The page as HTML.

    Args:
        plots: SVG by name, as :func:`~mc2_hpc.curation.report.plots.draw_plots` makes them.
    """
    totals = findings.balance["totals"]
    packed = findings.pack
    values = {
        "findings": findings,
        "balance": findings.balance,
        "totals": totals,
        "plots": plots,
        "rows": _ROWS,
        "cards": _CARDS,
        "entries_of_others": _ENTRIES_OF_OTHERS,
        "drops": reason_rows(findings.drops, totals["rows"]),
        "pack_drops": packed and reason_rows(packed["drops"], packed["images"] + sum(packed["drops"].values())),
        "facts": _facts(findings.balance),
    }
    return render("mc2_hpc.curation.report", "curation.html", values)


def filter_text(name: str, arguments: Mapping[str, Any]) -> str:
    """A filter as the command line has it, with the options that are set."""
    return " ".join([name, *(f"{key}={value}" for key, value in arguments.items() if value not in (None, ""))])


def _facts(balance: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The data card: what the run was made from."""
    hashes = balance["sources"]["metadata"]
    whole = hashlib.sha256("".join(f"{lang} {hashes[lang]}\n" for lang in sorted(hashes)).encode()).hexdigest()
    filters = balance["sources"].get("filters") or []
    return [
        ("matching rules", balance["mode"]),
        ("t of English", f"{balance['t_en']:,}"),
        ("tail mass p", f"{balance['p']:.6g}"),
        ("shards", f"{balance['totals']['shards']:,}"),
        ("language identification", balance["sources"]["language_id"]),
        ("metadata", f"{len(hashes)} languages, SHA-256 of their list {whole}"),
        *(("filter", filter_text(one["name"], one.get("arguments") or {})) for one in filters),
    ]
