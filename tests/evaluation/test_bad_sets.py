"""``mc2 eval --suite`` on faulty sets: a one-line error that names the fault, or a count beside the number."""

import json
import re
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from mc2_hpc.cli import main
from mc2_hpc.tar import write_tar


@pytest.fixture
def put(tmp_path, noise):
    """``put(path, content)`` writes a file below the suite's root, by default an image."""

    def write(path, content=None):
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        data = noise(len(path)) if content is None else content
        file.write_bytes(data.encode() if isinstance(data, str) else data)
        return file

    return write


@pytest.fixture
def evaluate(tiny_checkpoint, tmp_path):
    """``evaluate(sets)`` runs the command on these sets and an intact one; returns their results and the table."""

    def run(sets):
        sets = {"whole": {"reader": "class_folders", "path": "whole"}, **sets}
        (tmp_path / "suite.yaml").write_text(yaml.safe_dump({"root": str(tmp_path), "sets": sets}))
        out = tmp_path / "out"
        assert main(["eval", str(tiny_checkpoint), "--suite", str(tmp_path / "suite.yaml"), "--out", str(out)]) == 0
        return json.loads((out / "results.json").read_text())["sets"], (out / "results.md").read_text()

    return run


def webdataset(put, folder, labels=(0, 1), names="cat\ndog\n", templates="a {c}.\n", shards="1", kind="cls"):
    put(f"{folder}/test/nshards.txt", shards)
    put(f"{folder}/classnames.txt", names)
    put(f"{folder}/zeroshot_classification_templates.txt", templates)
    image = put("whole/cat/1.jpg").read_bytes()
    pairs = [(f"s{n}.jpg", image, f"s{n}.{kind}", b"%d" % label) for n, label in enumerate(labels)]
    files = (file for jpg, data, other, label in pairs for file in ((jpg, data), (other, label)))
    write_tar(put(f"{folder}/test/0.tar", ""), files)


