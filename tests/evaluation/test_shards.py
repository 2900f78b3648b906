"""Image-text shards as a set: every image with all its captions; ``mc2 eval --shards`` equals a naive count."""

import io
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from mc2_hpc.cli import main
from mc2_hpc.conversion.convert import convert
from mc2_hpc.data.decode import EvalTransform
from mc2_hpc.data.normalise import normalise
from mc2_hpc.data.packing import pack_pairs, write_shard
from mc2_hpc.data.shards import Pair
from mc2_hpc.errors import UserError
from mc2_hpc.evaluation.sets.shards import shards
from mc2_hpc.models.weights import TOKENIZER_FILE, load_clip


@pytest.fixture(scope="module")
def place(make_checkpoint, tmp_path_factory):
    """A folder with an untrained checkpoint and 60 noise images with captions in two languages."""
    folder = tmp_path_factory.mktemp("eval")
    rng = np.random.default_rng(0)
    pairs = []
    for number in range(60):
        data = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(data, "PNG")
        lang = "de" if number % 3 else "en"
        pairs.append(Pair(key=f"{number:03d}", image=data.getvalue(), text=f"{lang} text {number * 7}", lang=lang))
    pack_pairs(pairs, folder / "shards", pairs_per_shard=25)
    tokenizer = make_checkpoint(folder / "checkpoint", [p.text for p in pairs], 40)
    return folder, pairs, tokenizer


def evaluate(checkpoint, where, out, *more):
    assert main(["eval", str(checkpoint), "--shards", str(where), "--json", str(out), *more]) == 0
    return json.loads(out.read_text(encoding="utf-8"))


def test_equals_naive(place, tmp_path, capsys):
    folder, pairs, tokenizer = place
    result = evaluate(folder / "checkpoint", folder / "shards", tmp_path / "numbers.json")
    assert "text_to_image_R@1" in capsys.readouterr().out
    found = result["sets"]["shards"]
    model, _ = load_clip(folder / "checkpoint")
    transform = EvalTransform(32)
    with torch.no_grad():
        images = model.encode_image(normalise(torch.stack([transform(p.image) for p in pairs])), normalize=True)
        texts = model.encode_text(tokenizer.encode([p.text for p in pairs]), normalize=True)
    for lang in ("all", "en", "de"):
        own = [i for i, p in enumerate(pairs) if lang in ("all", p.lang)]
        scores = texts[own] @ images[own].T
        assert found["n"][lang] == len(own)
        for k in (1, 5, 10):
            for key, matrix in (("text_to_image", scores), ("image_to_text", scores.T)):
                ranks = (matrix > matrix.diag()[:, None]).sum(dim=1)
                assert found["groups"][lang][f"{key}_R@{k}"] == pytest.approx((ranks < k).double().mean().item())
    assert found["mean"] == found["groups"]["all"]
    assert found["chance"]["text_to_image_R@5"] == pytest.approx(5 / 60)
    ends = found["spread"]["text_to_image_R@1"]
    assert {ends["of"], ends["and_of"]} <= {"en", "de"} and ends["lowest"] <= ends["highest"]


def test_the_short_form_honours_every_option(place, tmp_path):
    folder, *_ = place
    words = ["--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache"), "--precision", "bf16"]
    result = evaluate(folder / "checkpoint", folder / "shards", tmp_path / "a.json", *words, "eval_resize=squash")
    assert result["precision"] == "bf16" and result["eval_resize"] == "squash"
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == result
    assert (tmp_path / "out" / "report.html").is_file() and len(list((tmp_path / "cache").iterdir())) == 1
    only = evaluate(folder / "checkpoint", folder / "shards", tmp_path / "b.json", "sets.shards.languages=[DE]")
    assert set(only["sets"]["shards"]["groups"]) == {"all", "de"} and only["sets"]["shards"]["n"]["all"] == 40


def test_an_open_clip_folder_can_be_scored_on_shards(place, tmp_path):
    folder, *_ = place
    convert(folder / "checkpoint", "open_clip", tmp_path / "open_clip")
    theirs = evaluate(tmp_path / "open_clip", folder / "shards", tmp_path / "numbers.json")
    assert theirs["model"]["format"] == "open_clip" and theirs["sets"]["shards"]["n"]["all"] == 60


