"""``mc2 tune``: with a runner that answers from a table, and with real processes on this machine's CPU."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mc2_hpc.cli import main
from mc2_hpc.config import load_config, with_settings
from mc2_hpc.errors import UserError
from mc2_hpc.planning.processes import TraceError
from mc2_hpc.tuning.fitting import Fitting
from mc2_hpc.tuning.record import TRIALS
from mc2_hpc.tuning.report import write_config, write_report
from mc2_hpc.tuning.space import KEYS
from mc2_hpc.tuning.trial import LocalRunner, Trial, read_result
from mc2_hpc.tuning.tune import tune
from tests.tuning.conftest import TableRunner


@pytest.fixture
def unplanned(machine):
    """A machine whose memory is not known, so that nothing is traced."""
    return dataclasses.replace(machine, memory_bytes=None)


def call(path, out, machine, runner, *overrides, trials=8, **options):
    options = {"minutes": 5, "steps": 4, "caption_tokens": 8, "machine": machine, "runner": runner, **options}
    return tune(path, overrides, out, trials=trials, **options)


def rate(trial):
    return 200.0 if trial.settings.get("zero.stage") == 0 else 100.0


def test_results_are_written_and_a_restart_repeats_nothing(module_config, tmp_path, unplanned):
    runner = TableRunner(rate)
    tuning = call(module_config, tmp_path, unplanned, runner)
    assert tuning.best.settings["zero.stage"] == 0 and tuning.gain == 2.0
    assert [each.turns for each in tuning.results] == [1, 1, 1, 1, 1, 1, 3, 3]
    turns = [(trial.settings, trial.steps) for trial in runner.ran[6:]]
    assert len(turns) == 6 and turns[:2] == turns[2:4] == turns[4:]
    again = TableRunner(rate)
    assert call(module_config, tmp_path, unplanned, again).results == tuning.results and not again.ran
    more = TableRunner(rate)
    assert len(call(module_config, tmp_path, unplanned, more, trials=10).results) > len(tuning.results)
    assert not {trial.key for trial in more.ran} & {trial.key for trial in runner.ran}
    other = TableRunner(rate)
    call(module_config, tmp_path, unplanned, other, "global_batch=16")
    assert len(other.ran) == len(runner.ran)


@pytest.mark.parametrize("ran, turns", [(9, [1, 1]), (10, [2, 2]), (7, [1])])
def test_settings_are_compared_by_as_many_turns(module_config, tmp_path, unplanned, ran, turns):
    """Where the time is up within the last round."""

    class Ending(TableRunner):
        def run(self, trials, report, *, until):
            super().run(trials[: ran - len(self.ran)], report, until=until)

    runner = Ending(rate)
    tuning = call(module_config, tmp_path, unplanned, runner)
    assert len(runner.ran) == ran and [each.turns for each in tuning.results[6:]] == turns


def test_data_that_were_written_again_have_trials_of_their_own(module_config, tmp_path, unplanned):
    own = load_config(module_config)
    shards = shutil.copytree(own.data.train, tmp_path / "shards")
    first, second, third = TableRunner(rate), TableRunner(rate), TableRunner(rate)
    call(module_config, tmp_path / "out", unplanned, first, f"data.train={shards}", trials=2)
    call(module_config, tmp_path / "out", unplanned, second, f"data.train={shards}", trials=2)
    assert len(first.ran) == 2 and not second.ran
    os.utime(sorted(shards.glob("*.tar"))[0], ns=(1, 1))
    call(module_config, tmp_path / "out", unplanned, third, f"data.train={shards}", trials=2)
    assert len(third.ran) == 2


def test_the_report_and_the_copy_of_the_config(module_config, tmp_path, unplanned):
    tuning = call(module_config, tmp_path, unplanned, TableRunner(rate), "seed=3")
    write_report(tuning, tmp_path)
    best = (tmp_path / "best.yaml").read_text()
    assert "# 2.00x the config as it is given (100.0 pairs/s)" in best and "\nzero:\n  stage: 0\n" in best
    found = json.loads((tmp_path / "tune.json").read_text())
    assert found["best"] == tuning.best.settings and found["limit"] == "compute" and len(found["trials"]) == 8
    assert (tmp_path / "tune.png").read_bytes().startswith(b"\x89PNG")
    copy = tmp_path / "copy.yaml"
    write_config(tuning, module_config, ["seed=3"], copy)
    config = load_config(copy)
    assert (config.zero.stage, config.seed, config.steps) == (0, 3, load_config(module_config).steps)
    assert "zero.stage=0" in copy.read_text().partition("\nmodel:")[0]


def test_failed_trials_are_rows(module_config, tmp_path, unplanned):
    def answer(trial):
        return ("out of memory", "CUDA out of memory") if trial.settings else 100.0

    tuning = call(module_config, tmp_path, unplanned, TableRunner(answer), trials=4)
    assert [each.status for each in tuning.results] == ["ok", *["out of memory"] * 3]
    assert tuning.best.settings == {}
    write_report(tuning, tmp_path)
    assert "out of memory" in (tmp_path / "best.yaml").read_text()


@pytest.mark.parametrize("status", ["crash", "timeout"])
def test_a_config_that_cannot_train_is_told_and_not_recorded(module_config, tmp_path, unplanned, status):
    with pytest.raises(UserError, match="cannot train as it is: no such thing"):
        call(module_config, tmp_path, unplanned, TableRunner(lambda trial: (status, "no such thing")))
    assert not (tmp_path / TRIALS).exists()


def test_no_time_at_all(module_config, tmp_path, unplanned):
    class Never:
        def run(self, trials, report, *, until):
            pass

    with pytest.raises(UserError, match="not a single trial ended within --minutes 5"):
        call(module_config, tmp_path, unplanned, Never())


@pytest.mark.parametrize(
    "words, message",
    [
        (["data.train="], "data.train is not set: name the shards, or add --synthetic"),
        (["data.train=nowhere"], "nowhere"),
        (["data.tokenizer=no.model"], "no.model"),
        (["data.tokenizer="], "data.tokenizer is not set: name a sentencepiece model file, or add --synthetic"),
        (["micro_batch=1", "data.lanes=32"], None),
        (["--processes", "16"], "16 ranks but data.lanes=8"),
        (["--trials", "0"], "must be at least 1"),
        (["--gpu", "h100"], "--gpu is for --slurm"),
        (["--dry-run"], "--dry-run prints the batch script"),
        (["--processes", "2", "--slurm", "nodes=2"], "--processes is for ranks on this machine"),
        (
            ["stages=[{steps: 5}, {steps: 5}]", "steps=10"],
            "stages: each has a fastest setting of its own; tune one with stages=[]",
        ),
        (["--synthetic", "distill.features=/f"], "--synthetic generates images, and the config reads distill.features"),
        (["modle.compile=true"], "unknown key 'modle'"),
    ],
)
def test_bad_input_is_one_line(module_config, machine, tmp_path, capsys, monkeypatch, words, message):
    if message is None:  # it may train: only see that nothing before the trials refuses it
        monkeypatch.setattr(LocalRunner, "run", lambda *_, **__: None)
        message = "not a single trial ended"
    monkeypatch.setattr(Fitting, "_why_unknown", lambda _: "not asked")

    def examine(ranks):  # the real one is a process that imports torch: see test_machines.py
        return dataclasses.replace(machine, ranks=ranks or 1, ranks_per_node=ranks or 1)

    monkeypatch.setattr("mc2_hpc.tuning.tune.examine", examine)
    slurm = words.index("--slurm") if "--slurm" in words else len(words)
    command = ["tune", str(module_config), "--out", str(tmp_path / "out"), *words[:slurm], *words[slurm:]]
    assert main(command) == 2
    error = capsys.readouterr().err.splitlines()
    assert message in error[-1] and error[-1].startswith("mc2: ")
    assert sum(line.startswith("mc2: ") for line in error) == 1


@pytest.fixture
def imagined_peaks(monkeypatch):
    """A plan in which a rank needs 100 bytes, and 10 for each pair that it keeps: 1 with recomputation."""

    def peaks(fitting, settings):
        found = []
        for each in settings:
            config = with_settings(fitting._config, each)
            kept = config.micro_batch or config.global_batch // fitting._machine.ranks
            found.append(100 + kept * (10 if config.model.recompute == "none" else 1) + config.global_batch // 2)
        return found

    monkeypatch.setattr(Fitting, "peaks", peaks)


@pytest.mark.parametrize(
    "memory, cure", [(90, "whatever the batch: use a smaller model"), (300, "fits, or this one on 24 ranks")]
)
def test_a_batch_that_cannot_fit_says_what_would(module_config, tmp_path, machine, imagined_peaks, memory, cure):
    small = dataclasses.replace(machine, memory_bytes=memory)
    runner = TableRunner(rate)
    with pytest.raises(UserError) as raised:
        call(module_config, tmp_path, small, runner, "global_batch=4096")
    line = str(raised.value)
    assert not runner.ran and "\n" not in line and cure in line
    assert line.startswith("global_batch=4096 does not fit 2 rank(s): micro_batch=256 model.recompute=full")


def test_a_batch_that_cannot_fit_is_told_even_if_half_of_it_cannot_be_traced(
    module_config, tmp_path, machine, imagined_peaks, monkeypatch
):
    imagined = Fitting.peaks

    def peaks(fitting, settings):
        if any("global_batch" in each for each in settings):
            raise TraceError("a trace failed")
        return imagined(fitting, settings)

    monkeypatch.setattr(Fitting, "peaks", peaks)
    with pytest.raises(
        UserError, match="^global_batch=4096 does not fit .*; what would fit is not known: a trace failed$"
    ):
        call(
            module_config,
            tmp_path,
            dataclasses.replace(machine, memory_bytes=300),
            TableRunner(rate),
            "global_batch=4096",
        )


def test_settings_that_do_not_fit_are_left_out(module_config, tmp_path, machine, imagined_peaks):
    tight = dataclasses.replace(machine, memory_bytes=3000)
    runner = TableRunner(rate)
    tuning = call(module_config, tmp_path, tight, runner, "global_batch=512", trials=8)
    assert tuning.given is not None  # 100 + 2560 + 256
    tighter = dataclasses.replace(machine, memory_bytes=2000, name="other")
    tuning = call(module_config, tmp_path, tighter, runner, "global_batch=512", trials=8)
    assert tuning.given is None and tuning.results[0].settings == {"model.recompute": "selective"}
    assert all(each.settings["model.recompute"] != "none" for each in tuning.results)


def test_what_cannot_fit_is_found_by_the_plan(module_config, machine):
    """The room lies between the peaks of the config and of the same with every block computed again."""
    config = load_config(module_config, ["global_batch=256"])
    alone = dataclasses.replace(machine, ranks=1, ranks_per_node=1)
    fitting = Fitting(config, alone, caption_tokens=8)
    whole, lean = fitting.peaks([{}, {"model.recompute": "full"}])
    assert lean < whole
    fitting._machine = dataclasses.replace(alone, memory_bytes=(whole + lean) // 2)
    assert fitting.that_fit([{}, {"model.recompute": "full"}]) == [{"model.recompute": "full"}]


# ---- what is measured


@pytest.fixture
def trial(config, tmp_path):
    return Trial(key="k", config=config, settings={}, steps=4, folder=tmp_path / "trials/k", ranks=1, bound_s=200)


def test_a_trial_keeps_the_arithmetic_and_saves_nothing(config, tmp_path):
    settings = {"micro_batch": 4, "data.prefetch": 5, "zero.stage": 2}
    trial = Trial(key="k", config=config, settings=settings, steps=8, folder=tmp_path / "k", ranks=2, bound_s=1)
    found = trial.run_config
    same = ("global_batch", "precision", "seed", "freeze", "distill")
    assert all(getattr(found, name) == getattr(config, name) for name in same)
    assert (found.micro_batch, found.data.prefetch, found.zero.stage) == (4, 5, 2)
    assert not found.checkpoint.last and found.checkpoint.every > found.steps and found.eval.suite is None
    assert trial.warmup >= 5 + 2 and trial.warmup % found.log_every == 0
    assert found.steps == trial.warmup + 8 + 2 and found.profile.steps == (found.steps - 1, found.steps)
    assert found.profile.ranks == [0, 1]


STATE = {"since": 2.0, "started": 1.0, "starts": 1, "steps": 8, "global_batch": 32, "ranks": 1, "host": "h", "job": "1"}


@pytest.mark.parametrize(
    "error, log, status, shown",
    [
        ("OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB", "", "out of memory", "CUDA out of memory"),
        ("RuntimeError: [enforce fail] DefaultCPUAllocator: can't allocate memory", "", "out of memory", "enforce"),
        ("", "12:00:00 E rank 1 was killed by SIGKILL\n", "out of memory", "rank 1 was killed by SIGKILL"),
        ("", "slurmstepd: error: Detected 1 oom_kill event in StepId=1.0\n", "out of memory", "oom_kill"),
        ("model.norm=apex: not installed", "", "crash", "model.norm=apex: not installed"),
        (
            "ValueError: x",
            "12:00:00 E killing ranks 1, which are still running\n12:00:01 E rank 1 was killed by SIGKILL\n",
            "crash",
            "ValueError: x",
        ),
        ("", "Traceback (most recent call last):\nKeyError: 'x'\n", "crash", "KeyError: 'x'"),
        ("", "", "crash", "without an error message"),
    ],
)
def test_how_a_trial_failed(trial, error, log, status, shown):
    trial.prepare()
    output = trial.folder / "run"
    output.mkdir()
    ended = {"state": "failed", "error": {"time": 2.0, "text": error}} if error else {"state": "running"}
    state = {**STATE, **ended}
    (output / "state.json").write_text(json.dumps(state))
    (trial.folder / "train.log").write_text(log)
    found = read_result(trial, seconds=3.0, timed_out=False)
    assert found.status == status and shown in found.error and "\n" not in found.error
    assert found.seconds == 3.0 and found.waits is None


ROW = {"step": 5, "samples_per_second": 10.0, "steps_per_second": 2.0, "data_wait": 0.1}


@pytest.mark.parametrize(
    ("rows", "error"),
    [
        ([{**ROW, "steps_per_second": 0.0}], "steps_per_second"),
        ([{**ROW, "samples_per_second": float("nan")}], "not valid JSON"),
        ([{"step": 5}], "'samples_per_second' is missing"),
        ([], "without rows of metrics"),
    ],
)
def test_rows_that_are_none_are_a_failure(trial, rows, error):
    finish(trial, "".join(json.dumps(row) + "\n" for row in rows))
    found = read_result(trial, seconds=3.0, timed_out=False)
    assert found.status == "crash" and error in found.error


def test_a_trial_without_a_whole_profile_is_told(trial, caplog):
    finish(trial, json.dumps(ROW) + "\n")
    found = read_result(trial, seconds=3.0, timed_out=False)
    assert found.ok and found.pairs_per_second == 10.0 and found.waits is None
    (trial.folder / "run" / "profile").mkdir()
    (trial.folder / "run" / "profile" / "rank-00000.steps-9-10.trace.json.gz").write_bytes(b"half")
    assert read_result(trial, seconds=3.0, timed_out=False) == found
    none, damaged = caplog.messages
    assert "left no profile" in none and "not a whole profile" in damaged


def finish(trial, rows):
    trial.prepare()
    output = trial.folder / "run"
    output.mkdir()
    (output / "state.json").write_text(json.dumps({**STATE, "state": "finished"}))
    (output / "metrics.jsonl").write_text(rows)


def test_a_crash_and_a_bound_with_real_processes(config, tmp_path):
    """A backend without kernels for this machine, and a trial that is stopped long before it is done."""

    def make(name, settings, bound_s):
        folder = tmp_path / "trials" / name
        return Trial(key=name, config=config, settings=settings, steps=4, folder=folder, ranks=1, bound_s=bound_s)

    results = []
    trials = [make("crash", {"model.attention": "xformers", "precision": "bf16"}, 200), make("bound", {}, 2)]
    LocalRunner().run(trials, results.append, until=time.monotonic() + 400)
    crash, bound = results
    assert crash.status == "crash" and "xformers" in crash.error
    assert bound.status == "timeout" and "not done after 2 s" in bound.error
    assert not processes_of(tmp_path)


def processes_of(folder: Path) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(folder).encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue  # it has ended
    return found


@pytest.fixture(scope="module")
def command(module_config, tmp_path_factory):
    """A search with real processes and generated data, and its folder."""
    out = tmp_path_factory.mktemp("tune") / "out"
    words = ["tune", str(module_config), "--synthetic", "--trials", "2", "--steps", "2", "--minutes", "20"]
    words += ["--processes", "1", "--out", str(out), "--write", str(out / "copy.yaml")]
    return [sys.executable, "-m", "mc2_hpc.cli", *words], out


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(scope="module")
def restarted(command, fork_server):
    """The same command after it was killed in its second trial: what the first call left, and the second's output."""
    words, out = command
    killed = fork_server.start(words, env=environment())
    deadline = time.monotonic() + 400
    # The first trial is recorded, and another has begun.
    while len(list(out.glob("trials/*/trial.yaml"))) < 2:
        assert killed.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    first = (out / TRIALS).read_text()
    result = fork_server.run(words, env=environment(), timeout=500)
    return first, result


