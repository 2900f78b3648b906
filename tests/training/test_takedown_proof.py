"""``mc2 data proof``: recomputed from the order alone, it agrees with what the ranks saw, and notices what is wrong."""

import hashlib
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mc2_hpc.cli import main
from mc2_hpc.data.locations import LocalShards
from mc2_hpc.data.packing import write_shard
from mc2_hpc.data.remote import CannotReach
from mc2_hpc.data.skips import ShardError
from mc2_hpc.errors import UserError
from mc2_hpc.training.stop import SAVED
from mc2_hpc.training.takedown_proof import Proof, prove
from tests.faults import matrix
from tests.faults.diary import kept_samples
from tests.faults.tiny_run import draw_pairs, write_config

STEPS, GROWN = 30, 13
"""Steps of the run, and the step after which the list grows."""
SIZES = {"plain": 160, "table": 96}
KEYS = {"p000003", "p000050", "t000007", "t000090"}
LATER = {"p000011", "p000012", "t000030"}


@pytest.fixture(scope="module")
def pairs() -> dict[str, list[Any]]:
    """Pairs with distinct images, by source; keys begin with the source's first letter."""
    found = {}
    for name, size in SIZES.items():
        drawn = draw_pairs(size, prefix=name[0])
        found[name] = [pair._replace(image=pair.image + str(number).encode()) for number, pair in enumerate(drawn)]
    return found


@pytest.fixture(scope="module")
def folder(pairs, tmp_path_factory) -> Path:
    """A plain source with addresses in its records, and a curated one with addresses in its tables."""
    folder = tmp_path_factory.mktemp("shards")
    for name, of_source in pairs.items():
        for shard in range(0, len(of_source), 32):
            part, path = of_source[shard : shard + 32], folder / name / f"{shard:05d}.tar"
            records = [json.dumps({"url": f"https://{name}.org/{pair.key}.jpg"}).encode() for pair in part]
            files = [{"jpg": pair.image} for pair in part]
            if name == "plain":
                texts = [pair.text.encode() for pair in part]
                files = [
                    {**image, "txt": text, "json": record}
                    for image, text, record in zip(files, texts, records, strict=True)
                ]
            else:
                rows = [
                    {"key": pair.key, "text": text, "source": f"https://{name}.org/{pair.key}.jpg"}
                    for pair in part
                    for text in (pair.text, "another " + pair.text)
                ]
                path.parent.mkdir(exist_ok=True)
                pq.write_table(pa.Table.from_pylist(rows), path.with_suffix(".parquet"))
            write_shard(path, [(pair.key, each) for pair, each in zip(part, files, strict=True)])
    return folder


@pytest.fixture(scope="module")
def listed(pairs) -> tuple[str, str]:
    """The lines of the list at the start, and those that come later."""
    first: list[dict[str, str]] = [{"key": key} for key in sorted(KEYS)]
    first.append({"sha256": hashlib.sha256(pairs["plain"][20].image).hexdigest()})
    later: list[dict[str, str]] = [{"key": key} for key in sorted(LATER)]
    later += [{"url": "https://table.org/t00004*.jpg"}, {"url": "https://plain.org/p00010?.jpg"}, {"key": "nobody"}]
    return tuple("".join(json.dumps(entry) + "\n" for entry in part) for part in (first, later))


@pytest.fixture(scope="module")
def run(folder, listed, tiny_pool, fork_server, tmp_path_factory) -> Path:
    """A job on two ranks, then on three: the list grows in between."""
    job_folder = tmp_path_factory.mktemp("job")
    values = {"steps": STEPS, "log_every": 5, "checkpoint": {"every": 5, "keep": 4}}
    config = write_config(job_folder / "run.yaml", tiny_pool, **values)
    mix = [{"name": name, "path": str(folder / name), "weight": 1} for name in SIZES]
    overrides = [f"data.train={json.dumps(mix)}", f"data.takedown={job_folder / 'list.jsonl'}"]
    job = matrix.job(config, job_folder, overrides=overrides)
    starter = matrix.Starter(fork_server)
    (job_folder / "list.jsonl").write_text(listed[0])
    assert starter.run({**job, "stop_after": GROWN}) == SAVED
    (job_folder / "list.jsonl").write_text("".join(listed))
    assert starter.run({**job, "processes": 3}) == 0
    return job_folder


@pytest.fixture(scope="module")
def proof(run) -> Proof:
    return prove(run / "run")


def named(pairs: dict[str, list[Any]]) -> dict[str, int]:
    """Every listed key, and the step after which it was listed."""
    at_start = dict.fromkeys([*KEYS, "p000020", "t000020"], 0)  # both sources have that image
    return at_start | dict.fromkeys([*LATER, *(f"t00004{n}" for n in range(10))], GROWN)


def test_it_finds_every_listed_sample_and_when_it_was_listed(proof, pairs):
    assert {sample.key: sample.in_force_after for sample in proof.samples} == named(pairs)
    assert {sample.source for sample in proof.samples} == set(SIZES) and len(proof.samples) == len(named(pairs))
    assert proof.without_sample == ["url https://plain.org/p00010?.jpg", "key nobody"]
    assert proof.versions == [(0, 5), (GROWN, 11)] and proof.step == STEPS and not proof.unreadable


