"""``mc2 ablate`` end to end: two files that share a row, an interruption, and resuming after it."""

import json

import pytest
import yaml

from mc2_hpc.ablation import run as driver
from mc2_hpc.cli import main


def results(out):
    return {path: path.stat().st_mtime_ns for path in out.glob("runs/*/eval-*/results.json")}


def test_shared_rows_interruption_and_tables(ablation_file, tmp_path, monkeypatch, capsys):
    worldwide = {"name": "worldwide", "paper": {"ImageNet": 79.5}}
    english = {"name": "English", "curation": {"languages": ["en"]}, "paper": {"ImageNet": 80.4}}
    first = ablation_file("languages", [english, worldwide])
    second = ablation_file("thresholds", [{"name": "t_lang"}])  # the same run under another name
    out = tmp_path / "out"
    command = ["ablate", str(first), str(second), "--out", str(out), "--jobs", "2", f"base={first.parent / 'b.yaml'}"]
    base = yaml.safe_load(open(yaml.safe_load(first.read_text())["base"]))
    (first.parent / "b.yaml").write_text(yaml.safe_dump({**base, "steps": 2}))

    def interrupted(runs, jobs, report):
        assert len(runs) == 2  # three rows
        whole(runs[:1], jobs, report)
        raise KeyboardInterrupt

    whole = driver.run_all
    with monkeypatch.context() as patch:
        patch.setattr(driver, "run_all", interrupted)
        assert main(command) == 130
    before = results(out)
    assert len(before) == 1 and not (out / "ablations.json").exists()

    assert main(command) == 0
    after = results(out)
    assert len(after) == 2 and before.items() <= after.items()  # the finished run was not touched
    shown = capsys.readouterr().out
    tables = json.loads((out / "ablations.json").read_text(encoding="utf-8"))["ablations"]
    assert [table["name"] for table in tables] == ["languages", "thresholds"]
    (one, two), (three,) = (table["rows"] for table in tables)
    assert two["columns"] == three["columns"] and two["runs"] == three["runs"] != one["runs"]
    assert one["english_share"] == 1 and two["pairs"] == 2 * 16 and two["paper"] == {"ImageNet": 79.5}
    for row in (one, two):
        scores = json.loads(next(out.glob(f"runs/{row['runs'][0]}/eval-*/results.json")).read_text())
        groups = {lang: group["top1"] for lang, group in scores["sets"]["colours"]["groups"].items()}
        assert row["columns"]["English"]["values"] == [groups["en"]]
        assert row["columns"]["others"]["mean"] == pytest.approx((groups["de"] + groups["fr"]) / 2)
        assert row["columns"]["worst"]["mean"] == min(groups.values())
        trained = yaml.safe_load((out / "runs" / row["runs"][0] / "train.yaml").read_text())
        assert (trained["seed"], trained["data"]["seed"], trained["steps"]) == (0, 0, 2)
    assert (out / "ablations.md").read_text(encoding="utf-8") in shown and "| 80.4 |" in shown
    assert all((out / f"{name}.png").read_bytes().startswith(b"\x89PNG") for name in ("languages", "thresholds"))

    monkeypatch.setattr(driver, "run_all", lambda *_: pytest.fail("nothing was left to do"))
    assert main(command) == 0 and results(out) == after


def test_a_run_that_fails_names_its_log(ablation_file, tmp_path, capsys):
    # Only the training process notices a vision width that is not a multiple of the head width.
    path = ablation_file("bad", [{"name": "odd", "train": ["model.vision.width=33"]}])
    assert main(["ablate", str(path), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "bad: odd, seed 0: exit code 2; see" in error
    log = error.partition("see ")[2].partition(";")[0]
    assert "not a multiple of head_width" in open(log).read()


@pytest.mark.parametrize(
    "words, message",
    [
        (["none.yaml"], "none.yaml: no such ablation file"),
        (["data.pool=x"], "name an ablation file"),
        (["none.yaml", "--jobs", "0"], "--jobs 0: must be at least 1"),
    ],
)
def test_bad_words(words, message, tmp_path, capsys):
    assert main(["ablate", *words, "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_two_files_of_one_name(ablation_file, tmp_path, capsys):
    path = ablation_file("twice", [{"name": "a"}])
    assert main(["ablate", str(path), str(path), "--out", str(tmp_path / "out")]) == 2
    assert "another file is also called 'twice'" in capsys.readouterr().err


def test_overrides_after_options_reach_every_file(ablation_file, tmp_path, capsys):
    path = ablation_file("pool", [{"name": "a"}])
    assert main(["ablate", str(path), "--out", str(tmp_path / "out"), "data.pool=nowhere"]) == 2
    assert "nowhere: no such file or folder" in capsys.readouterr().err
