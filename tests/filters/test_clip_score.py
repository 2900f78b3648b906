"""The CLIP score is the cosine that ``mc2_hpc.load`` gives, and its limits decide."""

import io
import shutil

import numpy as np
import pytest
from PIL import Image

import mc2_hpc
from mc2_hpc.errors import UserError
from mc2_hpc.jobs.named import Named
from tests.curation.filtered_pool import in_tar, run_filter, texts, verdicts, write_shard
from tests.evaluation.conftest import SENTENCES

SCORE = "mc2_hpc.filters.ClipScore"


@pytest.fixture
def pool(tmp_path, noise):
    """Twelve images of three formats with one or two captions each, and one that cannot be decoded."""
    kinds = ["JPEG", "PNG", "WEBP"] * 4
    images = {f"{n:02d}.{kind.lower()}": noise(n, kind=kind) for n, kind in enumerate(kinds)}
    images = {name.replace("jpeg", "jpg"): data for name, data in images.items()}
    rows = [(f"{n:02d}", SENTENCES[(n + k) % 5], "en") for n in range(12) for k in range(1 + n % 2)]
    broken = {"99.jpg": noise(99)[:200]}
    return write_shard(tmp_path / "pool", "0", {**images, **broken}, [*rows, ("99", "a cat", "en")])


def expected(pool, model) -> dict[tuple[str, str], float]:
    clip = mc2_hpc.load(model, device="cpu")
    images = {
        name.partition(".")[0]: data for name, data in in_tar(pool / "0.tar").items() if not name.startswith("99")
    }
    return {
        (key, text): float(clip.encode_image(Image.open(io.BytesIO(images[key]))) @ clip.encode_text(text))
        for key, captions in texts(pool).items()
        for text in captions
        if key in images
    }


def test_scores_are_those_of_the_model(pool, tiny_checkpoint, tmp_path):
    cosines = expected(pool, tiny_checkpoint)
    middle = float(np.median(list(cosines.values())) + 1e-6)
    counters = run_filter(pool, tmp_path / "out", Named(SCORE, {"model": str(tiny_checkpoint), "least": middle}))
    rows = {(row["key"], row["text"]): row for row in verdicts(tmp_path / "out")}
    assert rows.pop(("99", "a cat"))["reason"] == "image_truncated" and rows.keys() == cosines.keys()
    for row, cosine in cosines.items():
        assert rows[row]["score_clip_score"] == pytest.approx(cosine, abs=1e-5)
        assert rows[row]["reason"] == (None if rows[row]["score_clip_score"] >= middle else "clip_score_low")
    assert counters["texts"] == 9 and counters["drops"] == {"clip_score_low": 9, "image_truncated": 1}
    by_key = {key for (key, _), row in rows.items() if row["reason"] is None}
    assert counters["images"] == len(by_key)


def test_the_model_is_recorded_and_another_is_refused(pool, tiny_checkpoint, make_checkpoint, tmp_path, outputs):
    score = Named(SCORE, {"model": str(tiny_checkpoint), "least": -1.0})
    run_filter(pool, tmp_path / "out", score)
    before = outputs(tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "stats")
    run_filter(pool, tmp_path / "out", score)
    assert outputs(tmp_path / "out") == before and tiny_checkpoint.name.encode() in before["filter.json"]
    make_checkpoint(tmp_path / "other", SENTENCES * 2, 70)
    with pytest.raises(UserError, match="this folder was made with another filters"):
        run_filter(pool, tmp_path / "out", Named(SCORE, {"model": str(tmp_path / "other"), "least": -1.0}))


def test_what_is_no_model_is_one_line(pool, tmp_path):
    (tmp_path / "empty").mkdir()
    for model, message in (("empty", "empty: "), ("missing", "missing: ")):
        with pytest.raises(UserError, match=f"--filter {SCORE}: .*{message}") as error:
            run_filter(pool, tmp_path / "out", Named(SCORE, {"model": str(tmp_path / model), "least": 0.2}))
        assert str(error.value).isprintable()
    assert not (tmp_path / "out").exists()
