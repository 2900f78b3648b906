"""The settings that ``mc2 tune`` finds, compared with those of every hand-written config of these benchmarks.

    mc2 bench tune [--quick] [--json FILE]

The run is that of ``mc2 bench train``: the same model, data, batch and two processes. ``mc2 tune`` begins with the
package's defaults and has 8 trials and 10 minutes. Then whole runs of ``mc2 train`` alternate: with what it found, and
with the settings of each hand-written config. ``default`` is what it began with. Contenders with the same settings are
the same runs. ``config.trials`` has its trials.
"""

import copy
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from benchmarks.bench_train import LOG_EVERY, PROCESSES, make_data, run_values, train_rate
from benchmarks.harness import main, spread
from mc2_hpc.config import config_from_dict, config_to_dict
from mc2_hpc.tuning.rewrite import nested

HAND_WRITTEN: dict[str, dict[str, Any]] = {
    "bench_train": {"data.workers": 1, "zero.stage": 1},
    "bench_step, recompute": {"data.workers": 1, "zero.stage": 1, "model.attention": "sdpa", "model.recompute": "full"},
    "bench_faults": {"data.workers": 0, "zero.stage": 1},
}
"""What each benchmark's config says about tuned settings; those of the others are among them (``bench_step`` without
recomputation is ``bench_train``). Benchmarks without a loader have no workers of their own and get those of it."""
TRIALS, MINUTES = 8, 10


def run(quick: bool) -> dict[str, Any]:
    """Samples per second with each contender's settings."""
    rounds, steps, batch = (1, 4, 8) if quick else (7, 20, 64)
    trials, minutes = (2, 5) if quick else (TRIALS, MINUTES)
    log_every = 1 if quick else LOG_EVERY
    hand_written = dict(list(HAND_WRITTEN.items())[: 1 if quick else None])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        vocab_size = make_data(folder, num_images=256 if quick else 2048)
        values = run_values(folder / "run", folder, vocab_size, steps, batch, log_every)
        for section in ("data", "zero"):  # what is tuned begins as the defaults
            values[section].pop("workers", None)
            values[section].pop("stage", None)
        begin = time.monotonic()
        found = _tune(values, folder, trials=trials, minutes=minutes, steps=2 if quick else 8)
        seconds = time.monotonic() - begin
        contenders = {"tuned": found["best"], "default": {}, **hand_written}
        whole = {who: _whole(_with(values, settings)) for who, settings in contenders.items()}
        runs: list[tuple[dict[str, Any], list[float]]] = []
        for config in whole.values():
            if not any(config == other for other, _ in runs):
                runs.append((config, []))
        for _ in range(rounds):
            for config, samples in runs:
                samples.append(train_rate(config, folder))
                shutil.rmtree(folder / "run")
        rates = {who: next(samples for other, samples in runs if other == config) for who, config in whole.items()}
    rows = [
        {"who": who, "unit": "samples/s", **spread(samples), "samples": samples, "settings": str(contenders[who])}
        for who, samples in rates.items()
    ]
    ratios = {
        f"tuned_vs_{who.replace(', ', '_')}": statistics.median(
            ours / theirs for ours, theirs in zip(rates["tuned"], rates[who], strict=True)
        )
        for who in contenders
        if who != "tuned"
    }
    return {
        "config": {
            "processes": PROCESSES,
            "global_batch": batch * PROCESSES,
            "steps": steps,
            "trials_allowed": trials,
            "minutes_allowed": minutes,
            "seconds": seconds,
            "best": found["best"],
            "trials": found["trials"],
        },
        "rows": rows,
        "ratios": {
            **ratios,
            "tuned_vs_fastest_hand_written": min(v for k, v in ratios.items() if "default" not in k),
        },
    }


def _tune(values: dict[str, Any], folder: Path, *, trials: int, minutes: int, steps: int) -> dict[str, Any]:
    """What ``mc2 tune --json`` says."""
    path = folder / "tune.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    command = [sys.executable, "-m", "mc2_hpc.cli", "tune", str(path), "--processes", str(PROCESSES)]
    command += ["--trials", str(trials), "--minutes", str(minutes), "--steps", str(steps)]
    command += ["--out", str(folder / "tune"), "--json", str(folder / "tuned.json")]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=60 * minutes + 600)
    found: dict[str, Any] = json.loads((folder / "tuned.json").read_text(encoding="utf-8"))
    return found


def _with(values: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    changed = copy.deepcopy(values)
    for key, value in nested(settings).items():
        if isinstance(value, dict):
            changed.setdefault(key, {}).update(value)
        else:
            changed[key] = value
    return changed


def _whole(values: dict[str, Any]) -> dict[str, Any]:
    """The config with every default that it leaves out."""
    return config_to_dict(config_from_dict(values, "benchmark"))


if __name__ == "__main__":
    main("tune", run)
