"""All benchmarks: committed rows can be plotted, and scripts that need a GPU at least start."""

import json
import re
import subprocess

import pytest

from benchmarks import harness
from benchmarks.harness import RESULTS, ROOT, Rows, own_command
from benchmarks.plot import PLOTS, plot_checkpoint, plot_dedup

ROWS = sorted(RESULTS.glob("*.json"))


@pytest.mark.parametrize("path", ROWS, ids=lambda path: path.stem)
def test_committed_rows_are_whole_and_can_be_drawn(path, tmp_path):
    result = json.loads(path.read_text(encoding="utf-8"))
    assert result["rows"] and result["env"]["commit"] and result["env"]["machine"]
    assert not result.get("quick"), "a quick run is not for quoting"
    assert not result.get("unfinished"), "a run that was cut short"
    if result["name"] in PLOTS:
        plot = tmp_path / "plot.png"
        PLOTS[result["name"]](result, plot)
        assert plot.read_bytes().startswith(b"\x89PNG")
        assert path.with_suffix(".png").is_file(), "make plots"


@pytest.mark.parametrize("path", ROWS, ids=lambda path: path.stem)
def test_committed_rows_are_of_a_commit(path):
    """The measured code can be checked out: only rows had changed since the commit."""
    assert "dirty" not in json.loads(path.read_text(encoding="utf-8"))["env"]["commit"]


def test_only_rows_may_change_between_commit_and_measurement(tmp_path, monkeypatch):
    def git(*words):
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *words], check=True, capture_output=True)

    row, code = tmp_path / "benchmarks" / "results" / "row.json", tmp_path / "code.py"
    row.parent.mkdir(parents=True)
    for path in (row, code):
        path.write_text("1")
    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    monkeypatch.setattr(harness, "ROOT", tmp_path)
    clean = harness.commit()
    row.write_text("2")
    assert harness.commit() == clean and "dirty" not in clean
    code.write_text("2")
    assert harness.commit() == f"{clean}-dirty"


def gpu_suite(out, *parts, **environment):
    command = ["bash", str(ROOT / "benchmarks" / "gpu_suite.sh"), *parts]
    environment = {"OUT": str(out), "PATH": "/usr/bin:/bin", "PYTHON": "/bin/true", **environment}
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_the_gpu_suite_refuses_a_part_it_does_not_have(tmp_path):
    result = gpu_suite(tmp_path, "nonsense", "at_most")
    assert result.returncode == 1
    assert "nonsense: no such part" in result.stderr and "at_most: no such part" in result.stderr


def test_the_gpu_suite_leaves_what_does_not_fit_to_the_next_call(tmp_path):
    result = gpu_suite(tmp_path, "decode", "loss", LIMIT="200")
    assert result.returncode == 75 and "loss: not enough time left in this call" in result.stdout
    assert (tmp_path / "done").read_text() == "decode\n"
    again = gpu_suite(tmp_path, "decode", "loss")
    assert again.returncode == 0 and "decode: already done" in again.stdout
    assert (tmp_path / "done").read_text() == "decode\nloss\n"


def test_every_part_of_the_gpu_suite_fits_into_a_call(tmp_path):
    """With the setup before it, in a fresh machine; and the limits of a part's commands fit into the part's."""
    script = (ROOT / "benchmarks" / "gpu_suite.sh").read_text(encoding="utf-8")
    (table,) = re.findall(r"LONGEST=\((.*)\)", script)
    longest = {name: int(seconds) for name, seconds in re.findall(r"\[(\w+)\]=(\d+)", table)}
    for name, seconds in longest.items():
        assert longest["setup"] + seconds <= 570
        (body,) = re.findall(rf"^{name}\(\) {{\n(.*?)^}}", script, re.M | re.S)
        assert sum(map(int, re.findall(r"at_most (\d+)", body))) <= seconds, name


def test_rows_are_kept_as_they_come(tmp_path, monkeypatch):
    """A run that ends early has those that it measured, and they are not taken for a whole run."""
    path = tmp_path / "row.json"
    monkeypatch.setattr("sys.argv", ["bench", "--quick", "--json", str(path)])
    monkeypatch.setattr(Rows, "write", None)

    def run(quick):
        rows = Rows()
        rows.append({"who": "first"})
        rows += [{"who": "second"}]
        found = json.loads(path.read_text(encoding="utf-8"))
        assert found["rows"] == rows and found["unfinished"] and found["env"]["machine"]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        harness.main("some", run)
    assert [row["who"] for row in json.loads(path.read_text(encoding="utf-8"))["rows"]] == ["first", "second"]
    harness.main("some", lambda quick: {"config": {}, "rows": Rows(), "ratios": {}})
    assert "unfinished" not in json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.slow
@pytest.mark.parametrize("contender", ["ours_sdpa", "open_clip"])
def test_a_step_of_each_side_is_measured(contender):
    command = [*own_command("bench_step.py"), "--contender", contender, "--quick"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    row = json.loads(result.stdout.splitlines()[-1])
    assert row["samples_per_second"] > 0 and 0 < row["mfu"] < 1.5


@pytest.mark.slow
def test_the_wait_for_a_checkpoint_is_measured(tmp_path):
    command = [*own_command("bench_checkpoint.py"), "--quick", "--json", str(tmp_path / "row.json")]
    subprocess.run(command, cwd=ROOT, check=True, timeout=900)
    result = json.loads((tmp_path / "row.json").read_text(encoding="utf-8"))
    waited = {row["who"] for row in result["rows"] if row["what"] == "stall a save"}
    assert waited == {"background", "foreground", "open_clip"}
    assert result["config"]["checkpoint_bytes"] > 12 * result["config"]["parameters"]
    assert all(value > 0 for value in result["ratios"].values())
    plot_checkpoint(result, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_finding_copies_is_measured(tmp_path):
    command = [*own_command("bench_dedup.py"), "--quick", "--json", str(tmp_path / "row.json")]
    subprocess.run(command, cwd=ROOT, check=True, timeout=900)
    result = json.loads((tmp_path / "row.json").read_text(encoding="utf-8"))
    assert result["ratios"]["recall"] >= 0.99 and result["ratios"]["precision"] >= 0.99
    assert result["ratios"]["hashes_per_second"] > 0
    plot_dedup(result, tmp_path / "plot.png")
