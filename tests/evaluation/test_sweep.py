"""The line between two models scored: the ends are the models' own scores, and a killed sweep continues."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml

from mc2_hpc.cli import main
from mc2_hpc.data.tokenizer import train_tokenizer
from mc2_hpc.evaluation import sweep
from mc2_hpc.evaluation.suite import Suite
from mc2_hpc.models.clip import build_clip
from mc2_hpc.models.presets import ClipArchitecture, TextArchitecture, VisionArchitecture
from tests.conversion import colours

OLD, NEW = range(8), range(8, 16)
"""Hues that the first model is trained on, and those that it is tuned on."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model tuned on new hues, and the one that it was tuned from."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = train_tokenizer(colours.NAMES * 5, folder / "sp.model", vocab_size=80, style="xlmv")
    arch = ClipArchitecture(
        embed_dim=32,
        quick_gelu=False,
        vision=VisionArchitecture(image_size=32, patch_size=16, width=48, layers=2, head_width=16, mlp_width=96),
        text=TextArchitecture(
            vocab_size=tokenizer.vocab_size, context_length=24, eos_id=2, width=32, layers=1, heads=2
        ),
    )
    model = colours.train(build_clip(arch, seed=0), tokenizer, steps=80, hues=OLD)
    old = colours.write(folder / "old", model, tokenizer)
    return colours.write(folder / "tuned", colours.train(model, tokenizer, steps=30, hues=NEW), tokenizer), old


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    """Folders of images of the old hues, and of the new ones."""
    for name, hues in (("old", OLD), ("new", NEW)):
        pixels, labels = colours.draw(80, 9, hues=hues)
        for number, (image, label) in enumerate(zip(pixels, labels.tolist(), strict=True)):
            place = tmp_path / "sets" / name / colours.NAMES[label]
            place.mkdir(parents=True, exist_ok=True)
            colours.picture(image).save(place / f"{number}.png")
    path = tmp_path / "suite.yaml"
    (tmp_path / "templates.txt").write_text("{}\n")
    options = {"templates": str(tmp_path / "templates.txt")}
    sets = {name: {"reader": "class_folders", "path": name, "options": options} for name in ("old", "new")}
    path.write_text(yaml.safe_dump({"root": str(tmp_path / "sets"), "sets": sets}, sort_keys=False))
    return path


def run_sweep(models: tuple[Path, Path], suite: Path, out: Path, alpha: str = "0:1:0.25") -> int:
    return main(["merge", *map(str, models), "--alpha", alpha, "--suite", str(suite), "--out", str(out)])


def scores_of(model: Path, suite: Path, out: Path) -> dict[str, dict[str, float]]:
    """Means of each set according to ``mc2 eval``."""
    assert main(["eval", str(model), "--suite", str(suite), "--out", str(out)]) == 0
    return {name: entry["mean"] for name, entry in json.loads((out / "results.json").read_text())["sets"].items()}


