"""``log.wandb``: rows reach Weights & Biases, and nothing about it ends or blocks a run."""

import importlib.util
import json
import sys
import threading
import time
from types import ModuleType

import pytest

from mc2_hpc.training import wandb_log
from mc2_hpc.training.metrics import MetricsLog

ROW = {"step": 5, "loss": 1.5, "lr": 1e-3, "logit_scale": 14.0, "grad_norm": 1.0, "mfu": 0.4, "data_wait": 0.1}
ROW |= {
    "samples_per_second": 64.0,
    "steps_per_second": 2.0,
    "skipped": {"read_error": 2},
    "language_share": {"en": 1.0},
}


class StandIn(ModuleType):
    """The part of the package ``wandb`` that is used; it remembers what it was told."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.starts: list[dict] = []
        self.rows: list[dict] = []
        self.metrics: list[tuple] = []
        self.finished = 0
        self.block = threading.Event()
        self.block.set()
        self.error: BaseException | None = None

    def Settings(self, **settings):
        return settings

    def init(self, **options):
        self.block.wait(60)
        if self.error is not None:
            raise self.error
        self.starts.append(options)
        return self

    def define_metric(self, name, *, step_metric):
        self.metrics.append((name, step_metric))

    def log(self, row):
        self.block.wait(60)
        if self.error is not None:
            raise self.error
        self.rows.append(row)

    def finish(self):
        self.finished += 1

    def teardown(self):
        assert self.finished


@pytest.fixture
def wandb(monkeypatch) -> StandIn:
    standin = StandIn()
    monkeypatch.setitem(sys.modules, "wandb", standin)
    monkeypatch.setattr(wandb_log, "START_S", 0.2)
    monkeypatch.setattr(wandb_log, "END_S", 0.2)
    return standin


def train(folder, num_rows=1):
    log = MetricsLog(folder, total_steps=100, first_step=0, wandb_config={"steps": 100})
    for _ in range(num_rows):
        log.write(ROW)
    log.close()
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [ROW] * num_rows


def one_warning(caplog):
    (found,) = [text for text in caplog.messages if "Weights & Biases" in text]
    assert "\n" not in found and found.startswith("no rows for Weights & Biases from here on: ")
    return found.partition(": ")[2]


def test_rows_and_evaluations_reach_it(wandb, tmp_path):
    log = MetricsLog(tmp_path / "run", total_steps=100, first_step=0, wandb_config={"steps": 100})
    log.write(ROW)
    log.write_evaluation({"step": 5, "sets": {"x": {"mean": {"acc1": 0.5}, "groups": {"en": {"acc1": 0.25}}}}})
    log.close()
    row, evaluation = wandb.rows
    assert row == {key: value for key, value in ROW.items() if not isinstance(value, dict)} | {
        "skipped/read_error": 2,
        "language_share/en": 1.0,
    }
    assert evaluation == {"step": 5, "eval/x/acc1": 0.5, "eval_by_group/x_acc1/en": 0.25}
    assert wandb.metrics == [("*", "step")] and wandb.finished == 1
    (start,) = wandb.starts
    assert (start["dir"], start["name"], start["config"]) == (str(tmp_path / "run"), "run", {"steps": 100})


def test_a_resumed_run_continues_its_own(wandb, tmp_path):
    for name in ("a", "a", "b"):
        MetricsLog(tmp_path / name, total_steps=100, first_step=0, wandb_config={}).close()
    first, again, other = (start["id"] for start in wandb.starts)
    assert first == again != other and {start["resume"] for start in wandb.starts} == {"allow"}


def test_it_is_asked_for(wandb, tmp_path):
    MetricsLog(tmp_path, total_steps=100, first_step=0).close()
    assert not wandb.starts and not (tmp_path / "wandb").exists()


def test_a_missing_package_is_one_warning(monkeypatch, tmp_path, caplog):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    train(tmp_path, num_rows=2)
    assert one_warning(caplog).endswith("pip install wandb")


@pytest.mark.parametrize("error", [OSError("no network\nhere"), SystemExit(1), KeyboardInterrupt()], ids=repr)
def test_a_start_that_fails_is_one_warning(wandb, tmp_path, caplog, error):
    wandb.error = error
    train(tmp_path, num_rows=2)
    assert one_warning(caplog).startswith(type(error).__name__)


def test_a_start_that_hangs_is_waited_for_only_so_long(wandb, tmp_path, caplog):
    wandb.block.clear()
    begin = time.monotonic()
    train(tmp_path, num_rows=2)
    assert time.monotonic() - begin < 30
    assert one_warning(caplog) == "it has not started within 0 s"
    wandb.block.set()


def test_rows_never_wait(wandb, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(wandb_log, "_MOST_ROWS", 3)
    log = MetricsLog(tmp_path, total_steps=100, first_step=0, wandb_config={})
    wandb.block.clear()
    for _ in range(20):
        log.write(ROW)
    log.close()
    wandb.block.set()
    assert one_warning(caplog) == "3 rows are waiting to be sent"


def test_an_end_that_hangs_is_waited_for_only_so_long(wandb, tmp_path, caplog):
    log = MetricsLog(tmp_path, total_steps=100, first_step=0, wandb_config={})
    wandb.block.clear()
    log.write(ROW)
    log.close()
    wandb.block.set()
    assert one_warning(caplog) == "the last rows are not sent after 0 s"


def test_rows_that_fail_later_are_one_warning(wandb, tmp_path, caplog):
    log = MetricsLog(tmp_path, total_steps=100, first_step=0, wandb_config={})
    wandb.error = RuntimeError("gone")
    for _ in range(3):
        log.write(ROW)
    log.close()
    assert one_warning(caplog) == "RuntimeError: gone"


def test_the_real_package_writes_offline(tmp_path, monkeypatch, caplog):
    if importlib.util.find_spec("wandb") is None:
        pytest.skip("wandb is not installed (pip install wandb)")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for _ in range(2):
        (tmp_path / "metrics.jsonl").unlink(missing_ok=True)
        train(tmp_path)
    files = list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    name = (tmp_path / "wandb" / "run-id").read_text().strip()
    assert {path.name for path in files} == {f"run-{name}.wandb"} and not caplog.messages
    for path in files:
        assert b"language_share/en" in path.read_bytes() and b"samples_per_second" in path.read_bytes()
