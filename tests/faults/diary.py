"""What a job of the fault matrix did: read from its ranks' diaries, its metrics and its checkpoints."""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mc2_hpc.data.locations import LocalShards
from mc2_hpc.data.stream import Lane, Position, ShardPool
from tests.faults.tiny_run import BATCH, LANES, PER_SHARD, SAMPLES

EPOCH = SAMPLES // BATCH
"""Steps per epoch: every sample is good, so each occurs once per epoch."""


@dataclass(frozen=True)
class Attempt:
    """One start of all ranks, from its diary."""

    world: int
    keys: dict[int, list[str]]
    """Keys of every step that all ranks completed, in lane order."""
    times: dict[int, float]
    """When the last rank completed it."""

    @property
    def began(self) -> float:
        """When its first step was completed."""
        return min(self.times.values())


def read_diary(folder: Path) -> list[Attempt]:
    """The attempts in a job's folder, in order."""
    ranks: dict[str, dict[int, list[dict[str, Any]]]] = {}
    for path in folder.glob("*-*-*.jsonl"):
        attempt, _, rank = path.stem.rpartition("-")
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
        if lines:
            ranks.setdefault(attempt, {})[int(rank)] = lines
    attempts = []
    for diaries in ranks.values():
        world = diaries[min(diaries)][0]["world"]
        steps = [{line["step"]: line for line in diaries.get(rank, [])} for rank in range(world)]
        done = sorted(set.intersection(*map(set, steps)))
        keys = {step: [key for rank in steps for key in rank[step]["keys"]] for step in done}
        attempts.append(Attempt(world, keys, {step: max(rank[step]["time"] for rank in steps) for step in done}))
    return sorted((attempt for attempt in attempts if attempt.keys), key=lambda attempt: attempt.began)


def history(attempts: list[Attempt]) -> dict[int, Attempt]:
    """Step to the attempt whose result the run kept: the last that completed it."""
    return {step: attempt for attempt in attempts for step in attempt.keys}


def kept_samples(folder: Path) -> dict[int, list[str]]:
    """Keys of the samples of each step whose result the run kept, in lane order."""
    return {step: attempt.keys[step] for step, attempt in sorted(history(read_diary(folder)).items())}


def every_key() -> set[str]:
    """Every key of the pool."""
    return {f"{number:06d}" for number in range(SAMPLES)}


def count_samples(folder: Path) -> dict[str, int]:
    """Samples that are missing from, or repeated in, the epochs of a run on undamaged shards."""
    epochs: dict[int, Counter[str]] = {}
    for step, keys in kept_samples(folder).items():
        epochs.setdefault((step - 1) // EPOCH, Counter()).update(keys)
    return {
        "samples_lost": sum(len(every_key() - set(seen)) for seen in epochs.values()),
        "samples_repeated": sum(count - 1 for seen in epochs.values() for count in seen.values()),
    }


def account(folder: Path) -> dict[str, Any]:
    """Steps done more than once, and seconds from the fault that ended the first start until a later start was one step
    beyond it (``None``: the first start continued by itself)."""
    attempts = read_diary(folder)
    marks = [mark.stat().st_mtime for mark in folder.glob("fault*")]
    later = [attempt for attempt in attempts if marks and attempt.began > min(marks)]
    recovery = None
    if later:
        struck = max(mark for mark in marks if mark < later[0].began)
        beyond = 1 + max((step for attempt in attempts if attempt not in later for step in attempt.keys), default=0)
        recovery = min(attempt.times[beyond] for attempt in later if beyond in attempt.times) - struck
    steps_done = sum(len(attempt.keys) for attempt in attempts)
    return {"steps_lost": steps_done - len(history(attempts)), "recovery_seconds": recovery}


def _whole_order(shards: Path, epochs: int) -> list[list[str]]:
    """Keys of each lane in the first epochs of undamaged shards."""
    shard_set = LocalShards(sorted(shards.glob("*.tar")), shards)
    pool = ShardPool(shard_set, lanes=LANES, seed=0, probs=None, transform=lambda *_: torch.empty(0), name=str(shards))
    lanes = [Lane(pool, number, Position()) for number in range(LANES)]
    order = [[next(lane).pair.key for _ in range(epochs * SAMPLES // LANES)] for lane in lanes]
    share = SAMPLES // LANES
    for start in range(0, epochs * share, share):
        assert len({key for lane in order for key in lane[start : start + share]}) == SAMPLES
    return order


def passed_over(folder: Path, shards: Path, victim: int) -> tuple[int, Counter[str]]:
    """How often a run on ``shards`` left out a sample of shard number ``victim``, and what it found there instead.

    Raises:
        AssertionError: in some lane, a sample of another shard was left out, repeated, or out of order.
    """
    of_victim = {f"{number:06d}" for number in range(victim * PER_SHARD, (victim + 1) * PER_SHARD)}
    each = BATCH // LANES
    steps = kept_samples(folder).values()
    expected = _whole_order(shards, epochs=len(steps) // EPOCH + 3)
    left_out, found_instead = 0, Counter[str]()
    for lane, whole in enumerate(expected):
        following = iter(whole)
        for key in (key for keys in steps for key in keys[lane * each : (lane + 1) * each]):
            if key.startswith("new"):
                found_instead[key] += 1
                continue
            while (should := next(following)) != key:
                assert should in of_victim, f"lane {lane}: {should} of a whole shard is missing before {key}"
                left_out += 1
    return left_out, found_instead


def rows(run: Path) -> dict[int, dict[str, Any]]:
    """The rows of a run's ``metrics.jsonl``, by step."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return {row["step"]: row for row in map(json.loads, lines)}


def losses(folder: Path) -> dict[int, float]:
    """Loss of every step of a job."""
    return {step: row["loss"] for step, row in rows(folder / "run").items()}


def saved_trainer(folder: Path, step: int) -> dict[str, Any]:
    """The ``trainer.json`` of a job's checkpoint."""
    return json.loads((folder / "run" / "checkpoints" / f"step-{step:08d}" / "trainer.json").read_text())


def skips(folder: Path, step: int) -> dict[str, int]:
    """Skips recorded in a job's checkpoint, by reason, over all ranks."""
    return saved_trainer(folder, step)["skipped"]


def state_hashes(folder: Path, step: int) -> dict[str, str]:
    """SHA-256 of the weight and moment files of a job's checkpoint."""
    manifest = json.loads((folder / "run" / "checkpoints" / f"step-{step:08d}" / "manifest.json").read_text())
    return {name: entry["sha256"] for name, entry in manifest.items() if name.endswith(".safetensors")}


def largest_difference(found: dict[int, float], expected: dict[int, float]) -> float:
    """Largest relative difference between two loss curves over the same steps."""
    assert found.keys() == expected.keys(), sorted(found.keys() ^ expected.keys())
    return max(abs(found[step] - expected[step]) / expected[step] for step in expected)
