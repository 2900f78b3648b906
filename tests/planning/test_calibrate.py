"""Fractions of peaks fitted to measured steps: they are found again, written, and read by the next plan."""

import dataclasses
import json

import pytest

from mc2_hpc.cli import main
from mc2_hpc.config import config_to_dict
from mc2_hpc.errors import UserError
from mc2_hpc.planning import calibrate as calibrating
from mc2_hpc.planning.calibrate import Measured, calibrate, read_measured, write_machine
from mc2_hpc.planning.machines import read_gpu, read_network
from mc2_hpc.planning.predict import predict_step
from mc2_hpc.planning.records import Work
from tests.planning.test_predict import CONFIG, GIGA, GPU, NETWORK, TERA, trace


def measured(step_trace, gpu, network, path):
    seconds = predict_step(step_trace, CONFIG, gpu, network, per_node=8).seconds
    return Measured(path=path, config=CONFIG, ranks=step_trace.world_size, seconds=seconds, caption_tokens=18.0)


def mostly(kernels):
    small, large = Work(flops=1 * TERA, bytes=5 * GIGA), Work(flops=50 * TERA, bytes=250 * GIGA)
    products, other = (large, small) if kernels == "products" else (small, large)
    work = {"forward/products": products, "backward/other": dataclasses.replace(other, flops=0)}
    return dataclasses.replace(trace(world_size=1), work=work, collectives=())


def test_one_run_moves_all_fractions_together(tmp_path):
    true = dataclasses.replace(GPU, products=0.4, attention=0.2, memory=0.4)  # 0.8 of what is assumed
    step = trace(world_size=1)
    found = calibrate([measured(step, true, NETWORK, tmp_path)], [step], GPU, NETWORK, per_node=8)
    assert [found.gpu.products, found.gpu.attention, found.gpu.memory] == pytest.approx([0.4, 0.2, 0.4], rel=1e-3)
    assert not found.network_seen and found.network == NETWORK


def test_runs_of_different_work_tell_fractions_apart(tmp_path):
    true = dataclasses.replace(GPU, products=0.3, attention=0.15, memory=0.7)
    steps = [mostly("products"), mostly("other")]
    runs = [measured(step, true, NETWORK, tmp_path) for step in steps]
    found = calibrate(runs, steps, GPU, NETWORK, per_node=8)
    assert [found.gpu.products, found.gpu.memory] == pytest.approx([0.3, 0.7], rel=0.02)
    assert found.predicted == pytest.approx([run.seconds for run in runs], rel=0.02)


def test_runs_on_one_rank_and_on_several_tell_the_network(tmp_path):
    true = dataclasses.replace(NETWORK, achieved=0.25)
    steps = [trace(world_size=1), trace(world_size=16)]
    runs = [measured(step, GPU, true, tmp_path) for step in steps]
    found = calibrate(runs, steps, GPU, NETWORK, per_node=8)
    assert found.network_seen and found.network.achieved == pytest.approx(0.25, rel=0.02)
    assert found.gpu.products == pytest.approx(GPU.products, rel=0.02)


def test_a_step_above_the_peak_names_the_wrong_device(tmp_path):
    step = trace(world_size=1)
    run = dataclasses.replace(measured(step, GPU, NETWORK, tmp_path), seconds=0.1)
    with pytest.raises(UserError, match="need more than the peak of .*: name the device of the runs with --gpu"):
        calibrate([run], [step], GPU, NETWORK, per_node=8)


def test_files_are_read_back_with_their_source(tmp_path):
    step = trace(world_size=16)
    found = calibrate([measured(step, GPU, NETWORK, tmp_path / "rows")], [step], GPU, NETWORK, per_node=8)
    for machine, read in ((found.gpu, read_gpu), (found.network, read_network)):
        write_machine(tmp_path / "machine.yaml", machine)
        assert read(str(tmp_path / "machine.yaml")) == machine
    assert f"fitted to {tmp_path / 'rows'} on 16 ranks" in found.gpu.fractions_source


@pytest.mark.parametrize("name", ["a100", "b200", "cpu"])
def test_a_fitted_machine_keeps_its_usual_network(tmp_path, name):
    write_machine(tmp_path / "machine.yaml", dataclasses.replace(read_gpu(name), products=0.3))
    assert read_gpu(str(tmp_path / "machine.yaml")).network == read_gpu(name).network != "ndr"


@pytest.fixture
def run(tmp_path):
    """The folder of a run: rows and the part of a checkpoint that is read."""
    checkpoint = tmp_path / "checkpoints" / "step-00000006"
    checkpoint.mkdir(parents=True)
    values = {"config": config_to_dict(CONFIG), "world_size": 4}
    (checkpoint / "trainer.json").write_text(json.dumps(values))
    (checkpoint / "manifest.json").write_text("{}")
    row = {"data_wait": 0.5, "caption_tokens": 12.0, "loss": 1.0}
    rows = [{**row, "steps_per_second": rate} for rate in (0.01, 0.5, 0.25, 0.5, 0.5)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_what_is_read_of_a_run(run):
    found = read_measured(run / "metrics.jsonl")
    assert (found.config, found.ranks, found.seconds, found.caption_tokens) == (CONFIG, 4, 1.0, 12.0)


def test_a_run_that_does_not_tell_gets_one_line(run):
    path = run / "metrics.jsonl"
    trainer = run / "checkpoints" / "step-00000006" / "trainer.json"
    staged = {**config_to_dict(CONFIG), "stages": [{"steps": 1000}]}
    trainer.write_text(json.dumps({"config": staged, "world_size": 4}))
    with pytest.raises(UserError, match="a run of several stages.*calibrate with one without stages"):
        read_measured(path)
    (run / "checkpoints" / "step-00000006" / "manifest.json").unlink()
    with pytest.raises(UserError, match="no checkpoint beside it"):
        read_measured(path)
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:3]))
    with pytest.raises(UserError, match="2 rows after the first.*train longer"):
        read_measured(path)
    path.write_text('{"step": 1}\n' * 6)
    with pytest.raises(UserError, match="steps_per_second"):
        read_measured(path)


def test_the_command_writes_files_for_the_next_plan(run, monkeypatch, capsys):
    monkeypatch.setattr(calibrating, "trace_measured", lambda runs, *_, **__: [trace(world_size=4) for _ in runs])
    rows = run / "metrics.jsonl"
    assert main(["plan", "--calibrate", str(rows), "--gpu", "h100", "--json", str(run / "fit.json")]) == 0
    said = capsys.readouterr().out
    assert f"plan with --gpu {run / 'gpu.yaml'} --network {run / 'network.yaml'}" in said
    fit = json.loads((run / "fit.json").read_text())
    assert fit["step_seconds"] == [{"run": str(rows), "measured": 1.0, "fitted": pytest.approx(1.0, rel=1e-3)}]
    gpu = read_gpu(fit["files"]["gpu"])
    assert gpu.flops == read_gpu("h100").flops and gpu.products == fit["fractions"]["products"]
    assert main(["plan", "run.yaml", "--calibrate", str(rows)]) == 2
