"""Plots the committed rows of ``benchmarks/results/*.json`` as PNGs beside them, from these files alone."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.ablations import as_tables, data_of
from benchmarks.harness import RESULTS
from mc2_hpc.ablation.plot import DPI, draw_panel
from mc2_hpc.pages.palette import LIGHT
from mc2_hpc.pages.plots import new_figure, plot_style, png, short_ticks


def _caption(result: dict[str, Any]) -> str:
    env = result["env"]
    return f"{env['gpu'] or env['machine']}, {env['cores']} cores, torch {env['torch']}, commit {env['commit']}"


def _bars(axis: Any, labels: Sequence[str], heights: Sequence[float], rounds: Sequence[Sequence[float]] = ()) -> None:
    """A bar per label, with a mark for every round."""
    axis.bar(range(len(labels)), heights, width=0.55, color=LIGHT["accent"], alpha=0.55)
    for place, values in enumerate(rounds):
        axis.plot([place] * len(values), values, "_", color=LIGHT["ink"])
    several = len(labels) > 2
    axis.set_xticks(range(len(labels)), labels, rotation=30 if several else 0, ha="right" if several else "center")
    axis.grid(axis="x", visible=False)


@plot_style()
def plot_contrastive(result: dict[str, Any], path: Path) -> None:
    """Seconds and peak memory by batch size, a line per contender."""
    figure, (left, right) = new_figure(10, 4, 1, 2)
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
    batches = sorted({row["batch"] for row in result["rows"]})
    for axis, what in ((left, "seconds, forward + backward"), (right, "peak memory growth, MB")):
        axis.set(xscale="log", yscale="log", xlabel="batch (pairs)", ylabel=what)
        short_ticks(axis.yaxis)
        short_ticks(axis.xaxis)
        axis.set_xticks(batches, [f"{batch:,}" for batch in batches])
        axis.legend()
    what = "Contrastive loss with a teacher" if result["name"] == "distillation" else "Contrastive loss"
    _save(figure, f"{what}, one process", result, path)


@plot_style()
def plot_train(result: dict[str, Any], path: Path) -> None:
    """Samples per second of both programs, every round a mark; a panel per size of the token table."""
    names = {"train": "tokens of the captions", "train_full_vocab": "full vocabulary"}
    figure, axes = new_figure(10, 4, 1, 2)
    for axis, (what, name) in zip(axes, names.items(), strict=True):
        rows = [row for row in result["rows"] if row["what"] == what]
        _bars(axis, [row["who"] for row in rows], [row["median"] for row in rows], [row["samples"] for row in rows])
        axis.set(title=name, ylabel="samples per second")
    _save(figure, "Training a small model end to end", result, path)


@plot_style()
def plot_loader(result: dict[str, Any], path: Path) -> None:
    """A panel per part: rates relative to the peer's median, every round a mark; and memory over samples."""
    peers = {"tar": "webdataset", "decode": "open_clip", "loader": "open_clip"}
    figure, axes = new_figure(16, 4, 1, 4)
    for axis, (part, peer) in zip(axes, peers.items(), strict=False):
        rows = [row for row in result["rows"] if row["part"] == part]
        medians = {row["images"]: row["median"] for row in rows if row["who"] == peer}
        rounds = [[sample / medians[row["images"]] for sample in row["samples"]] for row in rows]
        labels = [f"{row['who']}\n{row['images']}" for row in rows]
        _bars(axis, labels, [row["median"] / medians[row["images"]] for row in rows], rounds)
        axis.tick_params(axis="x", rotation=45, labelsize=7)
        axis.set(title=part, ylabel=f"times {peer}")
    (memory,) = (row for row in result["rows"] if row["part"] == "memory")
    axes[3].plot(memory["at_samples"], memory["samples"], marker="o")
    axes[3].set(title="memory", xlabel="samples", ylabel=memory["unit"])
    axes[3].set_ylim(0, 1.2 * memory["max"])
    _save(figure, "Data path", result, path)


@plot_style()
def plot_curation(result: dict[str, Any], path: Path) -> None:
    """Captions or images per second by contender, a panel per task, every round a mark."""
    rows = [row for row in result["rows"] if "median" in row]
    parts = list(dict.fromkeys(row["what"] for row in rows))
    figure, axes = new_figure(3 * len(parts), 4, 1, len(parts))
    for axis, part in zip(axes, parts, strict=True):
        of_part = [row for row in rows if row["what"] == part]
        rounds = [[sample / 1000 for sample in row["samples"]] for row in of_part]
        _bars(axis, [row["who"] for row in of_part], [row["median"] / 1000 for row in of_part], rounds)
        axis.set_title(part)
        axis.set_ylabel("thousand images per second" if part == "sampling" else "thousand captions per second")
    _save(figure, f"Curation, {result['config']['entries']:,} entries", result, path)


@plot_style()
def plot_eval(result: dict[str, Any], path: Path) -> None:
    """Images per second, every round a mark; seconds for retrieval in all locales; memory for one locale."""
    figure, axes = new_figure(12, 4, 1, 3)
    features, retrieval = ([row for row in result["rows"] if row["what"] == what] for what in ("features", "retrieval"))
    who = [row["who"] for row in features]
    _bars(axes[0], who, [row["median"] for row in features], [row["samples"] for row in features])
    who = [row["who"] for row in retrieval]
    _bars(axes[1], who, [row["seconds_for_36_locales"] for row in retrieval])
    _bars(axes[2], who, [row["memory_mb"] for row in retrieval])
    axes[0].set(title="features of images", ylabel="images per second")
    axes[1].set(title="recall in 36 locales", ylabel="seconds")
    axes[2].set(title="recall in one locale", ylabel="memory growth, MB")
    _save(figure, "Evaluation", result, path)


