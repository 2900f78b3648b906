"""``mc2 data lint``: its counts are those of a real epoch of the loader."""

import json
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from mc2_hpc.cli import main
from mc2_hpc.config import DataConfig
from mc2_hpc.data.loader import TrainLoader
from mc2_hpc.data.stream import Lane
from mc2_hpc.data.tokenizer import Tokenizer, train_tokenizer
from mc2_hpc.inspection.lint import lint, quantile
from mc2_hpc.inspection.shard import LintOptions
from mc2_hpc.tar import write_tar
from tests.holding import held
from tests.ingestion.sources import picture
from tests.inspection.messy import write_messy
from tests.killing import started


@pytest.fixture(scope="module")
def messy(tmp_path_factory):
    return write_messy(tmp_path_factory.mktemp("messy") / "shards")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "sp.model"
    train_tokenizer([f"a picture {number}, ein Bild" for number in range(50)], path, vocab_size=40, style="xlmv")
    return path


def epoch_of_loader(data, tokenizer, monkeypatch, seed):
    """What the first epoch of a loader keeps and skips.

    Skips after the last good sample would be reported with the first batch of the next epoch, so they are taken when
    the lane ends its epoch.
    """
    ends = []
    finish = Lane._finish_epoch
    monkeypatch.setattr(Lane, "_finish_epoch", lambda lane: (ends.append(Counter(lane._pool.skipped)), finish(lane)))
    config = DataConfig(train=str(data), tokenizer=str(tokenizer), lanes=1, workers=0, seed=seed)
    loader = TrainLoader(
        config, global_batch=1, image_size=32, tokenizer=Tokenizer(tokenizer, "xlmv", 77), rank=0, world_size=1
    )
    kept, skipped = 0, Counter()
    for batch in loader:
        if batch.position[0].epoch > 0:
            break
        kept += 1
        skipped.update(batch.skipped)
    loader.close()
    return kept, skipped + ends[0]


@pytest.mark.parametrize("seed", range(4))
def test_counts_are_those_of_an_epoch(messy, tokenizer, monkeypatch, seed):
    """With several seeds, because one caption is drawn of each image, and it may be the bad one."""
    kept, skipped = epoch_of_loader(messy, tokenizer, monkeypatch, seed)
    found = lint(messy, LintOptions(seed=seed)).findings
    assert (found.kept, +found.skipped) == (kept, skipped)
    assert kept in (6, 7) and skipped == {
        "shard_unreadable": 3,
        "name_unsafe": 1,
        "image_unsupported": 1,
        "caption_empty": 2 if kept == 6 else 1,
        "caption_not_utf8": 1,
        "caption_not_json": 1,
        "caption_missing": 1,
        "image_missing": 2,
        "image_truncated": 1,
        "image_undecodable": 2,
        "image_too_large": 1,
    }


def test_what_else_is_found(messy, tokenizer):
    found = lint(messy, LintOptions(tokenizer=tokenizer, context_length=10, image_size=201), workers=2)
    facts = found.to_dict()
    assert facts["shards"] == 5 and facts["images"] == 13 + 4
    assert {path.rpartition("/")[2]: reason[:9] for path, reason in facts["unreadable"].items()} == {
        "cut.tar": "cut off a",
        "other.tar": "holds 1 *",
        "zero.tar": "holds no ",
    }
    assert facts["captions"] == {"(none)": 7, "de": 2, "en": 3}, "of images that cannot be used too"
    assert facts["bad_captions"]["caption_empty"] == 2, "of image x too, whatever the epoch draws"
    assert facts["formats"]["jpeg"] + facts["formats"]["png"] == facts["kept"]
    assert facts["short_side"]["1"] == 203 and facts["smaller_than_image_size"] == facts["kept"] - 3
    assert facts["repeated_keys"] == 1 and facts["repeated"][0]["key"] == "000"
    assert facts["tokens"]["de"]["longest"] > 0 and 0 <= facts["tokens"]["(none)"]["truncated"] <= 1
    assert lint(messy, found.options).to_dict() == facts, "the same with one process"


def test_token_lengths_and_truncation(tmp_path, tokenizer):
    texts = ["a picture 1", "a picture 2, ein Bild", "a"]
    files = [
        (f"{n}.{kind}", data)
        for n, text in enumerate(texts)
        for kind, data in (("jpg", picture(n)), ("txt", text.encode()))
    ]
    write_tar(tmp_path / "s.tar", files)
    found = lint(tmp_path, LintOptions(tokenizer=tokenizer, context_length=8))
    encoder = Tokenizer(tokenizer, "xlmv", 8)
    lengths = [len(ids) for ids in encoder.content(texts)]
    assert found.findings.tokens == {"": Counter(lengths)}
    assert found.truncated("") == sum(length > encoder.room for length in lengths) / 3 > 0


