"""The examples that load a model run as their docstrings say."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import mc2_hpc
from mc2_hpc.errors import UserError
from mc2_hpc.evaluation.suite import load_suite, run_suite

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def run(name, *arguments):
    """The standard output of an example."""
    done = subprocess.run(
        [sys.executable, EXAMPLES / name, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_embed_folder(tiny_checkpoint, image_folder, tmp_path):
    assert "10 images, 16-dimensional features" in run(
        "embed_folder.py", tiny_checkpoint, image_folder, tmp_path / "out.npz"
    )
    found = np.load(tmp_path / "out.npz")
    assert found["names"].tolist() == [f"{number:02d}.jpg" for number in range(10)]
    expected = mc2_hpc.load(tiny_checkpoint, device="cpu").encode_image(sorted(image_folder.iterdir()))
    np.testing.assert_allclose(found["features"], expected.numpy(), atol=1e-6)


def test_zero_shot(tiny_checkpoint, image_folder):
    lines = run("zero_shot.py", tiny_checkpoint, image_folder / "00.jpg").splitlines()
    assert [line.split()[0] for line in lines] == ["English", "German", "Russian", "Japanese", "Arabic"]


@pytest.fixture
def own_set(image_folder, tmp_path, examples):
    """A suite with one set of ten images in two classes, read by the example."""
    rows = "".join(f"{number:02d}.jpg,{'cat' if number % 2 else 'dog'}\n" for number in range(10))
    (image_folder / "labels.csv").write_text("file,class\n" + rows, encoding="utf-8")
    suite = tmp_path / "suite.yaml"
    suite.write_text(f"sets: {{birds: {{reader: evaluation_set.read, path: {image_folder}}}}}", encoding="utf-8")
    return suite


def test_evaluation_set(own_set, encoder):
    (result,) = run_suite(load_suite(own_set), encoder)
    assert not result.error and result.task.languages["en"].names == ["cat", "dog"]
    assert result.scores.groups["en"]["top1"] in [right / 10 for right in range(11)]


def test_what_a_reader_of_ones_own_may_do_wrong(own_set, encoder, image_folder, monkeypatch):
    with pytest.raises(UserError, match="birds: evaluation_set.nothing: module evaluation_set has no 'nothing'"):
        load_suite(own_set, ["sets.birds.reader=evaluation_set.nothing"])
    with pytest.raises(UserError, match="birds: .*no module 'nowhere' can be imported"):
        load_suite(own_set, ["sets.birds.reader=nowhere.read"])
    with pytest.raises(UserError, match="birds: evaluation_set.read has no option 'form'"):
        load_suite(own_set, ["sets.birds.options={form: x}"])
    import evaluation_set

    suite = load_suite(own_set)
    monkeypatch.setattr(evaluation_set, "read", lambda path: {}["labels"])
    (result,) = run_suite(suite, encoder)
    assert result.error.startswith("evaluation_set.read: KeyError: 'labels'")
    monkeypatch.setattr(evaluation_set, "read", lambda path: [1])
    (result,) = run_suite(suite, encoder)
    assert result.error == "evaluation_set.read: returned list, not a task of mc2_hpc.evaluation.tasks"