def test_it_agrees_with_what_the_ranks_saw(proof, run):
    """The ranks' own diaries, which the proof does not know."""
    taken = kept_samples(run)
    times = Counter(key for keys in taken.values() for key in keys)
    for sample in proof.samples:
        steps = [step for step, keys in taken.items() for key in keys if key == sample.key]
        assert len(steps) == times[sample.key] == len(sample.seen)
        for step, (after, by) in zip(steps, sample.seen, strict=True):
            assert after < step <= by <= sample.in_force_after
    assert any(sample.seen for sample in proof.samples)
    assert sum(sample.left_out for sample in proof.samples) == proof.left_out == proof.counted > len(proof.samples)
    assert proof.problems == []


def test_the_command_says_so(run, listed, tmp_path, capsys):
    assert main(["data", "proof", str(run / "run"), "--json", str(tmp_path / "proof.json")]) == 0
    out = capsys.readouterr().out
    assert "t000007 of source table: listed after step 0; came up before never; left out" in out
    assert f"11 lines of the list in force after step {GROWN}" in out and "key nobody: names no sample" in out
    assert out.endswith("proved: none of these samples was seen after the step at which the list named it\n")
    assert json.loads((tmp_path / "proof.json").read_text())["holds"] is True
    (tmp_path / "keys.jsonl").write_text('{"key": "t000007"}\n')
    assert main(["data", "proof", str(run / "run"), str(tmp_path / "keys.jsonl")]) == 0
    assert "t000007" in (out := capsys.readouterr().out) and "p000003" not in out


def test_a_sample_that_was_never_listed_is_not_proved(run, tmp_path, capsys):
    (tmp_path / "keys.jsonl").write_text('{"key": "t000007"}\n{"key": "p000100"}\n')
    assert main(["data", "proof", str(run / "run"), str(tmp_path / "keys.jsonl")]) == 1
    captured = capsys.readouterr()
    assert "not proved: 1 of these samples were never in the run's list" in captured.err
    assert "p000100 of source plain: never listed; came up before in steps 1-" in captured.out


def copy_of(run: Path, folder: Path) -> Path:
    shutil.copytree(run / "run", folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


def newest(run: Path) -> Path:
    return max((run / "checkpoints").glob("step-*")) / "trainer.json"


def test_a_run_that_did_not_leave_a_sample_out_is_noticed(run, tmp_path):
    """One that was trained on is missing from the count."""
    copy = copy_of(run, tmp_path / "run")
    trainer = json.loads(newest(copy).read_text())
    trainer["skipped"]["taken_down"] -= 1
    newest(copy).write_text(json.dumps(trainer))
    (problem,) = prove(copy).problems
    assert problem.startswith("the order has ") and problem.endswith(
        f"but the run counted {trainer['skipped']['taken_down']}"
    )


def test_a_run_without_a_list_proves_nothing_with_one_that_is_added_later(fork_server, tiny_pool, tmp_path):
    """As if a loader had ignored its list: the run trains on the samples, and a record claims that it did not."""
    config = write_config(tmp_path / "run.yaml", tiny_pool, steps=20, checkpoint={"every": 100})
    assert matrix.Starter(fork_server).run(matrix.job(config, tmp_path, processes=1)) == 0
    with pytest.raises(UserError, match="takedown: the run has had no takedown list up to step 20"):
        prove(tmp_path / "run")
    record = tmp_path / "run" / "takedown"
    record.mkdir()
    line = b'{"key": "000003"}\n'
    (record / "list.jsonl").write_bytes(line)
    start = {"step": 0, "samples_seen": 0, "position": [], "skipped": {}, "time": 0.0}
    version = {**start, "bytes": len(line), "lines": 1, "sha256": hashlib.sha256(line).hexdigest()}
    (record / "versions.json").write_text(json.dumps({"versions": [version]}))
    assert prove(tmp_path / "run").problems == ["the order has 1 places to leave out, but the run counted 0"]
    (record / "list.jsonl").write_bytes(line.replace(b"3", b"4"))
    with pytest.raises(UserError, match="its first 1 lines are not those in force after step 0"):
        prove(tmp_path / "run")


def test_other_shards_prove_nothing(run, folder, tmp_path):
    copy = copy_of(run, tmp_path / "run")
    extra = folder / "table" / "99999.tar"
    shutil.copy(folder / "table" / "00000.tar", extra)
    try:
        with pytest.raises(UserError, match="was saved with 3 shards of source table, now there are 4"):
            prove(copy)
    finally:
        extra.unlink()


@pytest.mark.parametrize("error", [ShardError("cut off"), CannotReach("no answer for 60 s")], ids=type)
def test_a_shard_that_cannot_be_read_is_named(error, run, proof, monkeypatch, capsys):
    open_shard = LocalShards.open

    def open_most(shards, number):
        if shards.names[number].endswith("table/00032.tar"):
            raise error
        return open_shard(shards, number)

    monkeypatch.setattr(LocalShards, "open", open_most)
    assert main(["data", "proof", str(run / "run")]) == 1
    captured = capsys.readouterr()
    (line,) = (line for line in captured.out.splitlines() if "cannot be read now" in line)
    assert line.endswith(f"table/00032.tar: {error}")
    assert f"but the run counted {proof.counted}" in captured.err


def test_a_folder_that_is_no_run_is_named(tmp_path, capsys):
    assert main(["data", "proof", str(tmp_path)]) == 2
    assert "has no checkpoint to prove anything for" in capsys.readouterr().err
