"""DataComp-38: its metrics against independent computations, its readers, and a mean only over all 38 sets."""

import csv
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from mc2_hpc.cli import main
from mc2_hpc.errors import UserError
from mc2_hpc.evaluation.accuracy import accuracies, chance_of_recall, hit_chance, macro_f1
from mc2_hpc.evaluation.encoder import ImageFeatures
from mc2_hpc.evaluation.paper import DATACOMP_38, columns_of, why_no_mean
from mc2_hpc.evaluation.scoring import score
from mc2_hpc.evaluation.sets.clip_benchmark import clip_benchmark
from mc2_hpc.evaluation.sets.winogavil import winogavil
from mc2_hpc.evaluation.suite import load_suite
from mc2_hpc.tar import write_tar

SUITE = Path(__file__).parents[2] / "configs" / "eval" / "datacomp.yaml"
CLASSES = ["cat", "dog", "tree", "house", "boat", "moon", "road"]


@settings(deadline=None)
@given(rows=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=60))
def test_macro_f1_is_the_one_of_wilds(rows):
    """scikit-learn's, over the classes that have an image, as WILDS calls it for iWildCam."""
    from sklearn.metrics import f1_score

    predicted, labels = (torch.tensor(column) for column in zip(*rows, strict=True))
    expected = f1_score(labels.numpy(), predicted.numpy(), average="macro", labels=labels.unique().numpy())
    assert macro_f1(predicted, labels) == pytest.approx(expected, abs=1e-12)


def test_the_worst_group_is_the_smallest_mean():
    generator = torch.Generator().manual_seed(0)
    features, weights = (F.normalize(torch.randn(n, 8, generator=generator), dim=1) for n in (90, 7))
    labels, groups = torch.randint(7, (90, 1), generator=generator), torch.randint(5, (90,), generator=generator)
    groups[groups == 3] = 4  # a group without an image does not count
    found = accuracies(features, weights, labels, "worst_group", groups)
    best = (features @ weights.T).topk(5).indices
    for k in (1, 5):
        hit = (best[:, :k] == labels).any(1)
        means = [hit[groups == group].double().mean().item() for group in groups.unique()]
        assert found[f"worst_group_top{k}"] == pytest.approx(min(means))
        assert found[f"top{k}"] == pytest.approx(hit.double().mean().item())


def test_chance_is_the_share_of_all_orders():
    from itertools import combinations

    for total, right, k in [(7, 1, 1), (7, 1, 5), (6, 2, 3), (4, 3, 2), (3, 1, 9)]:
        draws = list(combinations(range(total), min(k, total)))
        assert hit_chance(total, right, k) == pytest.approx(sum(any(x < right for x in d) for d in draws) / len(draws))
    found = chance_of_recall(3, [2, 2, 1])
    assert found["text_to_image_R@1"] == pytest.approx(1 / 3) and found["text_to_image_R@5"] == 1
    assert found["image_to_text_R@1"] == pytest.approx((2 / 5 + 2 / 5 + 1 / 5) / 3)


def npy(*numbers):
    data = io.BytesIO()
    np.save(data, np.array(numbers, dtype=np.int64))
    return data.getvalue()


def webdataset(folder, noise, count=14, retrieval=False, group=True):
    (folder / "test").mkdir(parents=True)
    (folder / "test" / "nshards.txt").write_text("1")
    files = []
    for number in range(count):
        files.append((f"s{number:03d}.webp", noise(number, kind="WEBP")))
        if retrieval:
            files.append((f"s{number:03d}.txt", f"a photo {number}\nein Foto {number}".encode()))
        else:
            files.append((f"s{number:03d}.cls", b"%d" % (number % 7)))
            files += [(f"s{number:03d}.npy", npy(number % 3, 7))] if group else []
    write_tar(folder / "test" / "0.tar", files)
    if retrieval:
        (folder / "dataset_type.txt").write_text("retrieval\n")
    else:
        (folder / "classnames.txt").write_text("".join(f"{name}\n" for name in CLASSES))
        (folder / "zeroshot_classification_templates.txt").write_text("a photo of a {c}.\n")


def test_groups_are_read_from_npy(tmp_path, noise):
    webdataset(tmp_path, noise)
    task = clip_benchmark(tmp_path, metric="worst_group", group=0)
    assert task.groups == [number % 3 for number in range(14)] and task.metric == "worst_group"
    with pytest.raises(UserError, match="the .npy beside s000.webp names no group at 2"):
        clip_benchmark(tmp_path, metric="worst_group", group=2)
    with pytest.raises(UserError, match="needs the group of every image"):
        clip_benchmark(tmp_path, metric="worst_group")


@pytest.mark.parametrize("value", [npy(-1), npy(0.5), b"", b"\x93NUMPY junk", npy()])
def test_groups_must_be_whole_numbers(value, tmp_path, noise):
    webdataset(tmp_path, noise, group=False)
    if value == npy(0.5):
        data = io.BytesIO()
        np.save(data, np.array([0.5]))
        value = data.getvalue()
    write_tar(tmp_path / "test" / "0.tar", [("a.jpg", noise(0)), ("a.cls", b"1"), ("a.npy", value)])
    with pytest.raises(UserError, match=r"the \.npy beside a\.jpg names no group at 0"):
        clip_benchmark(tmp_path, group=0)


