"""Ablation files: how a row gets its settings, and one-line errors."""

import dataclasses
import re
from pathlib import Path

import pytest
import yaml

from mc2_hpc.ablation.settings import CurationSettings, TokenizerSettings, load_ablation
from mc2_hpc.errors import UserError

CONFIGS = Path(__file__).parents[2] / "configs" / "ablations"


def test_a_row_adds_to_what_all_rows_share(ablation_file):
    rows = [
        {"name": "plain"},
        {
            "name": "own",
            "curation": {"languages": ["en"], "thresholds": "same"},
            "tokenizer": {"style": "mt5"},
            "seen": 2.3,
            "train": ["optim.lr=0.5"],
            "paper": {"ImageNet": 61},
        },
    ]
    found = load_ablation(ablation_file("both", rows, train=["global_batch=8"]), ["seeds=[4,5]"])
    plain, own = found.rows
    assert found.name == "both" and found.seeds == [4, 5] and found.data.pool.endswith("/pool")
    assert plain.curation == CurationSettings(t_en=5) and plain.tokenizer == TokenizerSettings(vocab_size=90)
    assert own.curation == CurationSettings(t_en=5, languages=["en"], thresholds="same")
    assert own.tokenizer == TokenizerSettings(style="mt5", vocab_size=90)
    assert own.paper == {"ImageNet": 61.0} and plain.paper == {}
    assert plain.config.steps == 3 and own.config.steps == 7  # 3 x 2.3
    assert own.config.optim.lr == 0.5 and own.config.global_batch == plain.config.global_batch == 8
    assert own.config == dataclasses.replace(plain.config, steps=7, optim=own.config.optim)


ROW = {"name": "a"}


@pytest.mark.parametrize(
    "rows, changes, message",
    [
        ([ROW], {"sedes": [1]}, "unknown key 'sedes'; did you mean 'seeds'?"),
        ([{"name": "a", "curaton": {}}], {}, "curaton'; did you mean 'curation'?"),
        ([{"name": "a", "curation": {"t_eng": 3}}], {}, "rows.a: curation: unknown key 't_eng'; did you mean 't_en'?"),
        ([{"name": "a", "curation": {"t_en": "much"}}], {}, "rows.a: curation: t_en"),
        ([{"name": "a", "curation": {"t_en": 0}}], {}, "rows.a: curation: t_en=0: must be at least 1"),
        ([{"name": "a", "curation": {"metadata": "french"}}], {}, "metadata='french': choose one of by_language"),
        ([{"name": "a", "curation": {"thresholds": "low"}}], {}, "thresholds='low': choose one of tail_mass"),
        ([{"name": "a", "tokenizer": {"style": "bert"}}], {}, "rows.a: tokenizer: style='bert': choose one of xlmv"),
        ([{"name": "a", "train": ["stepps=3"]}], {}, "rows.a: override 'stepps=3': unknown key 'stepps'"),
        ([{"name": "a", "seen": 0}], {}, "rows.a: seen=0.0: must be above 0"),
        ([{"name": "a", "paper": {"ImageNet": "good"}}], {}, "paper"),
        ([ROW, ROW], {}, "rows: 'a' occurs twice"),
        ([ROW], {"seeds": [1, 1]}, "seeds: 1 occurs twice"),
        ([], {}, "has no rows"),
        ([ROW], {"columns": {}}, "has no columns"),
        ([ROW], {"columns": {"x": {"set": "imagenet"}}}, "columns.x: "),
        ([ROW], {"columns": {"x": {"set": "colours", "reduce": "max"}}}, "reduce='max': choose one of mean, min"),
        ([ROW], {"base": "nowhere.yaml"}, "rows.a: nowhere.yaml: no such config file"),
        ([ROW], {"suite": "nowhere.yaml"}, "nowhere.yaml: no such suite file"),
        ([ROW], {"title": None}, "title"),
    ],
)
def test_errors_are_one_line(rows, changes, message, ablation_file):
    path = ablation_file("bad", rows, **changes)
    with pytest.raises(UserError, match=re.escape(message)) as error:
        load_ablation(path)
    assert "\n" not in str(error.value)


def test_a_missing_file_or_key_and_invalid_yaml(tmp_path, ablation_file):
    with pytest.raises(UserError, match="no such ablation file"):
        load_ablation(tmp_path / "none.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1")
    with pytest.raises(UserError, match="broken.yaml: not valid YAML"):
        load_ablation(tmp_path / "broken.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(UserError, match="list.yaml: not a mapping"):
        load_ablation(tmp_path / "list.yaml")
    values = yaml.safe_load(ablation_file("whole", [ROW]).read_text())
    del values["suite"]
    (tmp_path / "whole.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(UserError, match="suite"):
        load_ablation(tmp_path / "whole.yaml")


def test_what_is_only_printed_may_be_left_out(tmp_path, ablation_file):
    values = yaml.safe_load(ablation_file("mine", [ROW]).read_text())
    for key in ("title", "mirrors", "finding"):
        del values[key]
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(values))
    found = load_ablation(tmp_path / "mine.yaml")
    assert (found.title, found.mirrors, found.finding) == ("mine", "", "")


SHIPPED = sorted([*CONFIGS.glob("*.yaml"), *CONFIGS.glob("digits/*.yaml")])


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_files_can_be_read(path, data, tmp_path, monkeypatch):
    suite = yaml.safe_load((data / "suite.yaml").read_text(encoding="utf-8"))
    suite["sets"] = dict.fromkeys(("cifar10", "cifar10_rare_names", "numbers"), suite["sets"]["colours"])
    name = Path(yaml.safe_load(path.read_text(encoding="utf-8"))["suite"]).name
    (tmp_path / name).write_text(yaml.safe_dump(suite))
    monkeypatch.chdir(CONFIGS.parents[1])
    found = load_ablation(path, [f"data.root={tmp_path}"])
    assert found.suite == tmp_path / name and found.data.pool == f"{tmp_path}/pool"
    assert len(found.rows) >= 2 and len(found.seeds) >= 3
    assert all(bool(row.paper) == bool(found.mirrors) for row in found.rows)
