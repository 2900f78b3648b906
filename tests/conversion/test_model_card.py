"""Exported folders say what their model is and what it was trained on, and keep saying it when converted again."""

import dataclasses
import json
import logging
import shutil
import typing
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import yaml

from mc2_hpc.cli import main
from mc2_hpc.config import RunConfig, config_from_dict, config_to_dict
from mc2_hpc.conversion.convert import convert
from mc2_hpc.conversion.provenance import _TOLD, Provenance, find_provenance, read_scores
from mc2_hpc.errors import UserError
from mc2_hpc.evaluation.dual_encoders.protocol import folder_files
from mc2_hpc.models.clip import CLIP
from mc2_hpc.models.weights import read_card
from mc2_hpc.reading.json_file import read_json
from mc2_hpc.reading.settings import PathName
from mc2_hpc.storage import file_sha256, write_json

Checkpoint = Callable[..., tuple[Path, CLIP]]
A, B, C = ("a" * 64, "b" * 64, "c" * 64)


@pytest.fixture
def run(checkpoint: Checkpoint, tmp_path: Path) -> Path:
    """A run folder as training leaves it: two evaluations, and a balance folder on this machine."""
    source, _ = checkpoint()
    folder = tmp_path / "secret-place" / "run"
    step = folder / "checkpoints" / "step-00000007"
    shutil.copytree(source, step)
    (folder / "checkpoints" / "latest").write_text("step-00000007\n")
    balance = tmp_path / "secret-place" / "balance"
    write_json(balance / "balance.json", {"t_en": 170_000, "sources": {"metadata": {"en": A, "th": B}}, "more": 1})
    config = config_from_dict(
        {
            "output": str(folder),
            "steps": 9,
            "global_batch": 256,
            "stages": [{"steps": 8}, {"steps": 1, "data": {"crop_scale": [0.5, 1.0]}}],
            "lora": {"rank": 3},
            "loss": {"kind": "sigmoid"},
            "data": {"train": "/secret-place/shards", "balance": str(balance)},
            "model": {"init_from": "/secret-place/released | `x`"},
        }
    )
    trainer = {
        "step": 7,
        "samples_seen": 1792,
        "shards": {"count": 20, "sha256": C},
        "config": config_to_dict(config),
        "versions": {"torch": "2.13.0"},
        "position": [],
    }
    write_json(step / "trainer.json", trainer)
    rows = [
        {"step": at, "sets": {"xm3600": {"mean": {"text_to_image_R@1": at / 100}}, "lost": {"error": "no such file"}}}
        for at in (5, 7, 9)
    ]
    (folder / "evaluations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 1', "utf-8")
    return folder


def card(folder: Path) -> tuple[dict[str, object], str]:
    """Header and body of the model card."""
    _, header, body = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(header), body


def test_a_run_is_told(run: Path, tmp_path: Path) -> None:
    out = convert(run, "hf", tmp_path / "hf")
    header, body = card(out)
    assert header["library_name"] == "transformers" and header["license_name"] == "TO BE FILLED IN"
    assert header["pipeline_tag"] == "zero-shot-image-classification"
    balance = file_sha256(run.parent / "balance" / "balance.json")
    for line in (
        "| steps | 7 |",
        "| pairs seen | 1,792 |",
        "| started from | released \\| `x` |",
        f"| data | 20 shards, SHA-256 of their names {C} |",
        f"| balance | SHA-256 of balance.json {balance}, English's threshold 170,000 |",
        f"| en | {A} |",
        f"| th | {B} |",
        "| torch | 2.13.0 |",
        "| xm3600 | text_to_image_R@1 | 7.0 |",
        "global_batch: 256",
        "  rank: 3",
        "  kind: sigmoid",
        "  matrices: adamw",
        "  steps: 8",
    ):
        assert line in body.splitlines(), line
    assert "lost" not in body and "9.0" not in body
    # Folders of this machine are in neither file.
    assert not any("secret-place" in (out / name).read_text() for name in ("README.md", "provenance.json"))


def test_told_settings_have_no_paths() -> None:
    assert set(_TOLD) <= set(config_to_dict(RunConfig()))
    assert not set(_TOLD) & {"output", "data", "model", "eval"}
    hints = _hints(RunConfig, _TOLD)
    assert float in hints and PathName not in hints


def _hints(config: type, names: Iterable[str] | None = None) -> list[object]:
    """The types of settings, those within sections too."""
    found: list[object] = []
    for name, hint in typing.get_type_hints(config, include_extras=True).items():
        if names is None or name in names:
            for part in (hint, *typing.get_args(hint)):  # of a list, or of what may be left out
                found += _hints(part) if dataclasses.is_dataclass(part) else [part]
    return found


@pytest.mark.parametrize("to", ["open_clip", "hf", "onnx"])
def test_every_format_has_a_card(to: str, run: Path, tmp_path: Path) -> None:
    out = convert(run, to, tmp_path / to)
    header, body = card(out)
    assert header["library_name"] == {"hf": "transformers"}.get(to, to)
    assert {"## Use", "## Model", "## Training", "## Evaluation", "## Licence"} <= set(body.splitlines())
    assert not {"README.md", "provenance.json"} & {path.name for path in folder_files(out)}  # not the model's identity


def test_it_stays_with_the_model(run: Path, tmp_path: Path) -> None:
    first = convert(run, "hf", tmp_path / "a")
    back = convert(convert(first, "open_clip", tmp_path / "b"), "mc2", tmp_path / "c")
    assert read_json(back / "provenance.json", Provenance) == find_provenance(run / "checkpoints" / "step-00000007")
    again = convert(back, "hf", tmp_path / "d")
    assert {p.name: p.read_bytes() for p in again.iterdir()} == {p.name: p.read_bytes() for p in first.iterdir()}


def test_scores_are_of_this_model(run: Path, tmp_path: Path) -> None:
    """Another resolution has none, and ``--results`` replaces the run's."""
    assert "xm3600" not in card(convert(run, "hf", tmp_path / "larger", image_size=40))[1]
    results = tmp_path / "results.json"
    results.write_text(json.dumps({"identity": "x", "sets": {"cifar10": {"mean": {"top1": 0.5}, "groups": {}}}}))
    arguments = ["--to", "hf", "--image-size", "40", "--results", str(results), "--out", str(tmp_path / "scored")]
    assert main(["convert", str(run), *arguments]) == 0
    assert "| cifar10 | top1 | 50.0 |" in card(tmp_path / "scored")[1].splitlines()
    sets = {"b": {"mean": {"top5": 0.75, "top1": 0.5}}, "a": {"mean": {"top1": 0.25}}}
    results.write_text(json.dumps({"sets": sets}))
    scores = [(score.set, score.metric) for score in read_scores(results)]
    assert scores == [("a", "top1"), ("b", "top1"), ("b", "top5")]  # as evaluations.jsonl and results.json may differ
    results.write_text('{"sets": 3}')
    with pytest.raises(UserError, match=r"results.json: not results.json of `mc2 eval`: \$.sets: expected an object"):
        convert(run, "hf", tmp_path / "no", results=results)
    assert not (tmp_path / "no").exists()
    rounded = card(convert(run, "hf", tmp_path / "half", dtype="bf16"))[1]
    assert "Measured with the fp32 weights" in rounded and "| weights | bf16 |" in rounded


def test_sampled_shards_name_their_sources(run: Path, tmp_path: Path) -> None:
    """Without online balancing, hashes come from the folder of the shards."""
    path = run / "checkpoints" / "step-00000007" / "trainer.json"
    trainer = json.loads(path.read_text())
    shards = tmp_path / "shards"
    write_json(shards / "pack.json", {"matched": {"metadata": {"en": A}, "sample": {"balance": B}}, "shards": []})
    for train in (str(shards), ["s3://elsewhere/", str(shards)]):
        trainer["config"]["data"] |= {"balance": None, "train": train}
        write_json(path, trainer)
        found = find_provenance(path.parent)
        assert (found.metadata, found.balance) == ({"en": A}, B)


def pack(folder: Path, metadata: str, balance: str | None) -> str:
    sample = {"balance": balance} if balance else None
    write_json(folder / "pack.json", {"matched": {"metadata": {"en": metadata}, "sample": sample}, "shards": []})
    return str(folder)


def change(run: Path, **settings: object) -> Path:
    """The checkpoint, with these fields of ``trainer.json`` instead: those of ``config`` are dotted with ``__``."""
    path = run / "checkpoints" / "step-00000007" / "trainer.json"
    trainer = json.loads(path.read_text())
    for name, value in settings.items():
        *sections, last = name.split("__")
        place = trainer
        for section in sections:
            place = place[section]
        place[last] = value
    write_json(path, trainer)
    return path.parent


def test_every_source_of_a_mix_is_told(run: Path, tmp_path: Path) -> None:
    alt = {"name": "alt", "path": "/secret-place/alt", "weight": 5.0, "balance": str(run.parent / "balance")}
    captions = {"txt": 0.75, "json.synthetic": 0.25}
    more = {
        "name": "more",
        "path": [pack(tmp_path / "secret-place" / name, *of) for name, of in (("m1", (A, B)), ("m2", (A, C)))],
        "weight": 2.0,
        "balance": None,
        "captions": captions,
    }
    counted = {name: {"count": 1000 * n, "sha256": C} for n, name in enumerate(("alt", "more"), 1)}
    change(run, shards=None, sources=counted, config__data__train=[alt, more], config__data__balance=None)
    out = convert(run, "hf", tmp_path / "hf")
    found = read_json(out / "provenance.json", Provenance)
    assert [source.name for source in found.sources] == ["alt", "more", "more/m1", "more/m2"]
    assert found.sources[0].metadata == {"en": A, "th": B} and found.sources[0].t_en == 170_000
    assert [source.balance for source in found.sources[1:]] == [None, B, C]
    body = card(out)[1]
    for line in (
        f"| data of alt | 1,000 shards, SHA-256 of their names {C} |",
        f"| data of more | 2,000 shards, SHA-256 of their names {C} |",
        "| weight of alt | 5 |",
        "| captions of more | json.synthetic 0.25, txt 0.75 |",
        f"| balance of more/m1 | SHA-256 of balance.json {B} |",
        "Metadata of alt:",
        "Metadata of more/m2:",
    ):
        assert line in body.splitlines(), line
    assert not any("secret-place" in (out / name).read_text() for name in ("README.md", "provenance.json"))
    back = convert(out, "mc2", tmp_path / "back")
    assert find_provenance(back) == found


def test_pools_curated_in_different_ways(run: Path, tmp_path: Path) -> None:
    """Pools that were curated in one way are told once."""
    places = [("x/pool", (A, B)), ("x/same", (A, B)), ("y/pool", (C, None))]
    folders = [pack(tmp_path / name, *of) for name, of in places]
    checkpoint = change(run, config__data__balance=None, config__data__train=folders)
    found = find_provenance(checkpoint)
    assert [(s.name, s.metadata, s.balance) for s in found.sources] == [
        ("pool", {"en": A}, B),
        ("pool (2)", {"en": C}, None),
    ]
    assert found.shards is not None and not found.metadata
    change(run, config__data__train=folders[:2])
    found = find_provenance(checkpoint)
    assert (found.metadata, found.balance, found.sources) == ({"en": A}, B, [])


def test_folders_that_cannot_be_looked_into(run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    places = [str(loop), "nothing\0there", "long" * 2000, "", pack(tmp_path / "pool", A, B)]
    checkpoint = change(run, config__data__balance=str(loop), config__data__train=places)
    with caplog.at_level(logging.WARNING):
        found = find_provenance(checkpoint)
    assert (found.step, found.metadata, found.balance) == (7, {"en": A}, B)
    left = [record.getMessage() for record in caplog.records]
    assert len(left) == 4 and all(line.startswith("left out of the model card: ") for line in left)
    assert f"{loop / 'balance.json'}: Too many levels of symbolic links" in left[0]
    for damaged in (3, None, {}, [3, None, {"name": 4, "path": {}}], {"path": 1}):
        assert find_provenance(change(run, config__data__train=damaged)).step == 7


def test_teacher_average_and_size_are_told(run: Path, tmp_path: Path) -> None:
    change(run, config__distill={"teacher": "/secret-place/ViT-H", "weight": 1.0, "scale": 100.0})
    checkpoint = run / "checkpoints" / "step-00000007"
    for path in checkpoint.glob("model.*safetensors"):
        shutil.copyfile(path, checkpoint / path.name.replace("model", "ema", 1))
    size = read_card(checkpoint).arch.vision.image_size
    out = convert(run, "hf", tmp_path / "averaged", ema=True, image_size=size + 8)
    lines = card(out)[1].splitlines()
    assert "| teacher | ViT-H (scale 100.0, weight 1.0) |" in lines
    change(run, config__distill={"teacher": "", "features": "/secret-place/of-ViT-g", "weight": 1.0})
    assert "| teacher | of-ViT-g (weight 1.0) |" in card(convert(run, "hf", tmp_path / "stored"))[1].splitlines()
    assert "| weights | the moving average over the steps |" in lines
    assert f"| images in training | {size} px; the table of positions was interpolated |" in lines
    larger = convert(out, "hf", tmp_path / "larger", image_size=size + 16)
    assert find_provenance(larger).trained_size == size
    assert find_provenance(convert(larger, "hf", tmp_path / "again", image_size=size)).trained_size is None
    plain = card(convert(run, "hf", tmp_path / "plain"))[1]
    assert "moving average over" not in plain and "images in training" not in plain


@pytest.mark.parametrize("damaged", ["trainer.json", "balance.json", "evaluations.jsonl"])
def test_what_cannot_be_read_is_left_out(
    damaged: str, run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (path,) = run.parent.rglob(damaged)
    path.write_bytes(b"\xff{")
    with caplog.at_level(logging.WARNING):
        out = convert(run, "hf", tmp_path / "out")
    assert f"left out of the model card: {path}" in caplog.text
    body = card(out)[1]
    told = {"trainer.json": "| steps | 7 |", "balance.json": f"| en | {A} |", "evaluations.jsonl": "xm3600"}
    assert [name for name, text in told.items() if text not in body] == (
        list(told) if damaged == "trainer.json" else [damaged]
    )
