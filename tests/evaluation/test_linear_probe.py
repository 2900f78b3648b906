"""Linear probe: scikit-learn's logistic regression, chosen as in the CLIP paper; and as part of a suite."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml

from mc2_hpc.cli import main
from mc2_hpc.errors import UserError
from mc2_hpc.evaluation.linear_probe import STRENGTHS, linear_probe, peak


def features_of(count, classes, seed, noise=0.6):
    """Unit-length features in overlapping clusters."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, 12, generator=torch.Generator().manual_seed(9))
    labels = torch.randint(classes, (count,), generator=generator)
    return F.normalize(centres[labels] + noise * torch.randn(count, 12, generator=generator), dim=1), labels


@pytest.mark.parametrize("classes", [2, 5])
def test_equals_scikit_learns_on_the_best_strength(classes):
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import balanced_accuracy_score, top_k_accuracy_score

    train, labels = features_of(160, classes, seed=0, noise=1.2)
    test, expected = features_of(120, classes, seed=1, noise=1.2)
    validation = torch.arange(160) % 5 == 0
    found = linear_probe(train, labels, validation, test)

    def fit(rows, strength):
        return LogisticRegression(C=strength, max_iter=1000).fit(train[rows].double(), labels[rows])

    held = {c: fit(~validation, c).score(train[validation].double(), labels[validation]) for c in STRENGTHS[::8]}
    assert found.validation_top1 >= max(held[c] for c in STRENGTHS[::16])
    assert found.validation_top1 == pytest.approx(
        fit(~validation, found.strength).score(train[validation].double(), labels[validation])
    )
    model = fit(torch.ones(160, dtype=torch.bool), found.strength)
    numbers = found.numbers(expected)
    assert numbers["linear_probe_top1"] == pytest.approx(model.score(test.double(), expected))
    predicted = model.predict(test.double())
    assert numbers["linear_probe_mean_per_class_top1"] == pytest.approx(balanced_accuracy_score(expected, predicted))
    if classes > 2:
        probabilities = model.predict_proba(test.double())
        assert numbers["linear_probe_top5"] == pytest.approx(top_k_accuracy_score(expected, probabilities, k=5))


def test_a_class_without_training_images_is_never_named():
    train, labels = features_of(60, 4, seed=0)
    labels = torch.where(labels == 3, 2, labels)
    found = linear_probe(train, labels, torch.arange(60) % 5 == 0, train)
    assert found.classes.tolist() == [0, 1, 2]
    assert found.numbers(torch.full((60,), 3))["linear_probe_top1"] == 0


def test_the_search_halves_around_the_best():
    asked = []

    def accuracy(strength):
        place = int(np.argmin(abs(STRENGTHS - strength)))
        asked.append(place)
        return -abs(place - 37) / 100

    strength, best = peak(accuracy)
    assert strength == pytest.approx(STRENGTHS[37]) and best == 0
    assert len(asked) == len(set(asked)) <= 7 + 2 * 4  # seven at first, two per halving
    assert peak(lambda strength: 0.5)[0] == pytest.approx(STRENGTHS[0])  # ties go to the largest penalty


def test_too_little_to_learn_from_is_said():
    train, labels = features_of(10, 3, seed=0)
    with pytest.raises(UserError, match="10 training images are too few"):
        linear_probe(train, labels, torch.zeros(10, dtype=torch.bool), train)
    with pytest.raises(UserError, match="all training images are of one class"):
        linear_probe(train, torch.zeros(10, dtype=torch.int64), torch.arange(10) == 0, train)


@pytest.fixture
def suite_file(tmp_path, noise):
    """Two classes of images, with a training part beside the test part."""
    for part, count in (("train", 40), ("test", 10)):
        for number in range(count):
            folder = tmp_path / part / f"{'dark' if number % 2 else 'light'}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{number:02d}.jpg").write_bytes(noise(100 * (part == "test") + number))
    sets = {"tones": {"reader": "class_folders", "path": "test", "linear_probe": {"path": "train"}}}
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump({"root": str(tmp_path), "sets": sets}))
    return tmp_path / "suite.yaml"


def test_a_suite_learns_and_scores(tiny_checkpoint, suite_file, tmp_path):
    assert main(["eval", str(tiny_checkpoint), "--suite", str(suite_file), "--out", str(tmp_path / "out")]) == 0
    entry = json.loads((tmp_path / "out" / "results.json").read_text())["sets"]["tones"]
    assert {"top1", "linear_probe_top1", "linear_probe_mean_per_class_top1"} <= set(entry["mean"])
    assert entry["linear_probe"]["training_images"] == 40 and entry["linear_probe"]["C"] in STRENGTHS
    assert len(list((tmp_path / "out" / "features").iterdir())) == 2  # of both parts, computed once


@pytest.mark.parametrize(
    "override, message",
    [
        ("sets.tones.linear_probe.path=nowhere", "nowhere: no such file or folder"),
        ("sets.tones.linear_probe.validation=0.001", "too few to hold some out for validation"),
    ],
)
def test_bad_probes_are_named(override, message, tiny_checkpoint, suite_file, tmp_path, capsys):
    words = ["eval", str(tiny_checkpoint), "--suite", str(suite_file), override]
    assert main(words) == 2
    assert message in capsys.readouterr().out


def test_a_probe_needs_training_images(suite_file):
    from mc2_hpc.evaluation.suite import load_suite

    with pytest.raises(UserError, match="needs the path of the training images"):
        load_suite(suite_file, ["sets.tones.linear_probe.path=null"])
    with pytest.raises(UserError, match="validation=1.0: must be between 0 and 1"):
        load_suite(suite_file, ["sets.tones.linear_probe.validation=1.0"])