@pytest.mark.timeout(900)
def test_a_killed_search_continues_where_it_was(restarted, command):
    first, result = restarted
    _, out = command
    assert result.returncode == 0, result.stderr
    lines = (out / TRIALS).read_text()
    assert first.count("\n") == 1 and lines.startswith(first) and lines.count("\n") == 2
    assert "as given, 2 steps" not in result.stderr  # answered from the record


@pytest.mark.timeout(900)
def test_what_a_real_search_finds(restarted, command):
    _, result = restarted
    _, out = command
    assert result.returncode == 0, result.stderr
    found = json.loads((out / "tune.json").read_text())
    assert [trial["status"] for trial in found["trials"]] == ["ok", "ok"]
    for trial in found["trials"]:
        assert trial["slowest"] <= trial["pairs_per_second"] <= trial["fastest"]
        # The rate and the parts of a step are of the same rows.
        assert sum(trial["waits"].values()) == pytest.approx(32 / trial["pairs_per_second"], rel=0.5)
        assert trial["waits"]["compute"] > 0 and trial["waits"]["network"] < sum(trial["waits"].values())
    assert found["pairs_per_second"] >= found["trials"][0]["pairs_per_second"]
    assert set(found["best"]) <= set(KEYS)
    assert "pairs/s" in result.stdout and "mc2 train" in result.stdout
    assert load_config(out / "copy.yaml").data.train != str(out / "synthetic")
    assert not list(out.glob("trials/*/run/checkpoints/step-*"))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_trials_that_really_run_out_of_memory(module_config, tmp_path):
    """Processes get 3 GiB of data, which no plan knows of: each trial fails, and the next one is leaner."""
    out = tmp_path / "out"
    words = ["tune", str(module_config), "--synthetic", "--trials", "2", "--steps", "1", "--processes", "1"]
    words += ["model.vision.layers=24", "model.vision.width=64", "model.vision.patch_size=4", "global_batch=512"]
    limited = ["prlimit", f"--data={3 << 30}", sys.executable, "-m", "mc2_hpc.cli", *words, "--out", str(out)]
    result = subprocess.run(limited, env=environment(), capture_output=True, text=True, timeout=800)
    assert result.returncode == 2, result.stderr
    assert "every setting ran out of memory, model.recompute=selective too: lower global_batch" in result.stderr
    trials = [json.loads(line) for line in (out / TRIALS).read_text().splitlines()]
    assert [trial["settings"] for trial in trials] == [{}, {"model.recompute": "selective"}]
    assert all(trial["status"] == "out of memory" and "can't allocate" in trial["error"] for trial in trials)
