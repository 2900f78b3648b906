"""The content address of a training run."""

from pathlib import Path

import pytest

from mc2_hpc.ablation.prepare import Prepared, PreparedTokenizer
from mc2_hpc.ablation.settings import load_ablation
from mc2_hpc.ablation.training_runs import plan_run
from mc2_hpc.errors import UserError


@pytest.fixture
def place(ablation_file, tmp_path):
    """``place(teacher, *overrides)``: the folder of a run with this teacher, or with none."""

    def plan(teacher: Path | None, *overrides: str) -> Path:
        words = [] if teacher is None else [f"distill.teacher={teacher}", *overrides]
        ablation = load_ablation(ablation_file("one", [{"name": "a", "train": words}]))
        tokenizer = PreparedTokenizer("t", tmp_path / "t.model", 90, 2)
        run = plan_run(ablation, ablation.rows[0], 0, Prepared("c", tmp_path), tokenizer, "suite", tmp_path / "out")
        return run.folder

    return plan


def test_the_address_follows_a_teachers_content_not_its_place(place, tmp_path):
    for name, data in (("one", b"1"), ("moved", b"1"), ("other", b"2")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(data)
    one, moved, other = (place(tmp_path / name) for name in ("one", "moved", "other"))
    assert one == moved and len({one, other, place(None), place(tmp_path / "one", "distill.weight=2")}) == 4
    assert f"teacher: {tmp_path / 'moved'}" in (moved / "train.yaml").read_text()


def test_features_of_other_shards_are_refused(place):
    with pytest.raises(UserError, match="one: a: distill.features are of other shards .*; set distill.teacher"):
        place("", "distill.features=/f")


def test_of_a_run_only_the_newest_checkpoint_counts(place, tmp_path):
    checkpoints = tmp_path / "run" / "checkpoints"
    for step in ("step-1", "step-2"):
        (checkpoints / step).mkdir(parents=True)
        (checkpoints / step / "model.json").write_text("{}")
    (checkpoints / "latest").write_text("step-2")
    before = place(tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").write_text("{}")
    (checkpoints / "step-1" / "model.json").write_text("{ }")
    assert place(tmp_path / "run") == before
    (checkpoints / "step-2" / "model.json").write_text("{ }")
    assert place(tmp_path / "run") != before
