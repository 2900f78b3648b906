"""``data.train`` as a list of sources: what a config may say, and one line for each mistake."""

import json
import math
from pathlib import Path

import pytest

from mc2_hpc.config import config_from_dict, config_to_dict, load_config
from mc2_hpc.errors import UserError
from mc2_hpc.train_sources import TrainSource

MIX = """
data:
  train:
    - {name: alt, path: /data/alt, weight: 5, balance: /data/balance}
    - name: re-captioned
      path: [/data/a, /data/b]
      captions: {txt: 0.85, json.synthetic: 0.15}
"""


@pytest.fixture
def mix(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(MIX)
    return path


def test_a_list_of_sections_is_a_mix(mix: Path) -> None:
    config = load_config(mix)
    captions = {"txt": 0.85, "json.synthetic": 0.15}
    assert config.data.sources == [
        TrainSource(name="alt", path="/data/alt", weight=5, balance="/data/balance"),
        TrainSource(name="re-captioned", path=["/data/a", "/data/b"], weight=1, captions=captions),
    ]
    assert config_from_dict(json.loads(json.dumps(config_to_dict(config)))) == config  # as in a checkpoint


@pytest.mark.parametrize("train", ["/data/a", "[/data/a, /data/b]"])
def test_names_of_shards_are_no_mix(mix: Path, train: str) -> None:
    config = load_config(mix, [f"data.train={train}"])
    assert config.data.sources == []
    assert config_from_dict(config_to_dict(config)) == config


@pytest.mark.parametrize(
    "train, words",
    [
        ("[{path: /a}]", r"data.train\[0\].name: is missing"),
        ("[{name: a}]", r"data.train\[0\].path: is missing"),
        ("[{name: a, path: /a}, /b]", r"data.train\[1\]: must be a section of keys, not '/b'"),
        ("[{name: a, path: /a, wieght: 2}]", "unknown key 'wieght'; did you mean 'weight'"),
        ("[{name: a, path: /a, weight: 0}]", "source a: weight=0.0: must be above 0"),
        ("[{name: a, path: /a, weight: -1}]", "source a: weight=-1.0: must be above 0"),
        ("[{name: a, path: /a, weight: nan}]", r"data.train\[0\].weight: must be a finite number"),
        ("[{name: a, path: /a}, {name: a, path: /b}]", "two sources have the name 'a'"),
        ("[{name: a/b, path: /a}]", "name 'a/b': use letters, digits"),
        ("[{name: a, path: /a, captions: {text: 1}}]", "source a: captions: 'text' is not a caption field: write txt"),
        ("[{name: a, path: /a, captions: {txt: 0.9}}]", "the probabilities add up to 0.9: they must add up to 1"),
        ("[{name: a, path: /a, captions: {txt: 1.5, json.x: -0.5}}]", "captions: txt=1.5: must be above 0 and at most"),
        ("[{name: a, path: /a, captions: {txt: 1, json.x: 0}}]", "captions: json.x=0.0: must be above 0"),
    ],
)
def test_a_mistake_is_one_line(mix: Path, train: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        load_config(mix, [f"data.train={train}"])
    assert "\n" not in str(error.value)


def test_each_source_has_its_own_balance(mix: Path) -> None:
    with pytest.raises(UserError, match="data.balance: data.train lists sources: set balance in those"):
        load_config(mix, ["data.balance=/data/balance"])


@pytest.mark.parametrize("weight", [math.nan, math.inf])
def test_weights_from_python_are_checked_too(weight: float) -> None:
    with pytest.raises(UserError, match="weight=(nan|inf): must be above 0"):
        TrainSource(name="a", path="/a", weight=weight)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.features=/f", "data.features: data.train lists sources, and features are stored of a single one"),
        ("data.balance=/b", "data.balance: data.train lists sources"),
    ],
)
def test_settings_that_do_not_go_with_a_mix(mix: Path, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config(mix, ["freeze.vision=all", override])
