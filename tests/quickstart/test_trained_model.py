"""What can be done with the quickstart's trained model: exported in 8 bits, and tuned without forgetting."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from mc2_hpc.cli import main
from mc2_hpc.conversion.convert import convert
from mc2_hpc.distributed import process_group
from mc2_hpc.evaluation.encoder import Encoder
from mc2_hpc.quickstart.captions import LANGUAGES, NUMBERS, draw_caption, number_names
from mc2_hpc.quickstart.images import draw_number, load_handwriting
from mc2_hpc.quickstart.results import evaluate
from mc2_hpc.quickstart.run import _train
from mc2_hpc.tar import write_tar

pytestmark = pytest.mark.slow

TUNED = NUMBERS[80:]
"""The rarest in the pool, so there is something to gain."""


def test_onnx(whole_run, tmp_path):
    """In fp32 it has the same scores; 8 bits cost less than a point."""
    found = {}
    with process_group() as ranks:
        for name, int8 in (("fp32", False), ("int8", True)):
            folder = convert(whole_run / "train", "onnx", tmp_path / name, int8=int8)
            scores = evaluate(whole_run / "eval.yaml", Encoder.load(folder, ranks), lambda done, total: None)
            found[name] = scores["zero_shot_mean"]
    trained = json.loads((whole_run / "report.json").read_text(encoding="utf-8"))["zero_shot_mean"]
    print(f"zero-shot accuracy: trained {trained:.4f}, {found}")
    assert found["fp32"] == pytest.approx(trained, abs=2e-4)
    assert found["int8"] > trained - 0.01


def test_tuned_without_forgetting(whole_run, tmp_path):
    """Tuned on 20 numbers, some mixture keeps 95 % of the accuracy on the other 80 and gains on the 20."""
    write_shard(tmp_path / "tuning.tar", count=4_000)
    config = {
        "output": str(tmp_path / "tuned"),
        "steps": 150,
        "global_batch": 128,
        "precision": "fp32",
        "model": {"init_from": str(whole_run / "train")},
        "data": {"train": str(tmp_path / "tuning.tar"), "lanes": 128, "workers": 0},
        "optim": {"lr": 5e-4, "warmup": 20},
        "checkpoint": {"every": 150, "keep": 1},
    }
    (tmp_path / "tune.yaml").write_text(yaml.safe_dump(config))
    _train(tmp_path / "tune.yaml", 2)
    suite, out = write_suite(whole_run, tmp_path), tmp_path / "sweep"
    models = [str(tmp_path / "tuned"), str(whole_run / "train")]
    assert main(["merge", *models, "--alpha", "0:1:0.1", "--suite", str(suite), "--out", str(out)]) == 0
    sets = json.loads((out / "sweep.json").read_text())["sets"]
    old, new = (sets[name]["top1"]["values"] for name in ("other", "tuned"))
    assert new[-1] > new[0]
    kept = [alpha for alpha, (o, n) in enumerate(zip(old, new, strict=True)) if o >= 0.95 * old[0] and n > new[0]]
    assert kept, (old, new)


def write_shard(path, count):
    """Images of the tuned numbers by the pool's writers, each with one caption."""
    digits, _ = load_handwriting()
    names, rng = number_names(), np.random.default_rng(11)

    def files():
        for index in range(count):
            number, lang = int(rng.choice(TUNED)), str(rng.choice(LANGUAGES))
            yield f"{index:05d}.jpg", draw_number(number, digits, rng)
            yield f"{index:05d}.txt", draw_caption(lang, names[lang][number], rng).encode()

    write_tar(path, files())


def write_suite(whole_run, folder):
    """The quickstart's held-out images, those of the tuned numbers apart from the others; all 100 names compete."""
    rows = pq.read_table(whole_run / "heldout.parquet")
    tuned = np.isin(rows["label"].to_numpy(zero_copy_only=False), [str(number) for number in TUNED])
    whole = yaml.safe_load((whole_run / "eval.yaml").read_text(encoding="utf-8"))
    sets = {}
    for name, part in (("other", ~tuned), ("tuned", tuned)):
        pq.write_table(rows.filter(part), folder / f"{name}.parquet")
        sets[name] = {**whole["sets"]["numbers"], "path": f"{name}.parquet"}
    (folder / "suite.yaml").write_text(yaml.safe_dump({"root": str(folder), "sets": sets}, allow_unicode=True))
    return folder / "suite.yaml"
