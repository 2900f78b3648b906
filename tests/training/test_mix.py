"""Runs on a mix of sources: the same samples on any number of ranks and after kill -9, and what a resumed run says."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from mc2_hpc.data.packing import pack_pairs
from mc2_hpc.training.stop import SAVED
from tests.faults import matrix
from tests.faults.diary import kept_samples, largest_difference, losses, rows, saved_trainer, state_hashes
from tests.faults.tiny_run import BATCH, LANES, draw_pairs, write_config

STEPS, EVERY = 24, 6
WEIGHTS = {"alt": 5, "books": 2, "maps": 1}
SIZES = {"alt": 256, "books": 96, "maps": 64}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Three sources whose shards have the same names; keys begin with the source's first letter."""
    folder = tmp_path_factory.mktemp("sources")
    for name, size in SIZES.items():
        pack_pairs(draw_pairs(size, prefix=name[0]), folder / name, pairs_per_shard=32)
    return folder


def mix(folder: Path, **changes: Any) -> list[dict[str, Any]]:
    """``data.train``; ``changes`` replaces weights, by name."""
    weights = WEIGHTS | changes
    return [{"name": name, "path": str(folder / name), "weight": weights[name]} for name in weights if weights[name]]


@pytest.fixture(scope="module")
def config(folder, tiny_pool, tmp_path_factory) -> Path:
    values = {"steps": STEPS, "log_every": 1, "checkpoint": {"every": EVERY, "keep": 3}}
    path = write_config(tmp_path_factory.mktemp("config") / "run.yaml", tiny_pool, **values)
    path.write_text(path.read_text().replace(f"train: {tiny_pool.shards}", f"train: {json.dumps(mix(folder))}"))
    return path


@pytest.fixture(scope="module")
def undisturbed(config, starter, tmp_path_factory) -> Path:
    return matrix.run_undisturbed(config, tmp_path_factory.mktemp("undisturbed"), starter)


def test_samples_come_by_weight_and_once_per_epoch_of_their_source(undisturbed):
    taken = [key for keys in kept_samples(undisturbed).values() for key in keys]
    counts = Counter(key[0] for key in taken)
    assert len(taken) == STEPS * BATCH
    for name, weight in WEIGHTS.items():
        assert counts[name[0]] / len(taken) == pytest.approx(weight / 8, abs=0.01)
    for name, size in SIZES.items():
        places = [lane["sources"][name] for lane in saved_trainer(undisturbed, STEPS)["position"]]
        complete = min(epoch for epoch, _, _ in places)
        times = Counter(key for key in taken if key[0] == name[0])
        assert len(times) == size and set(times.values()) <= {complete, complete + 1, complete + 2}
        assert complete >= 1


def test_a_checkpoint_says_where_every_lane_is_in_every_source(undisturbed):
    saved = saved_trainer(undisturbed, STEPS)
    assert len(saved["position"]) == LANES and sorted(saved["sources"]) == sorted(WEIGHTS)
    for lane in saved["position"]:
        assert lane["draws"] == STEPS * BATCH // LANES and sorted(lane["sources"]) == sorted(WEIGHTS)


def test_rows_have_shares_and_epochs_of_every_source(undisturbed):
    """Epochs count the shards that lanes are done with, of which each has one or two per epoch here."""
    taken = kept_samples(undisturbed)
    found = rows(undisturbed / "run")
    for row in found.values():
        counts = Counter(key[0] for key in taken[row["step"]])
        assert row["source_share"] == {name: counts[name[0]] / BATCH for name in sorted(WEIGHTS)}
        for name, size in SIZES.items():
            seen = sum(key[0] == name[0] for step in range(1, row["step"] + 1) for key in taken[step])
            assert seen / size - 1.1 < row["source_epochs"][name] < seen / size + 0.5
        assert "caption_share" not in row
    final = found[STEPS]["source_epochs"]
    assert min(final.values()) >= 1


def test_rows_have_shares_of_caption_fields(config, folder, starter, tmp_path):
    """The pool's records name a language only, so one source draws a field that its samples do not have."""
    sources = mix(folder)
    sources[0]["captions"] = {"txt": 0.85, "json.lang": 0.15}
    sources[1]["captions"] = {"txt": 0.5, "json.synthetic": 0.5}
    overrides = [f"data.train={json.dumps(sources)}", "steps=8", "log_every=8"]
    assert starter.run(matrix.job(config, tmp_path, processes=2, overrides=overrides)) == 0
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    shares = row["caption_share"]
    assert shares.pop("books/txt") == 1
    assert sorted(shares) == ["alt/json.lang", "alt/txt"] and sum(shares.values()) == pytest.approx(1)
    assert shares["alt/json.lang"] == pytest.approx(0.15, abs=0.08)  # 160 samples: 2.8 standard deviations


def test_killed_and_resumed_on_other_numbers_of_ranks(config, starter, undisturbed, tmp_path):
    """kill -9 of a rank in the middle; then on one rank, on three, and on two with worker processes."""
    fault = {"at": "mid-step", "step": 8, "rank": 1, "do": ["KILL"]}
    job = matrix.job(config, tmp_path, faults=[fault])
    assert starter.run(job) != 0
    assert starter.run({**job, "processes": 1, "stop_after": 11}) == SAVED
    assert starter.run({**job, "processes": 3, "stop_after": 17}) == SAVED
    assert starter.run({**job, "overrides": [*job["overrides"], "data.workers=2"]}) == 0
    assert kept_samples(tmp_path) == kept_samples(undisturbed)
    assert largest_difference(losses(tmp_path), losses(undisturbed)) <= 1e-5
    assert saved_trainer(tmp_path, STEPS)["position"] == saved_trainer(undisturbed, STEPS)["position"]


@pytest.mark.slow
def test_killed_and_resumed_on_as_many_ranks_is_the_same_to_the_bit(config, starter, undisturbed, tmp_path):
    fault = {"at": "mid-step", "step": 14, "rank": 0, "do": ["KILL"]}
    assert starter.run(matrix.job(config, tmp_path, faults=[fault], restarts=1)) == 0
    assert kept_samples(tmp_path) == kept_samples(undisturbed)
    assert losses(tmp_path) == losses(undisturbed) and state_hashes(tmp_path, STEPS) == state_hashes(undisturbed, STEPS)


def test_a_resumed_run_says_what_changed_in_the_mix(config, folder, starter, tmp_path):
    job = matrix.job(config, tmp_path)
    assert starter.run({**job, "stop_after": 6}) == SAVED
    before = saved_trainer(tmp_path, 6)["position"]
    now = [*mix(folder, books=0, maps=3), {"name": "new", "path": str(folder / "books"), "weight": 2}]
    changed = [*job["overrides"], f"data.train={json.dumps(now)}"]
    assert starter.run({**job, "overrides": changed, "stop_after": 7}) == SAVED
    log = (tmp_path / "log").read_text()
    for line in ("no source books any more", "new source new, from its start", "source maps: weight 1.0 -> 3.0"):
        assert f"not as in step-00000006: data.train: {line}\n" in log
    after = saved_trainer(tmp_path, 7)["position"]
    for lane, later in zip(before, after, strict=True):
        assert sorted(later["sources"]) == ["alt", "maps", "new"] and later["draws"] == lane["draws"] + 4
        assert later["sources"]["alt"] >= lane["sources"]["alt"] and later["sources"]["new"] >= [0, 0, 0]