@plot_style()
def plot_checkpoint(result: dict[str, Any], path: Path) -> None:
    """Seconds that training waits for a save, and seconds per step with and without a save; every round a mark."""
    parts = {"stall a save": "stall per save", "step": "step"}
    figure, axes = new_figure(9, 4, 1, len(parts))
    for axis, (part, title) in zip(axes, parts.items(), strict=True):
        rows = [row for row in result["rows"] if row["what"] == part]
        _bars(axis, [row["who"] for row in rows], [row["median"] for row in rows], [row["samples"] for row in rows])
        axis.set(title=title, ylabel="seconds")
    config = result["config"]
    size, parameters = config["checkpoint_bytes"] / 1e9, config["parameters"] / 1e6
    _save(figure, f"Checkpoints of {parameters:.0f} M parameters ({size:.1f} GB)", result, path)


@plot_style()
def plot_scale(result: dict[str, Any], path: Path) -> None:
    """Time and memory of each stage by number of captions processed."""
    figure, (left, right) = new_figure(10, 4, 1, 2)
    for stage in ("match", "sample"):
        rows = [row for row in result["rows"] if row.get("stage") == stage]
        captions = [row["captions"] / 1e6 for row in rows]
        left.plot(captions, [row["seconds"] for row in rows], marker="o", label=stage)
        right.plot(captions, [row["resident_mb"] for row in rows], marker="o", label=f"{stage}, resident")
        right.plot(captions, [row["private_mb"] for row in rows], marker=".", label=f"{stage}, private")
    for axis, what in ((left, "seconds since the stage began"), (right, "largest worker so far, MB")):
        axis.set(xlabel="million captions processed", ylabel=what)
        axis.set_xlim(left=0)
        axis.set_ylim(bottom=0)
        axis.legend()
    config = result["config"]
    title = f"Curation at scale: {config['languages']} languages, {config['workers']} workers"
    _save(figure, title, result, path)


@plot_style()
def plot_ablations(result: dict[str, Any], path: Path) -> None:
    """A panel per ablation: every row's mean and standard deviation, every seed a point."""
    tables = as_tables(result)
    rows = -(-len(tables) // 2)
    figure, axes = new_figure(13, 3.6 * rows, rows, 2)
    for axis in axes[len(tables) :]:
        axis.set_visible(False)
    for axis, table in zip(axes, tables, strict=False):
        draw_panel(axis, table)
    _save(figure, f"Ablations on {data_of(result)}", result, path)


def _save(figure: Any, title: str, result: dict[str, Any], path: Path) -> None:
    figure.suptitle(title)
    figure.supxlabel(_caption(result), fontsize=7, color=LIGHT["soft"])
    path.write_bytes(png(figure, DPI))


@plot_style()
def plot_fetch(result: dict[str, Any], path: Path) -> None:
    """Images per second of each program, whole and resized, every round a mark."""
    figure, (axis,) = new_figure(6, 4)
    rows = result["rows"]
    labels = [f"{row['who']}, {row['images']}" for row in rows]
    _bars(axis, labels, [row["median"] for row in rows], [row["samples"] for row in rows])
    axis.set_ylabel("images / s")
    _save(figure, "Fetching from a server on the same machine", result, path)


@plot_style()
def plot_dedup(result: dict[str, Any], path: Path) -> None:
    """Hashes searched per second, every round a mark; recall of each kind of copy, a line per way to find them."""
    figure, (left, right) = new_figure(12, 4.5, 1, 2)
    search, copies = ([row for row in result["rows"] if row["what"] == what] for what in ("search", "copies"))
    _bars(left, [row["who"] for row in search], [row["median"] for row in search], [row["samples"] for row in search])
    left.set(yscale="log", ylabel="hashes / s", title=f"{result['config']['hashes']:,} hashes")
    kinds = [name for name in copies[0] if name not in ("what", "who", "recall", "precision", "seconds")]
    for row in copies:
        label = f"{row['who']}, precision {row['precision']:.3f}"
        right.plot(range(len(kinds)), [row[kind] for kind in kinds], "o-", alpha=0.7, label=label)
    right.set_xticks(range(len(kinds)), kinds, rotation=30, ha="right")
    right.set(ylabel="recall", title=result["config"]["images"])
    right.set_ylim(0, 1.05)
    right.legend()
    _save(figure, "De-duplicating images", result, path)


@plot_style()
def plot_tune(result: dict[str, Any], path: Path) -> None:
    """Samples per second with the tuned settings and with those of the benchmarks' own configs, every round a mark."""
    figure, (axis,) = new_figure(7, 4)
    rows = result["rows"]
    _bars(axis, [row["who"] for row in rows], [row["median"] for row in rows], [row["samples"] for row in rows])
    axis.set(ylabel="samples per second")
    _save(figure, "What mc2 tune finds, and hand-written settings", result, path)


PLOTS: dict[str, Callable[[dict[str, Any], Path], None]] = {
    "ablations": plot_ablations,
    "checkpoint": plot_checkpoint,
    "contrastive": plot_contrastive,
    "curation": plot_curation,
    "dedup": plot_dedup,
    "distillation": plot_contrastive,
    "eval": plot_eval,
    "fetch": plot_fetch,
    "loader": plot_loader,
    "scale_curation": plot_scale,
    "train": plot_train,
    "tune": plot_tune,
}


def main() -> None:
    """Write one PNG per result whose benchmark has a plot."""
    for path in sorted(RESULTS.glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        draw = PLOTS.get(result["name"])
        if draw is not None:
            draw(result, path.with_suffix(".png"))
            print(path.with_suffix(".png").name)


if __name__ == "__main__":
    main()
