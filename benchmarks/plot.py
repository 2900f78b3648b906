"""Draws the committed rows of ``benchmarks/results/*.json`` as PNGs beside them; nothing else goes into a plot."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from harness import RESULTS


def _caption(result: dict[str, Any]) -> str:
    env = result["env"]
    return f"{env['gpu'] or env['machine']}, {env['cores']} cores, torch {env['torch']}, commit {env['commit']}"


def plot_contrastive(result: dict[str, Any], path: Path) -> None:
    """Seconds and peak memory by batch size, a line a contender."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    for name in sorted({row["loss"] for row in result["rows"]}):
        rows = sorted((row for row in result["rows"] if row["loss"] == name), key=lambda row: row["batch"])
        batches = [row["batch"] for row in rows]
        seconds = [row["spread"] for row in rows]
        left.errorbar(
            batches,
            [s["median"] for s in seconds],
            yerr=[[s["median"] - s["min"] for s in seconds], [s["max"] - s["median"] for s in seconds]],
            marker="o",
            label=name,
        )
        right.plot(batches, [row["memory_mb"] for row in rows], marker="o", label=name)
    for axis, what in ((left, "seconds, forward + backward"), (right, "peak memory growth, MB")):
        axis.set(xscale="log", yscale="log", xlabel="batch (pairs)", ylabel=what)
        axis.grid(alpha=0.3)
        axis.legend()
    _save(figure, "Contrastive loss, one process", result, path)


def plot_train(result: dict[str, Any], path: Path) -> None:
    """Samples a second of both programs, every round a point."""
    figure, axis = plt.subplots(figsize=(5, 4))
    for place, row in enumerate(result["rows"]):
        axis.bar(place, row["median"], width=0.5, alpha=0.5)
        axis.plot([place] * len(row["samples"]), row["samples"], "k_")
    axis.set_xticks(range(len(result["rows"])), [row["who"] for row in result["rows"]])
    axis.set_ylabel("samples a second")
    axis.grid(axis="y", alpha=0.3)
    _save(figure, "Training a small model end to end", result, path)


def _save(figure: Any, title: str, result: dict[str, Any], path: Path) -> None:
    figure.suptitle(title)
    figure.text(0.5, 0.01, _caption(result), ha="center", fontsize=7)
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    figure.savefig(path, dpi=120, metadata={"Software": None})
    plt.close(figure)


PLOTS: dict[str, Callable[[dict[str, Any], Path], None]] = {"contrastive": plot_contrastive, "train": plot_train}


def main() -> None:
    """One PNG for every result whose benchmark has a plot."""
    for path in sorted(RESULTS.glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        draw = PLOTS.get(result["name"])
        if draw is not None:
            draw(result, path.with_suffix(".png"))
            print(path.with_suffix(".png").name)


if __name__ == "__main__":
    main()
