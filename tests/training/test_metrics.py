"""A row of metrics covers all ranks, and all steps since the previous row."""

import json
import sys
from collections import Counter

import pytest

from mc2_hpc.config import load_config
from mc2_hpc.data.loader import TrainLoader
from mc2_hpc.data.packing import pack_pairs
from mc2_hpc.data.tokenizer import Tokenizer
from mc2_hpc.training.metrics import Means, MetricsLog, progress_line
from mc2_hpc.training.throughput import Interval, rates
from tests.faults import matrix
from tests.faults.diary import kept_samples, rows
from tests.faults.tiny_run import TinyPool, draw_pairs, write_config, write_pool

STEPS, EVERY = 12, 4


def lang_of(key):
    """Unevenly distributed over keys, and so over ranks and rows."""
    return "de" if int(key) % 5 == 0 or int(key) > 150 else "en"


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A pool in two languages in which every sixth image is damaged."""
    folder = tmp_path_factory.mktemp("pool")
    pool = write_pool(folder)
    pairs = [pair._replace(lang=lang_of(pair.key)) for pair in draw_pairs(240)]
    pairs = [pair._replace(image=pair.image[:300]) if i % 6 == 1 else pair for i, pair in enumerate(pairs)]
    pack_pairs(pairs, folder / "two", pairs_per_shard=30)
    pool = TinyPool(folder / "two", pool.tokenizer, pool.vocab_size)
    return write_config(folder / "run.yaml", pool, steps=STEPS, checkpoint={"every": 100})


@pytest.fixture(scope="module")
def runs(config, fork_server, tmp_path_factory):
    """Folders of the same two-rank run, with a row per step and with a row per four steps."""
    starter = matrix.Starter(fork_server)
    folders = {}
    for every in (1, EVERY):
        folders[every] = tmp_path_factory.mktemp(f"every{every}")
        job = matrix.job(config, folders[every], processes=2, overrides=[f"log_every={every}"])
        assert starter.run(job) == 0, (folders[every] / "log").read_text()
    return folders


def test_numbers_of_steps_are_means_over_the_interval(runs):
    each, few = rows(runs[1] / "run"), rows(runs[EVERY] / "run")
    assert sorted(few) == [4, 8, 12]
    for step, row in few.items():
        for name in ("loss", "grad_norm"):
            expected = sum(each[s][name] for s in range(step - EVERY + 1, step + 1)) / EVERY
            assert row[name] == pytest.approx(expected, rel=1e-12), (step, name)
        for name in ("lr", "logit_scale", "samples_seen"):
            assert row[name] == each[step][name]


def test_languages_are_those_of_all_ranks(runs):
    taken = kept_samples(runs[EVERY])
    for step, row in rows(runs[EVERY] / "run").items():
        langs = Counter(lang_of(key) for s in range(step - EVERY + 1, step + 1) for key in taken[s])
        assert langs.total() == EVERY * 32
        assert row["language_share"] == {lang: count / langs.total() for lang, count in langs.most_common()}


def test_skips_are_those_of_all_ranks(config, runs):
    """Compared with the loaders of both ranks, which skip different numbers of samples in this pool."""
    run = load_config(config)
    loaders = [
        TrainLoader(
            run.data,
            global_batch=run.global_batch,
            image_size=32,
            tokenizer=Tokenizer(run.data.tokenizer, "xlmv", 24),
            rank=rank,
            world_size=2,
        )
        for rank in range(2)
    ]
    own = [Counter(), Counter()]
    for step in range(1, STEPS + 1):
        for counts, loader in zip(own, loaders, strict=True):
            counts.update(next(loader).skipped)
        if step % EVERY == 0:
            assert rows(runs[EVERY] / "run")[step]["skipped"] == dict(own[0] + own[1])
    assert own[0] and own[1]
    for loader in loaders:
        loader.close()


def interval(**changes):
    values = {"steps": 10, "seconds": 2.0, "flops": 400, "peak": 1000.0, "wait_seconds": 0.2, "stall_seconds": 0.0}
    counts = {"languages": Counter(en=30), "skipped": Counter(), "caption_tokens": 400, "peak_memory": None}
    return Interval(**{**values, **counts, **changes})


def test_rates_over_unequal_ranks():
    second = interval(
        seconds=2.01,
        flops=200,
        wait_seconds=1.005,
        stall_seconds=0.7,
        languages=Counter(de=50),
        skipped=Counter(caption_empty=3),
        caption_tokens=800,
    )
    found = rates([interval(skipped=Counter(caption_empty=1, read_error=2)), second], global_batch=8)
    assert found == {
        "samples_per_second": 40.0,
        "steps_per_second": 5.0,
        "mfu": 600 / 2 / 2000,
        "data_wait": pytest.approx((0.1 + 0.5) / 2),
        "checkpoint_stall_seconds": 0.7,
        "caption_tokens": 1200 / 80,
        "language_share": {"de": 50 / 80, "en": 30 / 80},
        "skipped": {"caption_empty": 4, "read_error": 2},
    }


def test_the_peak_is_that_of_the_fullest_rank():
    found = rates([interval(peak_memory=5), interval(peak_memory=7)], global_batch=8)
    assert found["peak_memory_bytes"] == 7
    assert "peak_memory_bytes" not in rates([interval()], global_batch=8)


def test_columns_of_a_mix_cover_unequal_ranks():
    first = interval(sources=Counter(a=20, b=10), fields=Counter({"a/txt": 15, "a/json.s": 5}), epochs={"a": 3, "b": 1})
    second = interval(sources=Counter(a=40, b=10), fields=Counter({"a/txt": 40}), epochs={"a": 6.5, "b": 2})
    found = rates([first, second], global_batch=8, lanes=4)
    assert found["source_share"] == {"a": 0.75, "b": 0.25}
    assert found["source_epochs"] == {"a": 9.5 / 4, "b": 0.75}
    assert found["caption_share"] == {"a/json.s": 5 / 60, "a/txt": 55 / 60}


def test_means_count_a_step_once():
    means = Means()
    for step, loss in ((1, 3.0), (2, 1.0), (2, 1.0)):
        means.add(step, loss=loss)
    assert means.take() == {"loss": 2.0}
    means.add(3, loss=7.0)
    assert means.take() == {"loss": 7.0}


def row(**changes):
    values = {"step": 120, "loss": 3.21987, "logit_scale": 14.3, "lr": 4e-4, "grad_norm": 0.5, "mfu": 0.413}
    rates = {"samples_per_second": 71_234.0, "steps_per_second": 0.95, "data_wait": 0.012, "skipped": {}}
    return {**values, **rates, **changes}


def test_a_progress_line_begins_with_step_and_time_to_go():
    line = progress_line(row(), total_steps=3600)
    assert line == "step 120/3600  ETA 1:01:03  loss 3.2199  71,234/s  wait 1%  lr 4.0e-04"
    line = progress_line(row(skipped={"read_error": 81}), total_steps=391_136)
    assert line == "step 120/391136  ETA 4d 18:19:56  loss 3.2199  71,234/s  wait 1%  skipped 81"


def test_a_progress_line_fits_a_terminal():
    worst = row(
        step=391_136,
        loss=123.45678,
        samples_per_second=1_234_567.0,
        steps_per_second=1e-4,
        data_wait=1.0,
        grad_norm=12345.678,
        skipped={"read_error": 123_456_789},
    )
    for total in (391_136, 99_999_999):
        line = progress_line(worst, total_steps=total)
        assert len(line) <= 80 and "loss 123.4568" in line


def test_a_run_does_not_need_tensorboard(tmp_path, monkeypatch, caplog, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # as if it were not installed
    log = MetricsLog(tmp_path, total_steps=3600, first_step=0)
    log.write(row())
    log.close()
    assert caplog.text.count("no TensorBoard log") == 1 and "pip install tensorboard" in caplog.text
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["loss"] == 3.21987
    assert capsys.readouterr().err.startswith("step 120/3600  ETA 1:01:03")
    assert not (tmp_path / "tensorboard").exists()
