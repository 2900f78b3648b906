"""Evaluation during training: same numbers as `mc2 eval`, best checkpoint kept, training unaffected."""

import json

import pytest
import torch
import yaml

from mc2_hpc.cli import main
from mc2_hpc.config import load_config
from mc2_hpc.conversion.convert import convert
from mc2_hpc.errors import UserError
from mc2_hpc.evaluation.dual_encoders.ours import OurEncoder
from mc2_hpc.models.average import AVERAGE
from mc2_hpc.models.tensor_files import TensorFiles
from mc2_hpc.models.weights import load_clip, resolve_checkpoint
from mc2_hpc.training.stop import SAVED
from tests.faults import matrix
from tests.faults.diary import losses, state_hashes
from tests.faults.tiny_run import write_caption_set, write_config, write_pool

STEPS, EVERY = 12, 4


@pytest.fixture(scope="module")
def extensions(tmp_path_factory):
    """The folder in which PyTorch would build extensions."""
    return tmp_path_factory.mktemp("extensions")


@pytest.fixture(scope="module")
def starter(extensions, fork_server):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_EXTENSIONS_DIR", str(extensions))
        yield matrix.Starter(fork_server)


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    """Sixteen images with captions in two languages, and a set that does not exist."""
    folder = tmp_path_factory.mktemp("sets")
    write_caption_set(folder / "squares", {"en": "square", "de": "Quadrat"})
    path = folder / "suite.yaml"
    sets = {
        "squares": {"reader": "caption_lines", "path": "squares", "gradient_pairs": 4},
        "nowhere": {"reader": "xm3600", "path": "nowhere"},
    }
    path.write_text(yaml.safe_dump({"root": str(folder), "sets": sets}))
    return path


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pool")
    values = {"steps": STEPS, "log_every": 1, "checkpoint": {"every": EVERY, "keep": 1}}
    return write_config(folder / "run.yaml", write_pool(folder), **values)


@pytest.fixture(scope="module")
def plain(config, starter, tmp_path_factory):
    """A run without evaluation."""
    folder = tmp_path_factory.mktemp("plain")
    assert starter.run(matrix.job(config, folder)) == 0
    return folder


def train(config, folder, starter, suite, *overrides, **options):
    """Train on two ranks that evaluate the suite every 4 steps; returns the exit code."""
    changes = [f"eval.suite={suite}", f"eval.every={EVERY}", "eval.batch=3", *overrides]
    code = starter.run(matrix.job(config, folder, overrides=changes, **options))
    assert code in (0, SAVED), (folder / "log").read_text()
    return code


def evaluations(folder):
    lines = (folder / "run" / "evaluations.jsonl").read_text(encoding="utf-8").splitlines()
    return {row["step"]: row for row in map(json.loads, lines)}


def same_numbers(found, expected):
    """Whether two sets of results are equal, ignoring their times."""
    found, expected = ({key: value for key, value in entry.items() if key != "seconds"} for entry in (found, expected))
    for part in ("mean", "embedding_mean"):
        assert found.pop(part) == pytest.approx(expected.pop(part), abs=1e-5)
    for part in ("groups", "embedding"):
        ours, theirs = found.pop(part), expected.pop(part)
        assert {lang: pytest.approx(numbers, abs=1e-5) for lang, numbers in theirs.items()} == ours
    assert found == expected


def test_changes_no_bit_of_the_training_and_equals_mc2_eval(config, starter, suite, plain, tmp_path):
    assert train(config, tmp_path, starter, suite) == 0
    assert losses(tmp_path) == losses(plain)
    assert state_hashes(tmp_path, STEPS) == state_hashes(plain, STEPS)
    rows = evaluations(tmp_path)
    assert sorted(rows) == [4, 8, 12]
    assert "nowhere" in rows[12]["sets"]["nowhere"]["error"]
    cosines = rows[12]["sets"]["squares"]["embedding"]["de"]
    assert 0 < abs(cosines["gradient_cosine_both"]) < 1
    assert main(["eval", str(tmp_path / "run"), "--suite", str(suite), "--out", str(tmp_path / "eval")]) == 0
    again = json.loads((tmp_path / "eval" / "results.json").read_text(encoding="utf-8"))["sets"]
    same_numbers(rows[12]["sets"]["squares"], again["squares"])
    table = (tmp_path / "eval" / "results.md").read_text(encoding="utf-8")
    assert "gradient_cosine_both" in table


def test_the_best_checkpoint_stays(config, starter, suite, tmp_path):
    """If nothing is learnt, the first evaluation stays the best, even after several newer checkpoints."""
    assert train(config, tmp_path, starter, suite, "optim.lr=0") == 0
    rows = evaluations(tmp_path)
    assert [rows[step]["best"] for step in (4, 8, 12)] == [True, False, False]
    checkpoints = tmp_path / "run" / "checkpoints"
    assert sorted(path.name for path in checkpoints.glob("step-*")) == ["step-00000004", "step-00000012"]
    assert resolve_checkpoint(checkpoints / "best.json") == checkpoints / "step-00000004"
    best = json.loads((checkpoints / "best.json").read_text())
    assert best["metric"] == "squares/text_to_image_R@1"
    assert best["value"] == rows[4]["sets"]["squares"]["mean"]["text_to_image_R@1"]


