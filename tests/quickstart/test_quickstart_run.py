"""The quickstart end to end, at a small size, and its errors."""

import json

import pytest
from rich.console import Console

from mc2_hpc.errors import UserError
from mc2_hpc.quickstart import run
from mc2_hpc.quickstart.captions import LANGUAGES
from mc2_hpc.quickstart.recipe import Recipe
from mc2_hpc.quickstart.run import run_quickstart
from mc2_hpc.quickstart.stages import Stages

_TINY = Recipe(
    images=400,
    shards=2,
    heldout_per_number=1,
    t_en=5,
    vocab_size=1_600,
    steps=4,
    global_batch=16,
    warmup=2,
    decay_steps=2,
)
_KEYS = {
    "seconds", "languages", "zero_shot", "zero_shot_mean", "chance", "retrieval", "english_share_before",
    "english_share_after", "samples_per_second", "open_clip_max_abs_diff",
}  # fmt: skip


def test_every_stage_is_joined_to_the_next(tmp_path, capsys):
    output = tmp_path / "quickstart"
    assert run_quickstart(output, processes=2, recipe=_TINY) == 0
    assert capsys.readouterr().out.strip().endswith("report.html")
    report = json.loads((output / "report.json").read_text(encoding="utf-8"))
    assert set(report) >= _KEYS
    assert set(report["zero_shot"]) == set(report["languages"]) == set(LANGUAGES)
    assert all(0 <= accuracy <= 1 for accuracy in report["zero_shot"].values())
    assert report["open_clip_max_abs_diff"] < 1e-4
    # Very rarely, ties between segmentations are resolved differently.
    assert report["open_clip_captions_tokenized_differently"] < 0.01 * 100 * len(LANGUAGES)
    assert 0 < report["english_share_after"] < report["english_share_before"] < 1
    assert len(report["stages"]) == 7 and sum(s["seconds"] for s in report["stages"]) < report["seconds"]
    for curve in report["curves"].values():
        assert len(curve["before"]) == 100 and sum(curve["after"]) <= sum(curve["before"]) + 1e-3
    assert [row["step"] for row in report["training"]][-1] == _TINY.steps
    assert report["skipped"]["no_match"] > 0
    page = (output / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/jpeg;base64,") >= len(report["retrieval_examples"]) * 5
    for sample in report["samples"]:
        assert (output / sample["image"]).is_file()


@pytest.mark.slow
def test_accuracy_of_the_whole_run(whole_run):
    report = json.loads((whole_run / "report.json").read_text(encoding="utf-8"))
    assert report["zero_shot_mean"] >= 0.90
    assert min(report["zero_shot"].values()) > 0.85


def test_an_earlier_run_is_moved_aside_and_nothing_else_is_touched(tmp_path):
    console = Console(quiet=True)
    output = tmp_path / "out"
    run._claim(output, console)
    (output / "report.json").write_text("first")
    run._claim(output, console)
    (output / "report.json").write_text("second")
    run._claim(output, console)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["out", "out.1", "out.2"]
    assert (tmp_path / "out.1" / "report.json").read_text() == "first"
    assert (tmp_path / "out.2" / "report.json").read_text() == "second"
    assert not (output / "report.json").exists()


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(UserError, match="contains other files; name a new or empty folder"):
        run_quickstart(tmp_path, processes=1, recipe=_TINY)
    with pytest.raises(UserError, match="is a file"):
        run_quickstart(tmp_path / "thesis.tex", processes=1, recipe=_TINY)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_missing_packages_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr(run, "_MODULES", ("json", "no_such_module", "nor_this"))
    with pytest.raises(UserError, match=r"needs no_such_module, nor_this: pip install 'mc2_hpc\[quickstart\]'"):
        run_quickstart(tmp_path / "out", recipe=_TINY)
    assert not (tmp_path / "out").exists()


def test_a_failed_training_is_an_error_that_says_so(tmp_path):
    with pytest.raises(UserError, match="training ended with exit code 2"):
        run._train(tmp_path / "missing.yaml", 2)


def test_stages_are_timed_and_told():
    console = Console(record=True, force_terminal=False, width=100)
    stages = Stages(2, console)
    with stages.stage("first") as update:
        update(1, 2)
    with pytest.raises(RuntimeError), stages.stage("second", bar=False):
        raise RuntimeError
    assert list(stages.times) == ["first"]
    lines = console.export_text().splitlines()
    assert lines[0] == "[1/2] first" and lines[1].startswith("[1/2] first: 0.") and lines[2:] == ["[2/2] second"]
