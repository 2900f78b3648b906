"""``report.html``: the quickstart's results in one self-contained page (no scripts, no network).

The page is made only from the values in ``report.json`` and the image files that it names, which are inlined.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup

from mc2_hpc.pages import data_uri, write_page
from mc2_hpc.pages.plots import require_plotting
from mc2_hpc.quickstart.captions import AUTONYMS
from mc2_hpc.quickstart.charts import head_tail, line_chart, moving_average

Report = Mapping[str, Any]


def write_report(report: Report, folder: str | Path) -> Path:
    """Write ``folder/report.html`` and return its path.

    Args:
        report: the values of ``report.json`` (see :mod:`mc2_hpc.quickstart.run`); image names are relative to
            ``folder``.

    Raises:
        UserError: matplotlib is not installed.
    """
    require_plotting("the quickstart's report needs", "quickstart")
    folder = Path(folder)
    values = {
        "report": report,
        "autonyms": AUTONYMS,
        "image": lambda name: data_uri((folder / name).read_bytes(), "image/jpeg"),
        "curves": _curves(report),
        "loss": _training_chart(report, "loss", "loss"),
        "rate": _training_chart(report, "samples_per_second", "pairs per second"),
        "guess": math.log(report["global_batch"]),
        "worst_first": sorted(report["zero_shot"].items(), key=lambda item: (item[1], item[0])),
        "hf_folder": Path(report["outputs"]["train"]).with_name("hf"),
    }
    return write_page(folder / "report.html", "mc2_hpc.quickstart", "report.html", values)


def _curves(report: Report) -> dict[str, Markup]:
    """The head-tail plot of each language."""
    return {
        lang: head_tail(
            f"curve{place}",
            report["curves"][lang]["before"],
            report["curves"][lang]["after"],
            threshold=report["balance"]["t"][lang],
        )
        for place, lang in enumerate(report["languages"])
    }


def _training_chart(report: Report, metric: str, label: str) -> Markup:
    points = [(row["step"], row[metric]) for row in report["training"]]
    smooth = moving_average(points, max(1, len(points) // 20))
    return line_chart(metric, points, smooth, x_label="step", y_label=label)
