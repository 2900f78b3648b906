"""``mc2 eval`` on shards equals a naive computation over all of them."""

import io
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from mc2_hpc.cli import main
from mc2_hpc.data.decode import EvalTransform
from mc2_hpc.data.normalise import normalise
from mc2_hpc.data.packing import pack_pairs
from mc2_hpc.data.shards import Pair
from mc2_hpc.models.weights import TOKENIZER_FILE, load_clip


@pytest.fixture(scope="module")
def place(make_checkpoint, tmp_path_factory):
    """Folder of an untrained checkpoint and 60 noise pictures with captions in two languages."""
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


def test_equals_naive(place, tmp_path, capsys):
    folder, pairs, tokenizer = place
    out = tmp_path / "numbers.json"
    assert main(["eval", str(folder / "checkpoint"), "--shards", str(folder / "shards"), "--json", str(out)]) == 0
    assert "text-to-image R@1" in capsys.readouterr().out
    result = json.loads(out.read_text())
    model, _ = load_clip(folder / "checkpoint")
    transform = EvalTransform(32)
    with torch.no_grad():
        images = model.encode_image(normalise(torch.stack([transform(p.image) for p in pairs])), normalize=True)
        texts = model.encode_text(tokenizer.encode([p.text for p in pairs]), normalize=True)
    for lang in ("all", "en", "de"):
        own = [i for i, p in enumerate(pairs) if lang in ("all", p.lang)]
        scores = texts[own] @ images[own].T
        row = result["retrieval"][lang]
        assert row["texts"] == len(own)
        for k in (1, 5, 10):
            for key, matrix in (("text_to_image", scores), ("image_to_text", scores.T)):
                ranks = (matrix > matrix.diag()[:, None]).sum(dim=1)
                assert row[key][f"R@{k}"] == pytest.approx((ranks < k).double().mean().item())


def test_bad_input(place, tmp_path, capsys):
    folder, *_ = place
    assert main(["eval", str(tmp_path), "--shards", str(folder / "shards")]) == 2
    assert "no checkpoint there" in capsys.readouterr().err
    shutil.copytree(folder / "checkpoint", tmp_path / "bare")
    (tmp_path / "bare" / TOKENIZER_FILE).unlink()
    assert main(["eval", str(tmp_path / "bare"), "--shards", str(folder / "shards")]) == 2
    assert TOKENIZER_FILE in capsys.readouterr().err