def test_partitioned_weights_are_evaluated_whole(config, starter, suite, tmp_path):
    """Stage 3 on three ranks gives the same numbers as the checkpoint that it saved."""
    options = ["zero.stage=3", "zero.persist_below_elements=0", "steps=4"]
    assert train(config, tmp_path, starter, suite, *options, processes=3) == 0
    assert main(["eval", str(tmp_path / "run"), "--suite", str(suite), "--out", str(tmp_path / "eval")]) == 0
    again = json.loads((tmp_path / "eval" / "results.json").read_text(encoding="utf-8"))["sets"]
    same_numbers(evaluations(tmp_path)[4]["sets"]["squares"], again["squares"])


@pytest.mark.parametrize("stage", [1, 3])
def test_frozen_weights_are_evaluated_too(config, starter, suite, tmp_path, stage):
    """Gradients between languages are those of all parameters, and training continues without them."""
    frozen = ["freeze.vision=all", "freeze.text=1", f"zero.stage={stage}", "zero.persist_below_elements=0"]
    assert train(config, tmp_path, starter, suite, *frozen, "steps=8") == 0
    rows = evaluations(tmp_path)
    assert sorted(rows) == [4, 8]
    assert main(["eval", str(tmp_path / "run"), "--suite", str(suite), "--out", str(tmp_path / "eval")]) == 0
    again = json.loads((tmp_path / "eval" / "results.json").read_text(encoding="utf-8"))["sets"]
    same_numbers(rows[8]["sets"]["squares"], again["squares"])


def test_the_moving_average_is_evaluated_exported_and_resumed(config, starter, suite, tmp_path):
    """A run stopped half-way ends with the same bits, and its average converts to a model like any other."""
    options = ["optim.ema_decay=0.9", "eval.ema=true", "freeze.vision=1"]
    for folder, stop_after in (("whole", None), ("halves", 6), ("halves", None)):
        train(config, tmp_path / folder, starter, suite, *options, stop_after=stop_after)
    last = [resolve_checkpoint(tmp_path / folder / "run") for folder in ("whole", "halves")]
    for prefix in ("model", "optimizer", AVERAGE):
        files = [TensorFiles(folder, prefix) for folder in last]
        assert files[0].names() == files[1].names()
        assert all(torch.equal(files[0].get(name), files[1].get(name)) for name in files[0].names())
    assert "vision.class_embedding" not in TensorFiles(last[0], AVERAGE)
    assert main(["eval", str(last[0]), "--ema", "--suite", str(suite), "--out", str(tmp_path / "eval")]) == 0
    again = json.loads((tmp_path / "eval" / "results.json").read_text(encoding="utf-8"))
    same_numbers(evaluations(tmp_path / "whole")[STEPS]["sets"]["squares"], again["sets"]["squares"])
    cpu = torch.device("cpu")
    assert OurEncoder.load(last[0], cpu, None).identity != OurEncoder.load(last[0], cpu, None, ema=True).identity
    assert main(["convert", str(last[0]), "--ema", "--to", "mc2", "--out", str(tmp_path / "average")]) == 0
    found, expected = load_clip(tmp_path / "average")[0].state_dict(), load_clip(last[0], ema=True)[0].state_dict()
    trained = load_clip(last[0])[0].state_dict()
    assert found.keys() == expected.keys() == trained.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    same = {name for name in found if torch.equal(found[name], trained[name])}
    assert same == {name for name in found if name not in TensorFiles(last[0], AVERAGE)}


def test_a_signal_ends_an_evaluation_and_the_next_start_does_it(config, starter, suite, plain, tmp_path):
    """Between two saves, so that the signal causes the save."""
    changes = ["checkpoint.every=100", "eval.every=6"]
    fault = {"at": "evaluation", "step": 6, "rank": 1, "do": ["TERM"]}
    assert train(config, tmp_path, starter, suite, *changes, faults=[fault]) == SAVED
    assert not evaluations(tmp_path)
    assert train(config, tmp_path, starter, suite, *changes, faults=[fault]) == 0
    assert sorted(evaluations(tmp_path)) == [6, 12]
    assert losses(tmp_path) == losses(plain)
    assert state_hashes(tmp_path, STEPS) == state_hashes(plain, STEPS)


def test_nothing_is_compiled_to_train_on_a_cpu(plain, extensions):
    """A process killed while compiling leaves a lock that later ones would wait for."""
    assert list(extensions.iterdir()) == []


def test_bad_settings_are_one_line(config, suite, tmp_path, capsys):
    with pytest.raises(UserError, match="need eval.suite"):
        load_config(config, ["eval.best=squares/top1"])
    command = ["train", str(config), f"output={tmp_path}", f"eval.suite={suite}"]
    assert main([*command, "eval.best=circles/top1"]) == 2
    assert "has no such set; write <set>/<metric> with one of nowhere, squares" in capsys.readouterr().err
    assert main(["train", str(config), f"output={tmp_path}", "eval.suite=nowhere.yaml"]) == 2
    assert "nowhere.yaml: no such suite file" in capsys.readouterr().err
    with pytest.raises(UserError, match="eval.ema=true: there is no moving average; set optim.ema_decay"):
        load_config(config, ["eval.ema=true"])


def test_a_model_without_an_average_is_one_line(plain, suite, tmp_path, capsys):
    exported = convert(plain / "run", "open_clip", tmp_path / "exported")
    words = {plain / "run": "step-00000012: has no moving average of its weights", exported: "in the format open_clip"}
    for source, expected in words.items():
        for command in (["eval", "--suite", str(suite)], ["convert", "--to", "hf", "--out", str(tmp_path / "out")]):
            assert main([command[0], str(source), "--ema", *command[1:]]) == 2
            lines = capsys.readouterr().err.splitlines()
            assert len(lines) == 1 and expected in lines[0] and lines[0].endswith("leave out --ema"), lines
    assert not (tmp_path / "out").exists()
