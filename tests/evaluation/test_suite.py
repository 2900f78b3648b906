"""``mc2 eval --suite``: a YAML file to numbers, tables and a page, for our checkpoints and those of others."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml

from mc2_hpc.cli import main
from mc2_hpc.conversion.convert import convert
from mc2_hpc.errors import UserError
from mc2_hpc.evaluation.results import markdown
from mc2_hpc.evaluation.suite import load_suite

CONFIGS = Path(__file__).parents[2] / "configs" / "eval"


@pytest.fixture
def suite_file(tmp_path, image_folder):
    """Captions in two languages, folders of classes, and a missing set."""
    (tmp_path / "filenames.txt").write_text("".join(f"{n:02d}.jpg\n" for n in range(10)))
    for lang in ("de", "en"):
        (tmp_path / f"{lang}.txt").write_text("".join(f"{lang} & <caption> {n}\n" for n in range(10)))
    for number in range(10):
        folder = tmp_path / "classes" / f"class_{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.jpg").write_bytes((image_folder / f"{number:02d}.jpg").read_bytes())
    suite = {
        "root": str(tmp_path),
        "sets": {
            "xtd10": {"reader": "caption_lines", "path": "."},
            "folders": {"reader": "class_folders", "path": "classes"},
            "xm3600": {"reader": "xm3600", "path": "not/there"},
        },
    }
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(suite))
    return tmp_path / "suite.yaml"


def evaluate(checkpoint, suite_file, out, *more):
    assert main(["eval", str(checkpoint), "--suite", str(suite_file), "--out", str(out), *more]) == 0
    return json.loads((out / "results.json").read_text(encoding="utf-8"))


def test_numbers_tables_and_page(tiny_checkpoint, suite_file, tmp_path, capsys, parse_page):
    found = evaluate(tiny_checkpoint, suite_file, tmp_path / "out")
    assert set(found["sets"]["xtd10"]["groups"]) == {"de", "en"} and found["sets"]["xtd10"]["n"] == {"de": 10, "en": 10}
    assert found["sets"]["folders"]["images"] == 10 and 0 <= found["sets"]["folders"]["mean"]["top1"] <= 1
    assert "not/there/captions.jsonl: no such file" in found["sets"]["xm3600"]["error"]
    assert all(entry["protocol"] for entry in found["sets"].values()) and len(found["identity"]) == 64
    table = (tmp_path / "out" / "results.md").read_text(encoding="utf-8")
    assert "| xm3600 | not scored |" in table and "| XTD-10 T2I |" in table and table in capsys.readouterr().out
    assert "all 30 samples scored" in table  # 10 captions in each of 2 languages, 10 images in folders
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "&amp; &lt;caption&gt;" in page and "<caption>" not in page
    hits, missed = page.count('<div class="hit "') + page.count('<div class="hit right"'), page.count("its own, missed")
    assert hits == 2 * 5 and page.count("✓ its own") + missed == 2
    assert page.count('src="data:image/jpeg;base64,') == hits + missed
    assert not re.search(r'(src|href)="(?!data:)', page)
    parse_page(page)


def test_features_are_kept_between_runs(tiny_checkpoint, suite_file, tmp_path):
    first = evaluate(tiny_checkpoint, suite_file, tmp_path / "out")
    kept = sorted(path.name for path in (tmp_path / "out" / "features").iterdir())
    assert len(kept) == 2
    again = evaluate(tiny_checkpoint, suite_file, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out" / "features").iterdir()) == kept
    for name in ("xtd10", "folders"):
        assert first["sets"][name]["groups"] == again["sets"][name]["groups"]


@pytest.mark.parametrize("kind", ["open_clip", "hf"])
def test_others_checkpoints_get_the_same_numbers(kind, tiny_checkpoint, suite_file, tmp_path):
    convert(tiny_checkpoint, kind, tmp_path / kind)
    ours = evaluate(tiny_checkpoint, suite_file, tmp_path / "ours")
    theirs = evaluate(tmp_path / kind, suite_file, tmp_path / "theirs")
    for name in ("xtd10", "folders"):
        assert ours["sets"][name]["groups"] == theirs["sets"][name]["groups"]


def test_only_some_languages_by_an_override(tiny_checkpoint, suite_file, tmp_path):
    found = evaluate(tiny_checkpoint, suite_file, tmp_path / "out", "sets.xtd10.languages=[de]")
    assert set(found["sets"]["xtd10"]["groups"]) == {"de"}
    found = evaluate(tiny_checkpoint, suite_file, tmp_path / "out", "sets.xtd10.languages=[fr]")
    assert "no language 'fr' in the set; it has de, en" in found["sets"]["xtd10"]["error"]


def test_only_languages_that_were_asked_for_are_missed(tiny_checkpoint, suite_file, tmp_path):
    (tmp_path / "fr.txt").write_text("\n" * 10)
    found = evaluate(tiny_checkpoint, suite_file, tmp_path / "out")["sets"]["xtd10"]
    assert found["skipped"] == {"language_without_captions": 1} and set(found["groups"]) == {"de", "en"}
    found = evaluate(tiny_checkpoint, suite_file, tmp_path / "out", "sets.xtd10.languages=[EN,De]")["sets"]["xtd10"]
    assert found["skipped"] == {} and set(found["groups"]) == {"de", "en"}
    found = evaluate(tiny_checkpoint, suite_file, tmp_path / "out", "sets.xtd10.languages=[de,fr]")["sets"]["xtd10"]
    assert found["skipped"] == {"language_without_captions": 1} and set(found["groups"]) == {"de"}
    found = evaluate(tiny_checkpoint, suite_file, tmp_path / "out", "sets.xtd10.languages=[fr]")["sets"]["xtd10"]
    assert found["error"] == "languages: none of fr can be scored (language_without_captions)"


def test_another_resize_is_recorded_and_computed_anew(tiny_checkpoint, suite_file, tmp_path):
    own = evaluate(tiny_checkpoint, suite_file, tmp_path / "out")
    squash = evaluate(tiny_checkpoint, suite_file, tmp_path / "out", "eval_resize=squash")
    assert (own["eval_resize"], squash["eval_resize"]) == ("shortest", "squash")
    assert own["identity"] != squash["identity"]
    assert len(list((tmp_path / "out" / "features").iterdir())) == 2 * 2  # two sets, cached for both
    values = yaml.safe_load(suite_file.read_text())
    suite_file.write_text(yaml.safe_dump({**values, "eval_resize": "squash"}))
    assert evaluate(tiny_checkpoint, suite_file, tmp_path / "out")["identity"] == squash["identity"]
    with pytest.raises(UserError, match="eval_resize=crop: choose one of shortest, squash, longest"):
        load_suite(suite_file, ["eval_resize=crop"])


def test_a_report_names_the_model_and_what_each_number_is_of(tiny_checkpoint, suite_file, tmp_path):
    import shutil

    trained = tmp_path / "step-1200"
    shutil.copytree(tiny_checkpoint, trained)
    (trained / "trainer.json").write_text(json.dumps({"step": 1200}))
    found = evaluate(trained, suite_file, tmp_path / "out")
    assert found["model"]["step"] == 1200 and found["model"]["format"] == "mc2"
    captions, folders = found["sets"]["xtd10"], found["sets"]["folders"]
    assert captions["chance"]["text_to_image_R@1"] == pytest.approx(0.1) and folders["chance"] == {
        "top1": 0.5,
        "top5": 1,
    }
    ends = captions["spread"]["text_to_image_R@5"]
    numbers = {lang: row["text_to_image_R@5"] for lang, row in captions["groups"].items()}
    assert (ends["lowest"], ends["highest"]) == (min(numbers.values()), max(numbers.values()))
    assert numbers[ends["of"]] == ends["lowest"] and numbers[ends["and_of"]] == ends["highest"]
    table = (tmp_path / "out" / "results.md").read_text(encoding="utf-8")
    assert table.startswith("step-1200: step 1,200, ") and "32 px (shortest), 24 tokens" in table
    assert "| folders | top1 |" in table and "| 50.0 |  | 10 |" in table
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "step 1,200" in page and "chance 50.0" in page and "Of 20 in total." in page


def test_nothing_to_score_is_an_error(tiny_checkpoint, suite_file, tmp_path, capsys):
    words = ["eval", str(tiny_checkpoint), "--suite", str(suite_file), f"root={tmp_path / 'nowhere'}"]
    assert main(words) == 2
    assert "none of the sets could be scored" in capsys.readouterr().err


@pytest.mark.parametrize(
    "entry, message",
    [
        ({"reader": "nothing", "path": "x"}, "sets.a: unknown reader 'nothing'; choose one of imagenet"),
        ({"reader": "coco", "path": "x"}, "sets.a: coco needs the option 'images'"),
        (
            {"reader": "xm3600", "path": "x", "options": {"image": "y"}},
            "xm3600 has no option 'image'; it has images",
        ),
        ({"reader": "xm3600", "path": "x", "color": "red"}, "color"),
        ({"reader": "xm3600"}, "sets.a.path"),
        (
            {"reader": "coco", "path": "s3://x/y.json", "options": {"images": "y"}},
            "sets.a.path: coco reads files on this machine; s3://x/y.json is an address",
        ),
    ],
)
def test_bad_suites_are_named(entry, message, tmp_path):
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump({"sets": {"a": entry}}))
    with pytest.raises(UserError, match=re.escape(message)):
        load_suite(tmp_path / "suite.yaml")


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_suites_can_be_read(path):
    suite = load_suite(path, ["root=/elsewhere"])
    assert suite.sets and all(
        "/elsewhere" in str(v) for c in suite.sets.values() for v in c.options.values() if "/" in str(v)
    )


def test_the_papers_row_stands_below_ours():
    sets = {"imagenet": {"mean": {"top1": 0.5, "top5": 0.9}, "skipped": {}}}
    table = markdown("mine", sets, {"H/14 WW 29B": {"ImageNet": 81.3}, "other": {}})
    assert "| mine | 50.0 |\n| H/14 WW 29B | 81.3 |\n| other | - |" in table


def test_real_photographs_named_in_many_languages(tiny_checkpoint, shared_data, ranks):
    """CIFAR-10 with Babel-ImageNet's words: the predictions in each language equal those of a plain product."""
    import pyarrow.parquet as pq

    from mc2_hpc.evaluation.encoder import Encoder
    from mc2_hpc.evaluation.images import ImageColumn
    from mc2_hpc.evaluation.scoring import class_weights, score
    from mc2_hpc.evaluation.sets.classes import babel_languages
    from mc2_hpc.evaluation.tasks import Classification, ClassTexts
    from mc2_hpc.evaluation.zero_shot import predict

    in_imagenet = {"frog": 30, "dog": 207, "cat": 281, "horse": 339, "airplane": 404, "truck": 867, "ship": 510}
    babel = babel_languages(shared_data / "babel_imagenet-298.json", shared_data / "babel_imagenet_prompts.json")
    languages = {}
    for lang, texts in babel.items():
        named = dict(zip(texts.classes, texts.names, strict=True))
        own = {number: named[number] for number in in_imagenet.values() if number in named}
        if len(own) >= 5 and len(texts.templates) > 1:
            languages[lang] = ClassTexts(classes=list(own), names=list(own.values()), templates=texts.templates[:3])
    assert len(languages) >= 10
    table = pq.read_table(shared_data / "cifar10-test.parquet").slice(0, 300)
    table = table.filter([label in in_imagenet for label in table["label"].to_pylist()])
    task = Classification(
        images=ImageColumn(table["jpg"], table["key"].to_pylist()),
        labels=[(in_imagenet[label],) for label in table["label"].to_pylist()],
        languages=languages,
    )
    encoder = Encoder.load(tiny_checkpoint, ranks)
    images = encoder.images(task.images)
    found = score(task, images, encoder)
    assert set(found.groups) == set(languages) and images.usable.all()
    for lang, texts in languages.items():
        weights = class_weights(texts, lang, encoder)
        shown = [index for index, (label,) in enumerate(task.labels) if label in texts.classes]
        naive = (images.features[shown] @ weights.T).argmax(1)
        assert torch.equal(predict(images.features[shown], weights)[:, 0], naive)
        right = [texts.classes[int(best)] == task.labels[i][0] for best, i in zip(naive, shown, strict=True)]
        assert found.groups[lang]["top1"] == pytest.approx(sum(right) / len(right))
