"""Draws the committed rows of ``benchmarks/results/*.json`` as PNGs beside them; nothing else goes into a plot."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.ablations import as_tables
from benchmarks.harness import RESULTS
from mc2_hpc.ablation.plot import draw_panel


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


def plot_loader(result: dict[str, Any], path: Path) -> None:
    """A panel a part: rates relative to the peer's median, every round a point; and memory over samples."""
    peers = {"tar": "webdataset", "decode": "open_clip", "loader": "open_clip"}
    figure, axes = plt.subplots(1, 4, figsize=(16, 4))
    for axis, (part, peer) in zip(axes, peers.items(), strict=False):
        rows = [row for row in result["rows"] if row["part"] == part]
        medians = {row["pictures"]: row["median"] for row in rows if row["who"] == peer}
        for place, row in enumerate(rows):
            times = [sample / medians[row["pictures"]] for sample in row["samples"]]
            axis.bar(place, row["median"] / medians[row["pictures"]], width=0.6, alpha=0.5)
            axis.plot([place] * len(times), times, "k_")
        labels = [f"{row['who']}\n{row['pictures']}" for row in rows]
        axis.set_xticks(range(len(rows)), labels, rotation=45, ha="right", fontsize=7)
        axis.set(title=part, ylabel=f"times {peer}")
        axis.grid(axis="y", alpha=0.3)
    (memory,) = (row for row in result["rows"] if row["part"] == "memory")
    axes[3].plot(memory["at_samples"], memory["samples"], marker="o")
    axes[3].set(title="memory", xlabel="samples", ylabel=memory["unit"])
    axes[3].set_ylim(0, 1.2 * memory["max"])
    axes[3].grid(alpha=0.3)
    _save(figure, "Data path", result, path)


def plot_curation(result: dict[str, Any], path: Path) -> None:
    """Captions, or images, a second by contender, a panel for each thing done, every round a mark."""
    rows = [row for row in result["rows"] if "median" in row]
    parts = list(dict.fromkeys(row["what"] for row in rows))
    figure, axes = plt.subplots(1, len(parts), figsize=(3 * len(parts), 4))
    for axis, part in zip(axes, parts, strict=True):
        for place, row in enumerate(row for row in rows if row["what"] == part):
            axis.bar(place, row["median"] / 1000, width=0.5, alpha=0.5)
            axis.plot([place] * len(row["samples"]), [sample / 1000 for sample in row["samples"]], "k_")
        labels = [row["who"] for row in rows if row["what"] == part]
        axis.set_xticks(range(len(labels)), labels, rotation=30, ha="right")
        axis.set_title(part)
        axis.set_ylabel("thousand images a second" if part == "sampling" else "thousand captions a second")
        axis.grid(axis="y", alpha=0.3)
    _save(figure, f"Curation, {result['config']['entries']:,} entries", result, path)


def plot_eval(result: dict[str, Any], path: Path) -> None:
    """Pictures a second, every round a mark; seconds for a retrieval in all locales; memory of one."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 4))
    features, retrieval = ([row for row in result["rows"] if row["what"] == what] for what in ("features", "retrieval"))
    for place, row in enumerate(features):
        axes[0].bar(place, row["median"], width=0.5, alpha=0.5)
        axes[0].plot([place] * len(row["samples"]), row["samples"], "k_")
    for place, row in enumerate(retrieval):
        axes[1].bar(place, row["seconds_for_36_locales"], width=0.5, alpha=0.5)
        axes[2].bar(place, row["memory_mb"], width=0.5, alpha=0.5)
    axes[0].set(title="features of pictures", ylabel="pictures a second")
    axes[1].set(title="recall in 36 locales", ylabel="seconds")
    axes[2].set(title="recall in one locale", ylabel="memory growth, MB")
    for axis, rows in zip(axes, (features, retrieval, retrieval), strict=True):
        axis.set_xticks(range(len(rows)), [row["who"] for row in rows], rotation=15, ha="right")
        axis.grid(axis="y", alpha=0.3)
    _save(figure, "Evaluation", result, path)


def plot_checkpoint(result: dict[str, Any], path: Path) -> None:
    """Seconds that training waits for a save, and seconds a step beside one; every round a mark."""
    parts = ("stall a save", "step")
    figure, axes = plt.subplots(1, len(parts), figsize=(9, 4))
    for axis, part in zip(axes, parts, strict=True):
        rows = [row for row in result["rows"] if row["what"] == part]
        for place, row in enumerate(rows):
            axis.bar(place, row["median"], width=0.5, alpha=0.5)
            axis.plot([place] * len(row["samples"]), row["samples"], "k_")
        axis.set_xticks(range(len(rows)), [row["who"] for row in rows])
        axis.set(title=part, ylabel="seconds")
        axis.grid(axis="y", alpha=0.3)
    config = result["config"]
    size, parameters = config["checkpoint_bytes"] / 1e9, config["parameters"] / 1e6
    _save(figure, f"Checkpoints of {parameters:.0f} M parameters ({size:.1f} GB)", result, path)


def plot_scale(result: dict[str, Any], path: Path) -> None:
    """Time and memory of each stage by captions done."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    for stage in ("match", "sample"):
        rows = [row for row in result["rows"] if row.get("stage") == stage]
        captions = [row["captions"] / 1e6 for row in rows]
        left.plot(captions, [row["seconds"] for row in rows], marker="o", label=stage)
        right.plot(captions, [row["resident_mb"] for row in rows], marker="o", label=f"{stage}, resident")
        right.plot(captions, [row["private_mb"] for row in rows], marker=".", label=f"{stage}, private")
    for axis, what in ((left, "seconds since the stage began"), (right, "largest worker so far, MB")):
        axis.set(xlabel="million captions done", ylabel=what)
        axis.set_xlim(left=0)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.legend()
    config = result["config"]
    title = f"Curation at scale: {config['languages']} languages, {config['workers']} workers"
    _save(figure, title, result, path)


def plot_ablations(result: dict[str, Any], path: Path) -> None:
    """A panel an ablation: every row's mean and standard deviation, every seed a point."""
    tables = as_tables(result)
    figure, axes = plt.subplots(-(-len(tables) // 2), 2, figsize=(13, 3.6 * -(-len(tables) // 2)), squeeze=False)
    for axis in axes.flat[len(tables) :]:
        axis.set_visible(False)
    for axis, table in zip(axes.flat, tables, strict=False):
        draw_panel(axis, table)
    _save(figure, "Ablations on CIFAR-10 in ten languages", result, path)


def _save(figure: Any, title: str, result: dict[str, Any], path: Path) -> None:
    figure.suptitle(title)
    figure.text(0.5, 0.01, _caption(result), ha="center", fontsize=7)
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    figure.savefig(path, dpi=120, metadata={"Software": None})
    plt.close(figure)


PLOTS: dict[str, Callable[[dict[str, Any], Path], None]] = {
    "ablations": plot_ablations,
    "checkpoint": plot_checkpoint,
    "contrastive": plot_contrastive,
    "curation": plot_curation,
    "eval": plot_eval,
    "loader": plot_loader,
    "scale_curation": plot_scale,
    "train": plot_train,
}


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
