"""The commands of docs/own_data.md and of the README run as they are written."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.faults.tiny_run import COLOURS, FARBEN

ROOT = Path(__file__).parents[1]
COMMAND_S = 600


def commands(page: Path, heading: str) -> list[list[str]]:
    """The words of the commands in the first indented block below a heading, without comments."""
    section = page.read_text(encoding="utf-8").split(f"{heading}\n", 1)[1]
    block = re.search(r"^(?:    mc2 .*\n(?:     .*\n)*)+", section, flags=re.MULTILINE)
    assert block, f"{page.name}: no commands below {heading}"
    lines = block[0].replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines]


@pytest.fixture(scope="module")
def six():
    """The page's first commands."""
    found = commands(ROOT / "docs" / "own_data.md", "# Your own images and captions")
    assert len(found) == 6
    return found


def test_the_readme_has_the_same_commands(six):
    assert commands(ROOT / "README.md", "## Your own data") == six


@pytest.fixture
def folder(tmp_path):
    """What the reader has: images, a table, this repository's configs; and words in two languages."""
    (tmp_path / "photos").mkdir()
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    rows = ["image,caption,lang"]
    for number in range(64):
        inside, outside = number % 8, number // 8
        image = Image.new("RGB", (80, 80), COLOURS[outside])
        image.paste(COLOURS[inside], (16, 16, 64, 64))
        image.save(tmp_path / "photos" / f"{number:02d}.jpg")
        rows.append(f"{number:02d}.jpg,a {COLOURS[inside]} square on {COLOURS[outside]} ground,en")
        rows.append(f"{number:02d}.jpg,ein {FARBEN[inside]} Quadrat auf Grund {FARBEN[outside]},de")
    (tmp_path / "captions.csv").write_text("\n".join(rows), encoding="utf-8")
    for lang, words in (("en", COLOURS), ("de", FARBEN)):
        (tmp_path / "sources" / lang).mkdir(parents=True)
        lemmas = "\n".join([*words, "square", "Quadrat", "ground", "Grund"])
        (tmp_path / "sources" / lang / "wordnet.txt").write_text(lemmas, encoding="utf-8")
    return tmp_path


def run(fork_server, folder: Path, words: list[str], *more: str) -> str:
    """The standard output of a command of the page, with ``more`` words at its end."""
    assert words[0] == "mc2"
    done = fork_server.run([sys.executable, "-m", "mc2_hpc.cli", *words[1:], *more], cwd=folder, timeout=COMMAND_S)
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.timeout(900)
def test_six_commands_and_curation(fork_server, folder, six):
    """Training is cut short; every other command is as written."""
    curation = commands(ROOT / "docs" / "own_data.md", "## With curation")
    outputs = {}
    for words in six + curation:
        more = ["steps=2"] if words[1] == "train" else []
        outputs[" ".join(words[1:3])] = run(fork_server, folder, words, *more)
    assert json.loads(outputs["data pack"])["images"] == 64
    assert "64 of 64 can be used" in outputs["data lint"] and (folder / "lint.html").is_file()
    assert ".jpg" in outputs["search runs/own_data"]
    assert (folder / "own_open_clip" / "open_clip_config.json").is_file()
    proposed = re.search(r"--t-en (\d+) \(or auto\)", outputs["curate thresholds"])[1]
    balance = json.loads(outputs["curate run"])["balance"]
    assert balance["t_en"] == int(proposed) and set(balance["t"]) == {"de", "en"}
    assert (folder / "runs" / "own_curated" / "metrics.jsonl").is_file()


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_six_commands_train_a_model_that_finds_the_image(fork_server, folder, six):
    for words in six:
        out = run(fork_server, folder, words)
        if words[1] == "search":
            best = re.findall(r"photos/(\d\d)\.jpg", out)[0]
            assert best == "16", "a red square on blue ground"
    rows = (folder / "runs" / "own_data" / "metrics.jsonl").read_text().splitlines()
    first, last = json.loads(rows[0])["loss"], json.loads(rows[-1])["loss"]
    assert last < first / 2