def test_ranks_share_the_work_and_one_prints(place, tmp_path):
    folder, *_ = place
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "mc2_hpc.cli", "eval", str(folder / "checkpoint"), "--shards", str(folder / "shards")]
    command += ["--json", str(tmp_path / "two.json")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("| shards | text_to_image_R@1 |") == 1
    two = json.loads((tmp_path / "two.json").read_text())["sets"]["shards"]["groups"]
    one = evaluate(folder / "checkpoint", folder / "shards", tmp_path / "one.json")["sets"]["shards"]["groups"]
    assert two == one


def test_bad_input(place, tmp_path, capsys):
    folder, *_ = place
    assert main(["eval", str(tmp_path), "--shards", str(folder / "shards")]) == 2
    assert "no model there" in capsys.readouterr().err
    shutil.copytree(folder / "checkpoint", tmp_path / "bare")
    (tmp_path / "bare" / TOKENIZER_FILE).unlink()
    assert main(["eval", str(tmp_path / "bare"), "--shards", str(folder / "shards")]) == 2
    assert TOKENIZER_FILE in capsys.readouterr().err
    assert main(["eval", str(folder / "checkpoint"), "--shards", str(tmp_path / "nowhere")]) == 2
    assert "nowhere" in capsys.readouterr().out


def test_every_image_once_in_order(place):
    folder, pairs, _ = place
    task = shards(folder / "shards")
    assert [task.images.read(index) for index in range(60)] == [pair.image for pair in pairs]
    assert task.images.name(59).endswith("00002.tar, image 9") and task.pooled
    english = [index for index, pair in enumerate(pairs) if pair.lang == "en"]
    assert task.languages["en"].images == english
    assert task.languages["en"].texts == [pairs[index].text for index in english]
    assert task.images.fingerprint() == shards(str(folder / "shards")).images.fingerprint()


def test_curated_images_have_all_their_captions(tmp_path, noise):
    write_shard(tmp_path / "0.tar", [(key, {"jpg": noise(i)}) for i, key in enumerate("ab")])
    rows = {"key": ["a", "b", "a"], "text": ["one", "zwei", "eins"], "lang": ["en", "de", "de"]}
    pq.write_table(pa.table(rows), tmp_path / "0.parquet")
    task = shards(tmp_path)
    assert task.languages["en"].texts == ["one"] and task.languages["en"].images == [0]
    assert task.languages["de"].texts == ["eins", "zwei"] and task.languages["de"].images == [0, 1]


def test_plain_shards_with_text_and_json(tmp_path, noise, encoder):
    """Captions in no known language count towards ``all``."""
    samples = [
        ("a", {"jpg": noise(0), "txt": b"one"}),
        ("b", {"jpg": noise(1), "json": b'{"caption": "zwei", "lang": "de"}'}),
        ("c", {"jpg": noise(2), "txt": b"three", "json": b'{"lang": "en"}'}),
    ]
    write_shard(tmp_path / "0.tar", samples)
    task = shards(tmp_path)
    assert {lang: (c.texts, c.images) for lang, c in task.languages.items()} == {
        "": (["one"], [0]),
        "de": (["zwei"], [1]),
        "en": (["three"], [2]),
    }
    from mc2_hpc.evaluation.scoring import score

    found = score(task, encoder.images(task.images), encoder)
    assert set(found.groups) == {"all", "de", "en"} and found.counts == {"all": 3, "de": 1, "en": 1}


def test_what_is_left_out_is_counted_by_reason(tmp_path, noise, encoder):
    samples = [
        ("a", {"jpg": b"bad", "txt": b"x"}),
        ("b", {"jpg": noise(0), "txt": b"y"}),
        ("c", {"jpg": noise(1)}),
        ("d", {"txt": b"z"}),
        ("e", {"jpg": noise(2), "txt": b"\xff"}),
        ("f", {"jpg": noise(3)[:-200], "txt": b"cut"}),
    ]
    write_shard(tmp_path / "0.tar", samples)
    (tmp_path / "1.tar").write_bytes(b"")
    task = shards(tmp_path)
    counted = {"caption_missing": 1, "image_missing": 1, "caption_not_utf8": 1, "shard_unreadable": 1}
    assert task.skipped == counted
    assert encoder.images(task.images).skipped() == {"image_undecodable": 1, "image_truncated": 1}


def test_nothing_usable_is_an_error(tmp_path, encoder):
    (tmp_path / "0.tar").write_bytes(b"")
    with pytest.raises(UserError, match="no image can be used; everything was skipped: shard_unreadable 1"):
        shards(tmp_path)
    write_shard(tmp_path / "0.tar", [("a", {"jpg": b"bad", "txt": b"x"})])
    with pytest.raises(UserError, match="image_undecodable 1"):
        encoder.images(shards(tmp_path).images)


def test_a_replaced_shard_is_another_set(tmp_path, noise):
    write_shard(tmp_path / "0.tar", [("a", {"jpg": noise(0), "txt": b"x"})])
    before = shards(tmp_path).images.fingerprint()
    write_shard(tmp_path / "0.tar", [("a", {"jpg": noise(1), "txt": b"x"})])
    assert shards(tmp_path).images.fingerprint() != before