def test_each_fault_is_one_line_that_names_it(put, evaluate, tmp_path):
    for name in ("cat", "dog"):
        put(f"whole/{name}/1.jpg")
    sets, expected = {}, {}

    def fault(name, reader, message, path="", **options):
        sets[name] = {"reader": reader, "path": path or name, "options": options}
        expected[name] = message

    root = str(tmp_path)
    fault("missing", "geode", r"missing/index\.csv: no such file or folder; GeoDE's index")
    put("file", "x")
    fault("a_file", "class_folders", r"file: not a folder; one folder per class", path="file")
    put("empty_class/cat/1.jpg")
    (tmp_path / "empty_class" / "dog").mkdir()
    fault("empty_class", "class_folders", r"empty_class/dog: a class without an image")
    put("two/names.txt", "cat\n\n")
    fault("empty_name", "class_folders", r"class 1 has an empty name", path="whole", names=f"{root}/two/names.txt")
    put("two/three.txt", "cat\ndog\nowl\n")
    fault("more_names", "class_folders", r"3 names for the 2 folders", path="whole", names=f"{root}/two/three.txt")
    put("two/templates.txt", "a photo\n")
    fault("template", "class_folders", r"write exactly one \{\}", path="whole", templates=f"{root}/two/templates.txt")
    fault("metric", "class_folders", r"metric 'f1': choose one of accuracy", path="whole", metric="f1")
    put("bytes.txt", b"\xff\xfe\xfa")
    fault("not_utf8", "class_folders", r"bytes\.txt: not UTF-8", path="whole", names=f"{root}/bytes.txt")
    for number in range(1000):
        (tmp_path / "by_name" / f"class{number:03d}").mkdir(parents=True)
    fault("by_name", "imagenet", r"ImageNet has one per WordNet id, 1,000 in total")

    image = put("p.jpg").read_bytes()
    pq.write_table(pa.table({"key": ["a"], "label": ["cat"], "jpg": [image]}), tmp_path / "set.parquet")
    pq.write_table(pa.table({"key": ["a"], "label": ["cat"]}), tmp_path / "columns.parquet")
    pq.write_table(pa.table({"key": ["a"], "label": ["cat"], "jpg": ["path.jpg"]}), tmp_path / "text.parquet")
    pq.write_table(pa.table({"key": ["a"], "label": ["cat"], "jpg": [image]}).slice(1), tmp_path / "rows.parquet")
    put("not.parquet", "x")
    words = {"classes": ["cat"], "names": {"de": ["Katze"]}, "templates": {"en": ["{}"]}}
    fault("no_prompts", "labelled_parquet", r"no prompts for language 'de' .*en\)", path="set.parquet", **words)
    words = {**words, "templates": {"de": ["{}"]}}
    fault("no_column", "labelled_parquet", r"no column 'jpg'; its columns are", path="columns.parquet", **words)
    fault("no_bytes", "labelled_parquet", r"images should be binary, not string", path="text.parquet", **words)
    fault("no_rows", "labelled_parquet", r"rows\.parquet: no images in it", path="rows.parquet", **words)
    fault("no_parquet", "labelled_parquet", r"not\.parquet: cannot be read as Parquet", path="not.parquet", **words)

    webdataset(put, "wds_label", labels=(0, 2))
    fault("wds_label", "clip_benchmark", r"s1\.jpg is of class 2, but there are 2 class names")
    webdataset(put, "wds_kind", kind="npy")
    fault("wds_kind", "clip_benchmark", r"no sample in its tars has an image and a \.cls \(2 incomplete\)")
    webdataset(put, "wds_multi")
    put("wds_multi/dataset_type.txt", "multilabel\n")
    fault("wds_multi", "clip_benchmark", r"'multilabel' sets are not scored")
    webdataset(put, "wds_tar")
    put("wds_tar/test/0.tar", "not a tar" * 100)
    fault("wds_tar", "clip_benchmark", r"wds_tar/test/0\.tar: ")
    webdataset(put, "wds_shards", shards="two")
    fault("wds_shards", "clip_benchmark", r"nshards\.txt: 'two' is not a number of shards")
    webdataset(put, "wds_digits", shards="9" * 5000)
    fault("wds_digits", "clip_benchmark", r"nshards\.txt: '9+' is not a number of shards")
    webdataset(put, "wds_form", templates="a photo\n")
    fault("wds_form", "clip_benchmark", r"prompt 'a photo' .* write exactly one")

    put("xm/captions.jsonl", '{"image/key": "a", "de": {"caption": ["eins"]}}\n["b"]\n')
    fault("xm", "xm3600", r"captions\.jsonl: line 2: not an image of Crossmodal-3600")
    fault("xm_places", "xm3600_places", r"captions\.jsonl: line 2: not an image", path="xm")
    put("xm_null/captions.jsonl", '{"image/key": "a", "de": {"caption": [null]}}\n')
    fault("xm_null", "xm3600", r"line 1: .*expected text, found null")
    put("xm_text/captions.jsonl", '{"image/key": "a", "de": {"caption": "eins"}}\n')
    fault("xm_text", "xm3600", r"line 1: .*expected a list, found text")
    put("xm_list/captions.jsonl", '{"image/key": "a", "de": ["eins"]}\n')
    fault("xm_list", "xm3600", r"line 1: .*expected an object, found a list")
    put("lines/filenames.txt", "a.jpg\nb.jpg\n")
    put("lines/de.txt", "eins\n")
    fault("lines", "caption_lines", r"lines/de\.txt: 1 captions for 2 images")
    put("coco.json", "[]")
    fault("coco", "coco", r"coco\.json: not COCO's caption annotations", path="coco.json", images=root)
    images = [{"id": 1, "file_name": "a.jpg"}]
    for name, change, message in (
        ("number", {"caption": 7}, r"\.caption: expected text, found a whole number"),
        ("boolean", {"image_id": True}, r"\.image_id: expected .*, found true or false"),
        ("astray", {"image_id": 2}, "a caption of image 2, which is not among the images"),
    ):
        row = {"image_id": 1, "caption": "a", **change}
        put(f"coco_{name}.json", json.dumps({"images": images, "annotations": [row]}))
        fault(f"coco_{name}", "coco", message, path=f"coco_{name}.json", images=root)
    for number in range(1000):
        (tmp_path / "ids" / f"n{10000000 + number}").mkdir(parents=True)
    put("ids/n10000000/1.JPEG")
    put("prompts.json", '{"DE": ["{}"]}')
    for name, labels, message in (
        ("names", {"DE": [[0], "Schleie"]}, r"\$\.DE\[1\]: expected a list, found text"),
        ("boolean", {"DE": [[True], ["Schleie"]]}, "expected a whole number, found true or false"),
        ("class", {"DE": [[1000], ["Schleie"]]}, "<= 999"),
        ("short", {"DE": [[0, 1], ["Schleie"]]}, "DE has 2 classes and 1 names"),
    ):
        put(f"labels_{name}.json", json.dumps(labels))
        options = {"labels": f"{root}/labels_{name}.json", "prompts": f"{root}/prompts.json"}
        fault(f"babel_{name}", "babel_imagenet", message, path="ids", **options)

    put("ds/images_v2_imagenet_train.csv", "imageRelPath,imagenet_sysnet_id\na.jpg,[1000]\n")
    put("ds/images_v2_imagenet_test.csv", "imageRelPath,imagenet_sysnet_id\nb.jpg,[1]\n")
    fault("ds", "dollar_street", r"imagenet_sysnet_id of a\.jpg is '\[1000\]'")
    fault("ds_places", "dollar_street_places", r"no column 'country\.name'", path="ds")
    put("geo/index.csv", "file_path,object\na.jpg\n")
    fault("geo", "geode", r"geo/index\.csv: row 1 has too few cells")
    put("geo_none/index.csv", "file_path,object\n")
    fault("geo_none", "geode", r"geo_none/index\.csv: no rows")
    put("geo_gone/index.csv", "file_path,object\na.jpg,stove\n")
    fault("geo_gone", "geode", r"images/a\.jpg: image is missing \(1 of 1 are missing\)")
    put("gl/recognition_solution_v2.1.csv", "id,landmarks,Usage\nabc,7,Public\n")
    put("gl/train_label_to_category.csv", "landmark_id,category\n8,Category:X\n")
    fault("gl", "gldv2", r"no test image shows a landmark")
    (tmp_path / "cvqa").mkdir()
    fault("cvqa", "cvqa", r"cvqa: no \*\.parquet;")

    found, table = evaluate(sets)
    assert "error" not in found["whole"]
    for name, message in expected.items():
        error = found[name].get("error", "")
        assert re.search(message, error), f"{name}: {error or found[name]}"
        assert "\n" not in error and f"| {name} | not scored | " in table


