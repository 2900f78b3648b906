"""Running shards in worker processes: failures are collected, a dead worker is reported, nothing hangs."""

import pytest

from mc2_hpc.curation.shards import run_shards
from mc2_hpc.errors import UserError

# `exec(name, input)` is work that any worker process can import: the shard's name is the code it runs.
FAILS = "from mc2_hpc.errors import UserError; raise UserError('{}.parquet: broken')"


def test_failures_of_workers_are_collected():
    shards = {FAILS.format("b"): {}, "pass": {}, FAILS.format("a"): {}}
    with pytest.raises(UserError, match="s: 2 of 3 shards failed, the others are done: a.parquet: broken; b.parquet"):
        run_shards(shards, exec, lambda name: False, stage="s", workers=2)


def test_dead_worker_is_reported():
    shards = {"import os; os._exit(3)": {}, "pass": {}, "0": {}}
    with pytest.raises(UserError, match="s: a worker process died, probably out of memory.*fewer workers"):
        run_shards(shards, exec, lambda name: False, stage="s", workers=2)


def test_only_some_failures_are_shown():
    shards = {FAILS.format(name): {} for name in "abcde"}
    with pytest.raises(UserError, match=r"5 of 5 shards failed.*a.parquet.*c.parquet: broken \(and 2 more\)"):
        run_shards(shards, exec, lambda name: False, stage="s")


def test_done_shards_are_skipped_and_told():
    told = []
    run_shards(
        {"raise SystemExit": {}, "pass": {}},
        exec,
        lambda name: name.startswith("raise"),
        stage="s",
        progress=lambda *call: told.append(call),
    )
    assert told == [("s", 1, 2, ""), ("s", 2, 2, "pass")]
