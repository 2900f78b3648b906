"""A copy of a config with other values keeps everything else as it was written."""

import pytest

from mc2_hpc.config import load_config, with_settings
from mc2_hpc.errors import UserError
from mc2_hpc.tuning.rewrite import nested, rewritten

TEXT = """\
# A run, and why.
output: runs/a   # where
global_batch: 64
model:
  preset: ViT-S-16-worldwide
  recompute: full   # to fit
  vision: {image_size: 32, patch_size: 16}

  # the other tower
  text:
    vocab_size: 900
data:
    train: "shards"
    lanes: 8

# the end
"""


@pytest.fixture
def write(tmp_path):
    def make(text):
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return make


def parsed(tmp_path, text):
    path = tmp_path / "copy.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(path)


def check(tmp_path, path, overrides, settings):
    text = rewritten(path, overrides, settings)
    assert parsed(tmp_path, text) == with_settings(load_config(path, overrides), settings)
    return text


def test_values_are_replaced_where_they_are(tmp_path, write):
    text = check(tmp_path, write(TEXT), [], {"model.recompute": "none", "data.lanes": 4, "global_batch": 32})
    assert text == TEXT.replace("full", "none").replace("lanes: 8", "lanes: 4").replace("64", "32")


def test_new_keys_go_to_the_end_of_their_section(tmp_path, write):
    settings = {"model.compile": True, "data.workers": 3, "zero.stage": 2, "zero.bucket_elements": 5, "micro_batch": 4}
    text = check(tmp_path, write(TEXT), [], settings)
    assert "    lanes: 8\n    workers: 3\n" in text and "    vocab_size: 900\n  compile: true\n" in text
    assert all(line in text.splitlines() for line in TEXT.splitlines())
    assert "zero:\n  stage: 2\n" in text or "zero:\n  bucket_elements: 5\n" in text


def test_overrides_are_part_of_the_copy(tmp_path, write):
    words = ["data.train=[a.tar,b.tar]", "output=run #3", "model.vision.width=64", "data.balance=null"]
    text = check(tmp_path, write(TEXT), words, {"model.recompute": "none"})
    assert "patch_size: 16, width: 64}" in text and 'output: "run #3"   # where' in text


@pytest.mark.parametrize("text", ["seed: 1", "{}\n", "zero: {}\n", "model: {compile: false}"])
def test_odd_files(tmp_path, write, text):
    check(tmp_path, write(text), [], {"micro_batch": 4, "zero.stage": 2, "model.compile": True})


def test_a_value_from_an_anchor_is_refused_in_one_line(write):
    text = "model: &m\n  compile: false\n  recompute: full\nzero:\n  stage: 1\n"
    merged = text + "data: {lanes: 1}\nprofile: {}\n"
    path = write(merged.replace("model: &m", "model:\n  <<: {recompute: selective}").replace("  recompute: full\n", ""))
    rewritten(path, [], {"model.compile": True})
    shared = "x: 1\n"
    with pytest.raises(UserError, match="unknown key"):
        rewritten(write(shared), [], {"model.compile": True})
    two = "micro_batch: &n 2\nzero: {stage: 1}\nlog_every: *n\n"
    with pytest.raises(UserError, match="by hand"):
        rewritten(write(two), [], {"micro_batch": 4})


def test_nested_settings():
    assert nested({"a.b": 1, "a.c": True, "d": None}) == {"a": {"b": 1, "c": True}, "d": None}