def test_images_on_their_side_are_counted(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    files = {"a.jpg": picture(exif=exif), "a.txt": b"turned", "b.jpg": picture(), "b.txt": b"upright"}
    write_tar(tmp_path / "s.tar", files.items())
    assert lint(tmp_path).findings.turned == 1


def test_nothing_kept_is_an_exit_code(tmp_path, capsys):
    write_tar(tmp_path / "s.tar", [("a.jpg", b"damaged"), ("a.txt", b"text")])
    assert main(["data", "lint", str(tmp_path), "--workers", "1"]) == 1
    printed = capsys.readouterr()
    assert "0 of 1 can be used" in printed.out and "image_undecodable 1" in printed.out
    assert "a run would keep nothing" in printed.err
    assert main(["data", "lint", str(tmp_path / "nowhere")]) == 2


def test_the_page_and_the_figures(messy, tokenizer, tmp_path, capsys, parse_page):
    words = ["data", "lint", str(messy), "--page", str(tmp_path / "lint.html"), "--json", str(tmp_path / "lint.json")]
    assert main([*words, "--tokenizer", str(tokenizer), "--workers", "1"]) == 0
    out = capsys.readouterr().out
    assert "skipped     shard_unreadable 3: " in out and "keys in more than one shard: 1" in out
    facts = json.loads((tmp_path / "lint.json").read_text())
    page = parse_page((tmp_path / "lint.html").read_text(encoding="utf-8"))
    sources = [source for source in page.attributes("src") if source]
    assert len(sources) == facts["kept"] and all(source.startswith("data:image/jpeg;base64,") for source in sources)
    for reason in facts["skipped"]:
        assert reason in page.text
    assert "ein Bild" in page.text and "zero.tar" in page.text and "000" in page.text


def test_what_is_held_does_not_grow_with_the_shards(tmp_path, monkeypatch):
    """Examples are bounded, and so are languages: a column may hold anything."""
    monkeypatch.setattr("mc2_hpc.inspection.shard._MOST_LANGUAGES", 3)
    monkeypatch.setattr("mc2_hpc.inspection.shard._MOST_SKIPPED", 3)
    monkeypatch.setattr("mc2_hpc.inspection.shard.PICTURES", 2)
    for shard in range(4):
        record = json.dumps({"caption": "text", "lang": f"no code {shard} " + 100 * "x"}).encode()
        files = {"a.jpg": picture(), "a.json": record, "b.jpg": b"damaged", "b.txt": b"x", "c.jpg": b"", "c.txt": b"x"}
        write_tar(tmp_path / f"{shard}.tar", files.items())
    found = lint(tmp_path, with_pictures=True).findings
    assert found.skipped["image_undecodable"] == 8 and len(found.skips) == 3
    assert len(found.pictures) == 2 and found.kept == 4
    assert dict(found.captions) == {**{f"no code {n} {30 * 'x'}": 1 for n in range(2)}, "": 8, "(others)": 2}


def test_names_from_outside_do_not_control_the_terminal(tmp_path, capsys):
    record = json.dumps({"caption": "\x1b[31mred", "lang": "\x1b[2J"}).encode()
    for shard in ("a", "b\x07"):
        write_tar(tmp_path / f"{shard}.tar", [("k\x1b]0;.jpg", picture()), ("k\x1b]0;.json", record)])
    assert main(["data", "lint", str(tmp_path), "--workers", "1"]) == 0
    assert main(["data", "show", str(tmp_path)]) == 0
    printed = capsys.readouterr()
    assert "\\x1b[2J 100.0%" in printed.out and "k\\x1b]0; in " in printed.out and "\\x1b[31mred" in printed.out
    assert not {"\x1b", "\x07"} & set(printed.out)


def test_workers_end_with_a_killed_command(tmp_path):
    """One worker waits for a shard that cannot be opened; the other has none left."""
    for shard in range(2):
        write_tar(tmp_path / f"{shard}.tar", [("a.jpg", picture()), ("a.txt", b"text")])
    words = ["-m", "mc2_hpc.cli", "data", "lint", str(tmp_path), "--workers", "2"]
    with held(tmp_path / "0.tar"), started([sys.executable, *words]) as command:
        assert command.stderr is not None
        while "shards: 1/2" not in (line := command.stderr.readline()):
            assert line, "it ended"
        children = Path(f"/proc/{command.pid}/task/{command.pid}/children").read_text().split()
        command.kill()
        command.communicate(timeout=60)
        deadline = time.monotonic() + 60
        while any(Path(f"/proc/{child}").exists() for child in children):
            assert time.monotonic() < deadline
            time.sleep(0.05)
    assert len(children) >= 2


def test_quantiles():
    counts = {10: 1, 20: 2, 30: 1}
    assert [quantile(counts, share) for share in (0, 0.25, 0.5, 0.75, 1)] == [10, 10, 20, 20, 30]
    assert quantile({}, 0.5) == 0