def test_every_alpha_has_the_scores_of_its_model(
    models: tuple[Path, Path], suite: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "sweep"
    assert run_sweep(models, suite, out) == 0
    found = json.loads((out / "sweep.json").read_text())
    assert found["alphas"] == [0, 0.25, 0.5, 0.75, 1]
    assert (found["alpha_of"], found["rest_of"]) == ("tuned", models[1].name)
    merged = tmp_path / "merged"
    assert main(["merge", *map(str, models), "--alpha", "0.25", "--out", str(merged)]) == 0
    for place, model in ((0, models[1]), (1, merged), (4, models[0])):
        expected = scores_of(model, suite, tmp_path / f"eval-{place}")
        for name, means in expected.items():
            for metric, value in means.items():
                assert found["sets"][name][metric]["values"][place] == value
    best, new = (found["sets"][name]["top1"] for name in ("old", "new"))
    assert best["values"][0] > best["values"][-1] and new["values"][0] < new["values"][-1]  # it learnt and forgot
    assert best["best"] == max(best["values"])
    assert best["values"][found["alphas"].index(best["best_alpha"])] == best["best"]
    table = (out / "sweep.md").read_text()
    assert table in capsys.readouterr().out
    assert (
        f"| 0.25 | {100 * best['values'][1]:.1f} | {100 * new['values'][1]:.1f} |" in table
        and "alpha is the share of tuned" in table
    )


def test_the_plot_has_a_curve_per_set(models: tuple[Path, Path], suite: Path, tmp_path: Path) -> None:
    assert run_sweep(models, suite, tmp_path / "sweep", "0,0.5,1") == 0
    assert (tmp_path / "sweep" / "sweep.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    found["sets"]["old"]["top1"]["values"][1] = None  # a set that one alpha lacks
    (axes,) = sweep.draw(found).axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["new, top1", "old, top1"]
    for line, name in zip(axes.lines, ("new", "old"), strict=True):
        values = found["sets"][name]["top1"]["values"]
        expected = [np.nan if value is None else 100 * value for value in values]
        np.testing.assert_array_equal(line.get_ydata(), expected)
        np.testing.assert_array_equal(line.get_xdata(), [0, 0.5, 1])
    assert " - |\n| 1 |" in sweep.markdown(found)


def test_a_killed_sweep_continues(
    models: tuple[Path, Path], suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Finished alphas are not scored again, and the files are those of a sweep that was not killed."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run_sweep(models, suite, whole) == 0
    scored: list[object] = []
    run_suite = sweep.run_suite

    def dies(*arguments: object) -> object:
        scored.append(arguments)
        if len(scored) == 3:
            raise RuntimeError("killed")
        return run_suite(*arguments)

    monkeypatch.setattr(sweep, "run_suite", dies)
    with pytest.raises(RuntimeError, match="killed"):
        run_sweep(models, suite, killed)
    assert sorted(path.name for path in (killed / "alphas").iterdir()) == ["0.0.json", "0.25.json", "inputs.json"]
    assert run_sweep(models, suite, killed) == 0
    assert len(scored) == 3 + 3
    for name in ("sweep.json", "sweep.md", "sweep.png"):
        assert (whole / name).read_bytes() == (killed / name).read_bytes()
    assert run_sweep(models, suite, killed, "0,1") == 0  # part of what is there
    assert len(scored) == 6


def test_ranks_share_the_images(
    models: tuple[Path, Path], suite: Path, tmp_path: Path, ranks_of: Callable[..., object]
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    assert run_sweep(models, suite, one, "0,0.5") == 0
    ranks_of(2, "-m", "mc2_hpc.cli", "merge", *models, "--alpha", "0,0.5", "--suite", suite, "--out", two)
    assert (one / "sweep.json").read_bytes() == (two / "sweep.json").read_bytes()


def test_a_set_that_was_missing_is_scored_later(
    models: tuple[Path, Path], suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It alone, and what the others had stays as it was."""
    whole = tmp_path / "whole"
    assert run_sweep(models, suite, whole, "0,1") == 0
    run_suite, asked = sweep.run_suite, []

    def noted(suite: Suite, *arguments: object) -> object:
        asked.append(list(suite.sets))
        return run_suite(suite, *arguments)

    monkeypatch.setattr(sweep, "run_suite", noted)
    out, away = tmp_path / "sweep", tmp_path / "away"
    (tmp_path / "sets" / "old").rename(away)
    assert run_sweep(models, suite, out, "0,1") == 0
    assert set(json.loads((out / "sweep.json").read_text())["sets"]) == {"new"}
    before = json.loads((out / "alphas" / "0.0.json").read_text())["sets"]["new"]
    away.rename(tmp_path / "sets" / "old")
    assert run_sweep(models, suite, out, "0,1") == 0
    assert asked == [["old", "new"], ["old", "new"], ["old"], ["old"]]
    assert json.loads((out / "alphas" / "0.0.json").read_text())["sets"]["new"] == before
    for name in ("sweep.json", "sweep.md"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()


def test_what_does_not_fit(
    models: tuple[Path, Path], suite: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "sweep"
    assert run_sweep(models, suite, out, "0") == 0
    assert run_sweep((models[1], models[0]), suite, out, "0") == 2
    assert (
        "alphas: was written with other models, another suite or precision; choose another" in capsys.readouterr().err
    )
    assert main(["merge", *map(str, models), "--suite", str(suite), "--out", str(tmp_path / "no")]) == 2
    assert "--suite: scores the line between two models; give --alpha, such as 0:1:0.1" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "sets")
    assert run_sweep(models, suite, tmp_path / "none", "0") == 2
    assert "none of the suite's sets could be scored" in capsys.readouterr().err
    (out / "alphas" / "0.0.json").write_text("{")
    assert run_sweep(models, suite, out, "0") == 2
    assert "0.0.json: not valid JSON" in capsys.readouterr().err