def write_winogavil(folder, noise, rounds):
    (folder / "winogavil_images").mkdir(parents=True)
    for number in range(14):
        (folder / "winogavil_images" / f"w{number}.jpg").write_bytes(noise(number))
    with open(folder / "winogavil_dataset.csv", "w", newline="") as stream:
        writer = csv.DictWriter(stream, ["ID", "cue", "candidates", "associations", "num_associations"])
        writer.writeheader()
        for number, (cue, candidates, associations) in enumerate(rounds):
            names = [json.dumps([f"w{index}" for index in part]) for part in (candidates, associations)]
            row = {"candidates": names[0], "associations": names[1], "num_associations": len(associations)}
            writer.writerow({"ID": number, "cue": cue, **row})


ROUNDS = [
    ("Orchestra", range(5), [0, 3]),
    ("winter", range(2, 12), [2, 7, 9]),
    ("tea", range(12), [11, 4]),
    ("ice", [3, 1, 9, 8, 7], [9]),
]


def test_winogavil_is_scored_as_datacomp_scores_it(tmp_path, noise, encoder):
    """The k images closest to the cue, by scikit-learn's Jaccard index."""
    from sklearn.metrics import jaccard_score

    write_winogavil(tmp_path, noise, ROUNDS)
    task = winogavil(tmp_path)
    assert [one.cue for one in task.rounds] == ["An orchestra", "A winter", "A tea", "An ice"]
    images = encoder.images(task.images)
    found = score(task, images, encoder)
    expected = {}
    for one, (_, candidates, associations) in zip(task.rounds, ROUNDS, strict=True):
        rows = images.features[torch.tensor([one.candidates]).flatten()]
        logits = (encoder.texts([one.cue]) @ rows.T)[0].numpy()
        picked = np.isin(np.arange(len(rows)), np.argsort(logits)[-len(associations) :])
        right = np.isin(list(candidates), associations)
        expected.setdefault(len(rows), []).append(jaccard_score(right, picked))
    assert found.mean["jaccard"] == pytest.approx(np.mean([v for values in expected.values() for v in values]))
    assert found.mean["jaccard_10_up"] == pytest.approx(np.mean([*expected[10], *expected[12]]))
    assert found.counts == {"5 candidates": 2, "10 candidates": 1, "12 candidates": 1}
    broken = ImageFeatures(images.features, torch.tensor([name != 0 for name in range(len(images.usable))]))
    assert score(task, broken, encoder).skipped["round_without_image"] == 2  # w0 is in two rounds


@pytest.mark.parametrize(
    "cell, message",
    [("w1", "candidates of round 0: "), ('["w1"]', "associations that are not candidates")],
)
def test_broken_rounds_are_named(cell, message, tmp_path, noise):
    write_winogavil(tmp_path, noise, ROUNDS[:1])
    text = (tmp_path / "winogavil_dataset.csv").read_text()
    first = '"[""w0"", ""w1"", ""w2"", ""w3"", ""w4""]"'
    assert first in text
    quoted = '"' + cell.replace('"', '""') + '"'
    (tmp_path / "winogavil_dataset.csv").write_text(text.replace(first, quoted))
    with pytest.raises(UserError, match=message):
        winogavil(tmp_path)


def test_the_suite_names_the_38_sets_with_their_metrics():
    suite = load_suite(SUITE)
    assert set(suite.sets) == set(DATACOMP_38) and len(DATACOMP_38) == 38
    first = {"accuracy": "top1", "mean_per_class": "mean_per_class_top1", "worst_group": "worst_group_top1"}
    for name, config in suite.sets.items():
        metric = config.options.get("metric", "accuracy")
        if name == "datacomp_dollar_street":
            assert metric == "worst_group" and DATACOMP_38[name] == "worst_group_top5"
        elif name not in ("flickr30k", "mscoco", "winogavil"):
            assert first.get(metric, metric) == DATACOMP_38[name]


def test_the_whole_suite_on_small_sets(tiny_checkpoint, tmp_path, noise):
    webdataset(tmp_path / "classes", noise)
    for name, config in load_suite(SUITE).sets.items():
        if config.reader == "winogavil":
            write_winogavil(tmp_path / config.path, noise, ROUNDS)
        elif name in ("flickr30k", "mscoco"):
            webdataset(tmp_path / config.path, noise, retrieval=True)
        else:
            shutil.copytree(tmp_path / "classes", tmp_path / config.path)
    words = ["eval", str(tiny_checkpoint), "--suite", str(SUITE), f"root={tmp_path}", "--out", str(tmp_path / "out")]
    assert main(words) == 0
    result = json.loads((tmp_path / "out" / "results.json").read_text())
    sets = result["sets"]
    assert [name for name, entry in sets.items() if "error" in entry] == [] and why_no_mean(sets) == []
    numbers = []
    for name, metric in DATACOMP_38.items():
        parts = [metric] if isinstance(metric, str) else metric
        numbers.append(np.mean([sets[name]["mean"][part] for part in parts]))
    assert result["paper_columns"]["DataComp-38"] == pytest.approx(100 * np.mean(numbers))
    assert "SLIP-26" not in columns_of(sets)
    # With one set missing, there is no mean of 38.
    shutil.rmtree(tmp_path / "wds_wilds-fmow_test")
    assert main(words) == 0
    sets = json.loads((tmp_path / "out" / "results.json").read_text())["sets"]
    assert "DataComp-38" not in columns_of(sets)
    assert why_no_mean(sets) == ["DataComp-38 has no mean: 1 of its 38 sets have no number (fmow)."]