def test_what_is_left_out_is_counted_in_the_table(put, evaluate, tmp_path):
    for name in ("cat", "dog"):
        put(f"whole/{name}/1.jpg")
    put("whole/cat/broken.jpg", b"\xff\xd8\xff not an image")
    webdataset(put, "wds")
    write_tar(tmp_path / "wds" / "test" / "1.tar", [("s9.cls", b"0")])
    put("wds/test/nshards.txt", "2")
    put("xm/captions.jsonl", '{"image/key": "a", "de": {"caption": ["eins"]}, "quz": {"caption": [" "]}}\n')
    put("xm/images/a.jpg")
    (tmp_path / "imagenet").mkdir()
    for number in range(1000):
        (tmp_path / "imagenet" / f"n{10000000 + number}").mkdir()
    put("imagenet/n10000000/1.JPEG")
    put("labels.json", json.dumps({"DE": [[0], ["Schleie"]], "XX": [[0, 1], ["a", "b"]], "YY": [[1], ["b"]]}))
    put("prompts.json", json.dumps({"DE": ["ein {}."]}))
    options = {"labels": str(tmp_path / "labels.json"), "prompts": str(tmp_path / "prompts.json")}
    found, table = evaluate(
        {
            "wds": {"reader": "clip_benchmark", "path": "wds"},
            "xm": {"reader": "xm3600", "path": "xm"},
            "babel": {"reader": "babel_imagenet", "path": "imagenet", "options": options},
        }
    )
    assert {name: entry.get("skipped", entry) for name, entry in found.items()} == {
        "whole": {"image_undecodable": 1},
        "wds": {"incomplete_sample": 1},
        "xm": {"language_without_captions": 1},
        "babel": {"class_without_image": 999, "language_without_prompts": 2, "language_without_images": 1},
    }
    assert found["whole"]["n"] == {"en": 2} and "| whole | top1 |" in table and "image_undecodable 1 |" in table


def test_a_checkpoint_without_its_tokenizer_is_one_line(tiny_checkpoint, tmp_path, put, capsys):
    put("whole/cat/1.jpg")
    shutil.copytree(tiny_checkpoint, tmp_path / "bare")
    (tmp_path / "bare" / "tokenizer.model").unlink()
    suite = put("suite.yaml", f"root: {tmp_path}\nsets: {{whole: {{reader: class_folders, path: whole}}}}\n")
    assert main(["eval", str(tmp_path / "bare"), "--suite", str(suite)]) == 2
    error = capsys.readouterr().err
    assert "no tokenizer.model beside the weights" in error and error.count("\n") == 1
