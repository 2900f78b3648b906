"""SLIP-26: its metrics against scikit-learn's, its suite file, and a mean only if all 26 numbers exist."""

import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from mc2_hpc.cli import main
from mc2_hpc.errors import UserError
from mc2_hpc.evaluation.accuracy import roc_auc
from mc2_hpc.evaluation.encoder import ImageFeatures
from mc2_hpc.evaluation.paper import REPORTED, SLIP_26, columns_of, why_no_mean
from mc2_hpc.evaluation.scoring import score
from mc2_hpc.evaluation.suite import load_suite
from mc2_hpc.evaluation.tasks import Classification, ClassTexts
from mc2_hpc.tar import write_tar

SUITE = __import__("pathlib").Path(__file__).parents[2] / "configs" / "eval" / "slip26.yaml"
NAMES = ["cat", "dog", "tree", "house", "boat", "moon", "road"]


@settings(deadline=None)
@given(rows=st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=2, max_size=40))
def test_roc_auc_is_sklearns_with_ties(rows):
    from sklearn.metrics import roc_auc_score

    scores = torch.tensor([score for score, _ in rows], dtype=torch.float64)
    positive = torch.tensor([right for _, right in rows])
    if positive.all() or not positive.any():
        with pytest.raises(UserError, match="needs images of both classes"):
            roc_auc(scores, positive)
        return
    assert roc_auc(scores, positive) == pytest.approx(roc_auc_score(positive.numpy(), scores.numpy()), abs=1e-12)


@pytest.fixture
def shown():
    """``shown(labels, metric, classes)`` scores random features with an untrained model."""

    class Shown:
        def __init__(self, count):
            self.count = count

        def __len__(self):
            return self.count

    def make(labels, metric, classes, encoder):
        features = F.normalize(torch.randn(len(labels), 16, generator=torch.Generator().manual_seed(0)), dim=1)
        texts = {"en": ClassTexts(classes=range(classes), names=NAMES[:classes], templates=["{}"])}
        task = Classification(
            images=Shown(len(labels)), labels=[(label,) for label in labels], languages=texts, metric=metric
        )
        images = ImageFeatures(features, torch.ones(len(labels), dtype=torch.bool))
        return score(task, images, encoder).mean, features @ encoder.texts(NAMES[:classes]).T

    return make


def test_metrics_of_a_task_are_those_of_slip(shown, encoder):
    from sklearn.metrics import roc_auc_score

    labels = [index % 7 for index in range(60)]
    found, logits = shown(labels, "mean_top1_top5", 7, encoder)
    hit = logits.topk(5).indices == torch.tensor(labels)[:, None]
    top1, top5 = hit[:, 0].float().mean().item(), hit.any(1).float().mean().item()
    assert found == pytest.approx({"mean_top1_top5": (top1 + top5) / 2, "top1": top1, "top5": top5})
    labels = [int(index % 3 == 0) for index in range(60)]
    found, logits = shown(labels, "roc_auc", 2, encoder)
    assert found == pytest.approx({"roc_auc": roc_auc_score(labels, (logits[:, 1] - logits[:, 0]).numpy())})


def test_roc_auc_is_of_two_classes(shown, encoder):
    with pytest.raises(UserError, match="'roc_auc' needs two classes, 0 and 1"):
        shown([0, 1, 2], "roc_auc", 3, encoder)
    with pytest.raises(UserError, match="needs images of both classes: 3 and 0"):
        shown([0, 0, 0], "roc_auc", 2, encoder)


def webdataset(folder, noise):
    """Six images of three classes."""
    (folder / "test").mkdir(parents=True)
    (folder / "test" / "nshards.txt").write_text("1")
    files = ((f"s{n}.{kind}", data) for n in range(6) for kind, data in (("jpg", noise(n)), ("cls", b"%d" % (n % 3))))
    write_tar(folder / "test" / "0.tar", files)
    (folder / "classnames.txt").write_text("cat\ndog\ntree\n")
    (folder / "zeroshot_classification_templates.txt").write_text("a photo of a {c}.\n")


def class_folders(folder, noise, classes):
    for number in range(2 * classes):
        (folder / f"{number % classes}_class").mkdir(parents=True, exist_ok=True)
        (folder / f"{number % classes}_class" / f"{number}.jpg").write_bytes(noise(number))
    (folder.parent / "names.txt").write_text("".join(f"{name}\n" for name in NAMES[:classes]))
    (folder.parent / "templates.txt").write_text("a {}.\n")


def test_the_suite_names_the_26_sets_with_their_metrics():
    suite = load_suite(SUITE)
    assert set(suite.sets) == set(SLIP_26) and len(SLIP_26) == 26
    metric = {"accuracy": "top1", "mean_per_class": "mean_per_class_top1"}
    for name, config in suite.sets.items():
        given = config.options.get("metric", "accuracy")
        assert metric.get(given, given) == SLIP_26[name]


def test_the_whole_suite_on_small_sets(tiny_checkpoint, tmp_path, noise):
    for name, config in load_suite(SUITE).sets.items():
        if config.reader == "class_folders":
            class_folders(tmp_path / config.path, noise, 2 if name == "hateful_memes" else 7)
        else:
            webdataset(tmp_path / config.path, noise)
    words = ["eval", str(tiny_checkpoint), "--suite", str(SUITE), f"root={tmp_path}", "--out", str(tmp_path / "out")]
    assert main([*words, "sets.imagenet.reader=clip_benchmark"]) == 0
    sets = json.loads((tmp_path / "out" / "results.json").read_text())["sets"]
    assert [name for name, entry in sets.items() if "error" in entry] == []
    numbers = [sets[name]["mean"][metric] for name, metric in SLIP_26.items()]
    found = columns_of(sets)
    assert why_no_mean(sets) == []
    assert found["SLIP-26"] == pytest.approx(100 * sum(numbers) / 26) and list(found)[:2] == ["ImageNet", "SLIP-26"]
    # With one set missing, there is no mean of 26.
    shutil.rmtree(tmp_path / "wds_mnist")
    assert main([*words, "sets.imagenet.reader=clip_benchmark"]) == 0
    sets = json.loads((tmp_path / "out" / "results.json").read_text())["sets"]
    assert "SLIP-26" not in columns_of(sets)
    assert why_no_mean(sets) == ["SLIP-26 has no mean: 1 of its 26 sets have no number (mnist)."]


def test_the_papers_numbers_stand_in_their_columns():
    row = REPORTED["H/14"]["H/14 WW 29B"]
    assert (row["ImageNet"], row["SLIP-26"], row["Babel-ImageNet"], row["XTD-200 I2T"]) == (81.3, 74.5, 50.2, 51.0)
    assert (row["Dollar Street top-1"], row["GeoDE"]) == (37.9, 93.4)
    assert REPORTED["B/32"]["B/32 WW 1.0x, XLM-V"]["CVQA LOCAL"] == 47.4
