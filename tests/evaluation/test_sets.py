"""Every reader on a small sample in the exact layout that its set is published in, and with files missing."""

import csv
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mc2_hpc.errors import UserError
from mc2_hpc.evaluation.sets import READERS
from mc2_hpc.evaluation.sets.captions import caption_lines, coco, xm3600
from mc2_hpc.evaluation.sets.classes import (
    babel_imagenet,
    babel_languages,
    class_folders,
    imagenet,
    labelled_parquet,
    openai_imagenet,
)
from mc2_hpc.evaluation.sets.clip_benchmark import clip_benchmark
from mc2_hpc.evaluation.sets.culture import (
    dollar_street,
    dollar_street_places,
    geode,
    geode_places,
    gldv2,
    xm3600_places,
)
from mc2_hpc.evaluation.sets.cvqa import cvqa
from mc2_hpc.evaluation.suite import _only
from mc2_hpc.tar import write_tar


def write_csv(path, rows):
    with open(path, "w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture
def imagenet_folder(tmp_path, noise):
    """A thousand folders; the first three have two images each."""
    for number in range(1000):
        (tmp_path / "val" / f"n{10000000 + number}").mkdir(parents=True)
    for number in range(3):
        for copy in range(2):
            folder = tmp_path / "val" / f"n{10000000 + number}"
            (folder / f"ILSVRC2012_val_{copy}.JPEG").write_bytes(noise(10 * number + copy))
    return tmp_path / "val"


def test_imagenet(imagenet_folder):
    task = imagenet(imagenet_folder)
    assert task.skipped == {"class_without_image": 997}
    assert task.labels == [(0,), (0,), (1,), (1,), (2,), (2,)]
    texts = task.languages["en"]
    assert len(texts.names) == 1000 and texts.names[:2] == ["tench", "goldfish"]
    assert len(texts.templates) == 80 and all(form.count("{}") == 1 for form in texts.templates)


def test_imagenet_without_some_folders(imagenet_folder):
    (imagenet_folder / "n10000999").rmdir()
    with pytest.raises(UserError, match=r"999 folders; ImageNet has one per WordNet id, 1,000 in"):
        imagenet(imagenet_folder)


def test_openai_names_are_the_packages(open_clip):
    names, templates = openai_imagenet()
    assert names == list(open_clip.IMAGENET_CLASSNAMES)
    assert [form.replace("{}", "cat") for form in templates] == [f("cat") for f in open_clip.OPENAI_IMAGENET_TEMPLATES]


def test_babel_imagenet(imagenet_folder, tmp_path):
    (tmp_path / "labels.json").write_text(json.dumps({"DE": [[2, 0], ["Hai", "Schleie"]], "XX": [[1], ["gold"]]}))
    (tmp_path / "prompts.json").write_text(json.dumps({"DE": ["ein Foto von einem  {} ."]}))
    task = babel_imagenet(imagenet_folder, str(tmp_path / "labels.json"), str(tmp_path / "prompts.json"))
    assert list(task.languages) == ["de", "xx"]
    german = task.languages["de"]
    assert (german.classes, german.names) == ([2, 0], ["Hai", "Schleie"])
    assert german.templates == ["ein Foto von einem {} ."] and task.languages["xx"].templates == ["{}"]
    assert task.lacking == {"xx": "language_without_prompts"}
    only = _only(task, ["DE"])  # the file's own key
    assert list(only.languages) == ["de"] and only.lacking == {}  # the other one was not requested
    assert _only(task, ["xx"]).lacking == task.lacking


def test_the_real_babel_imagenet_files(shared_data):
    languages = babel_languages(shared_data / "babel_imagenet-298.json", shared_data / "babel_imagenet_prompts.json")
    assert len(languages) == 298
    assert sum(len(texts.templates) > 1 for texts in languages.values()) > 80
    assert all(form.count("{}") == 1 for texts in languages.values() for form in texts.templates)


def test_class_folders(tmp_path, noise):
    for name in ("red_fox", "cat"):
        (tmp_path / "set" / name).mkdir(parents=True)
        (tmp_path / "set" / name / "1.png").write_bytes(noise(1, kind="PNG"))
    task = class_folders(tmp_path / "set")
    assert task.languages["en"].names == ["cat", "red fox"] and task.labels == [(0,), (1,)]
    (tmp_path / "set" / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: a class without an image"):
        class_folders(tmp_path / "set")


def test_labelled_parquet(tmp_path, noise):
    table = pa.table({"key": ["a", "b"], "label": ["dog", "cat"], "jpg": [noise(0), noise(1)]})
    pq.write_table(table, tmp_path / "set.parquet")
    names, templates = {"de": ["Katze", "Hund"]}, {"de": ["{}!"]}
    task = labelled_parquet(tmp_path / "set.parquet", names, templates, ["cat", "dog"])
    assert task.labels == [(1,), (0,)] and task.images.read(1) == noise(1)
    with pytest.raises(UserError, match="label 'dog' is not among the suite's classes"):
        labelled_parquet(tmp_path / "set.parquet", names, templates, ["cat", "horse"])


def webdataset(folder, samples, **texts):
    (folder / "test").mkdir(parents=True)
    (folder / "test" / "nshards.txt").write_text("2")
    half = len(samples) // 2
    for number, part in enumerate((samples[:half], samples[half:])):
        files = ((f"s{key:04d}.{kind}", data) for key, entry in part for kind, data in entry.items())
        write_tar(folder / "test" / f"{number}.tar", files)
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    return folder


def test_clip_benchmark_classification(tmp_path, noise):
    samples = [(key, {"webp": noise(key, kind="WEBP"), "cls": str(key % 2).encode()}) for key in range(4)]
    samples.append((4, {"cls": b"0"}))  # its image is missing
    folder = webdataset(
        tmp_path, samples, classnames="cat\ndog\n", zeroshot_classification_templates="a photo of a {c}.\n{c}\n"
    )
    task = clip_benchmark(folder)
    assert task.labels == [(0,), (1,), (0,), (1,)] and task.skipped == {"incomplete_sample": 1}
    assert task.languages["en"].templates == ["a photo of a {}.", "{}"]
    assert task.images.read(2) == noise(2, kind="WEBP") and task.images.name(2) == "1.tar/s0002.webp"


def test_clip_benchmark_retrieval(tmp_path, noise):
    samples = [(key, {"jpg": noise(key), "txt": f"one {key}\ntwo {key}".encode()}) for key in range(3)]
    task = clip_benchmark(webdataset(tmp_path, samples, dataset_type="retrieval"))
    assert task.languages["en"].texts[:3] == ["one 0", "two 0", "one 1"]
    assert task.languages["en"].images == [0, 0, 1, 1, 2, 2]


def test_clip_benchmark_with_a_lost_shard(tmp_path, noise):
    samples = [(0, {"jpg": noise(0), "cls": b"0"}), (1, {"jpg": noise(1), "cls": b"x"})]
    folder = webdataset(tmp_path, samples, classnames="cat\n", zeroshot_classification_templates="{c}\n")
    with pytest.raises(UserError, match=r"the .cls beside s0001.jpg is 'x', not a class number"):
        clip_benchmark(folder)
    (folder / "test" / "1.tar").unlink()
    with pytest.raises(UserError, match=r"1\.tar: no such file .* says 2 shards"):
        clip_benchmark(folder)


@pytest.fixture
def xm3600_folder(tmp_path, image_folder):
    lines = [
        {
            "image/key": f"{number:02d}",
            "image/locale": "de" if number % 2 else "sw",
            "de": {"caption": [f"eins {number}", f"zwei {number}"], "caption/tokenized": ["x"]},
            "quz": {"caption": [f"huk {number}"]},
        }
        for number in range(10)
    ]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (tmp_path / "captions.jsonl").write_text(text, encoding="utf-8")
    return tmp_path


def test_xm3600(xm3600_folder):
    task = xm3600(xm3600_folder)
    assert list(task.languages) == ["de", "quz"]
    assert task.languages["de"].texts[2:4] == ["eins 1", "zwei 1"] and task.languages["de"].images[2:4] == [1, 1]
    places = xm3600_places(xm3600_folder, train=6)
    assert sorted([*places.train, *places.test]) == list(range(10)) and len(places.train) == 6
    assert places.places["locale"][:2] == ["sw", "de"]


def test_xm3600_says_which_image_is_missing(xm3600_folder):
    (xm3600_folder / "images" / "03.jpg").unlink()
    with pytest.raises(UserError, match=r"images/03\.jpg: image is missing \(1 of 10 are missing\)"):
        xm3600(xm3600_folder)


def test_xtd_and_flickr30k_200(tmp_path, image_folder):
    names = [f"{number:02d}.jpg" for number in range(10)]
    (tmp_path / "filenames.txt").write_text("\n".join(names) + "\n")
    for lang in ("deu_Latn", "swh_Latn"):
        lines = [f"{lang} {number} a\u2028b" if number else "" for number in range(10)]
        (tmp_path / f"{lang}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    task = caption_lines(tmp_path)
    assert list(task.languages) == ["deu_Latn", "swh_Latn"]
    assert task.languages["deu_Latn"].images == list(range(1, 10))  # an empty line is not a caption
    (tmp_path / "test_1kcaptions_ko.txt").write_text("eins\nzwei\n")
    options = {"index": "filenames.txt", "captions": "test_1kcaptions_{}.txt"}
    with pytest.raises(UserError, match=r"test_1kcaptions_ko\.txt: 2 captions for 10 images"):
        caption_lines(tmp_path, **options)


def test_coco(tmp_path, image_folder):
    record = {
        "images": [{"id": 7, "file_name": "01.jpg"}, {"id": 3, "file_name": "02.jpg"}],
        "annotations": [{"image_id": 3, "caption": " a dog "}, {"image_id": 7, "caption": "a cat"}],
    }
    (tmp_path / "captions.json").write_text(json.dumps(record))
    task = coco(tmp_path / "captions.json", str(image_folder))
    assert task.languages["en"].texts == ["a dog", "a cat"] and task.languages["en"].images == [1, 0]
    (tmp_path / "captions.json").write_text("{}")
    with pytest.raises(UserError, match="not COCO's caption annotations"):
        coco(tmp_path / "captions.json", str(image_folder))


def cvqa_table(noise, **changes):
    columns = {
        "image": [{"bytes": noise(0), "path": "a.jpg"}, {"bytes": noise(1), "path": "b.jpg"}],
        "ID": ["1_0", "2_0"],
        "Subset": ["('Spanish', 'Argentina')", "('Igbo', 'Nigeria')"],
        "Question": ["¿Qué?", "Gịnị?"],
        "Translated Question": ["What?", "What?"],
        "Options": [["a", "b", "c", "d"], ["e", "f", "g", "h"]],
        "Translated Options": [["A", "B", "C", "D"], ["E", "F", "G", "H"]],
        "Label": [2, 0],
    }
    return pa.table({**columns, **changes})


def test_cvqa(tmp_path, noise):
    (tmp_path / "data").mkdir()
    pq.write_table(cvqa_table(noise), tmp_path / "data" / "test-00000-of-00001.parquet")
    task = cvqa(tmp_path)
    first = task.variants["LOCAL"][0]
    assert first.options[2] == "¿Qué? c" and first.answer == 2 and first.group == "Spanish, Argentina"
    assert task.variants["EN"][1].options[0] == "What? E" and task.images.read(1) == noise(1)


def test_cvqa_without_answers_or_columns(tmp_path, noise):
    pq.write_table(cvqa_table(noise, Label=[9, 0]), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"question 1_0 has no correct option \(label 9\)"):
        cvqa(tmp_path)
    pq.write_table(cvqa_table(noise).drop_columns(["Subset"]), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="a.parquet: not a part of CVQA: no column 'Subset'; its columns are image, ID"):
        cvqa(tmp_path)


def test_dollar_street(tmp_path, image_folder):
    def rows(numbers):
        return [
            {
                "id": number,
                "country.name": "Peru" if number % 2 else "India",
                "imageRelPath": f"images/{number:02d}.jpg",
                "imagenet_sysnet_id": "[834, 697]" if number % 2 else "[414]",
            }
            for number in numbers
        ]

    write_csv(tmp_path / "images_v2_imagenet_train.csv", rows(range(6)))
    write_csv(tmp_path / "images_v2_imagenet_test.csv", rows(range(6, 10)))
    task = dollar_street(tmp_path)
    assert len(task.images) == 10 and task.labels[:2] == [(414,), (834, 697)]
    places = dollar_street_places(tmp_path)
    assert sorted(places.train) == list(range(6)) and list(places.test) == [6, 7, 8, 9]
    (tmp_path / "images_v2_imagenet_test.csv").unlink()
    with pytest.raises(UserError, match=r"images_v2_imagenet_test\.csv: no such file"):
        dollar_street(tmp_path)


def test_geode(tmp_path, image_folder):
    rows = [
        {
            "file_path": f"{n:02d}.jpg",
            "object": ["stove", "cleaning_equipment"][n % 2],
            "region": "Africa",
            "ip_country": "Ghana",
        }
        for n in range(10)
    ]
    write_csv(tmp_path / "index.csv", rows)
    task = geode(tmp_path)
    assert task.languages["en"].names == ["cleaning_equipment", "stove"] and task.labels[:2] == [(1,), (0,)]
    assert len(task.languages["en"].templates) == 80
    places = geode_places(tmp_path, train=4)
    assert len(places.train) == 4 and set(places.places) == {"country", "region"}
    with pytest.raises(UserError, match="train=20000: the set has 10 images"):
        geode_places(tmp_path)


def test_gldv2(tmp_path, noise):
    keys = ["0a1b2c3d4e5f6a7b", "ff00aa11bb22cc33", "1234567890abcdef"]
    for number, key in enumerate(keys):
        folder = tmp_path / "test" / key[0] / key[1] / key[2]
        folder.mkdir(parents=True)
        (folder / f"{key}.jpg").write_bytes(noise(number))
    solution = [{"id": k, "landmarks": m, "Usage": "Public"} for k, m in zip(keys, ["12 3", "", "3"], strict=True)]
    write_csv(tmp_path / "recognition_solution_v2.1.csv", solution)
    commons = "http://commons.wikimedia.org/wiki/Category:"
    names = [
        {"landmark_id": 3, "category": f"{commons}Haus_am_Horn"},
        {"landmark_id": 12, "category": f"{commons}Gr%C3%BCn"},
    ]
    write_csv(tmp_path / "train_label_to_category.csv", names)
    task = gldv2(tmp_path)
    assert task.languages["en"].names == ["Grün", "Haus am Horn"] and task.languages["en"].templates == ["{}"]
    assert task.labels == [(0, 1), (1,)] and task.skipped == {"image_without_landmark": 1}


@pytest.mark.parametrize("name", sorted(READERS))
def test_a_missing_set_is_named(name, tmp_path):
    import inspect

    parameters = list(inspect.signature(READERS[name].read).parameters.values())[1:]
    needed = [p.name for p in parameters if p.default is inspect.Parameter.empty]
    values = {"names": {}, "templates": {}, "classes": []}
    options = {option: values.get(option, str(tmp_path / option)) for option in needed}
    with pytest.raises(UserError, match=str(tmp_path / "nowhere")):
        READERS[name].read(tmp_path / "nowhere", **options)
