"""Cultural diversity: Dollar Street, GeoDE and Google Landmarks v2, zero-shot and as places."""

import ast
import json
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import unquote

from mc2_hpc.errors import UserError
from mc2_hpc.evaluation.pictures import PictureFiles
from mc2_hpc.evaluation.sets.classes import DEFAULT_TEMPLATES, openai_imagenet
from mc2_hpc.evaluation.sets.files import read_csv, read_lines, shuffled
from mc2_hpc.evaluation.tasks import Classification, ClassTexts, Places

_DOLLAR_STREET = ("images_v2_imagenet_train.csv", "images_v2_imagenet_test.csv")


def dollar_street(path: Path) -> Classification:
    """Dollar Street by ImageNet's classes: both CSV files in ``path`` (the set's ``dataset_dollarstreet`` folder).

    ``imagenet_sysnet_id`` (sic) lists the right classes of a picture; ``imageRelPath`` says where it lies.
    """
    rows = [row for file in _DOLLAR_STREET for row in _dollar_street_rows(path / file)]
    names, templates = openai_imagenet()
    try:
        labels = [tuple(int(number) for number in ast.literal_eval(row["imagenet_sysnet_id"])) for row in rows]
    except (ValueError, SyntaxError, TypeError) as error:
        raise UserError(f"{path}: an imagenet_sysnet_id is not a list of class numbers ({error})") from None
    texts = ClassTexts(classes=range(len(names)), names=names, templates=templates)
    pictures = PictureFiles(path, [row["imageRelPath"] for row in rows])
    return Classification(pictures=pictures, labels=labels, languages={"en": texts})


def dollar_street_places(path: Path) -> Places:
    """Countries of Dollar Street; its own split into training and test."""
    parts = [_dollar_street_rows(path / file, "country.name") for file in _DOLLAR_STREET]
    rows = [row for part in parts for row in part]
    names = [row["imageRelPath"] for row in rows]
    order = shuffled(names).tolist()
    return Places(
        pictures=PictureFiles(path, names),
        places={"country": [row["country.name"] for row in rows]},
        train=[index for index in order if index < len(parts[0])],
        test=range(len(parts[0]), len(rows)),
    )


def _dollar_street_rows(file: Path, *columns: str) -> list[dict[str, str]]:
    return read_csv(file, ("imageRelPath", "imagenet_sysnet_id", *columns), "a file of Dollar Street's release")


def geode(path: Path) -> Classification:
    """GeoDE: ``index.csv`` (``file_path``, ``object``) and the pictures below ``images``."""
    rows = read_csv(path / "index.csv", ("file_path", "object"), "GeoDE's index")
    names = sorted({row["object"] for row in rows})
    number = {name: index for index, name in enumerate(names)}
    texts = ClassTexts(
        classes=range(len(names)), names=[name.replace("_", " ") for name in names], templates=DEFAULT_TEMPLATES
    )
    pictures = PictureFiles(path / "images", [row["file_path"] for row in rows])
    return Classification(pictures=pictures, labels=[(number[row["object"]],) for row in rows], languages={"en": texts})


def geode_places(path: Path, train: int = 20_000) -> Places:
    """Countries and regions of GeoDE: pictures shuffled, the first ``train`` to learn from."""
    rows = read_csv(path / "index.csv", ("file_path", "region", "ip_country"), "GeoDE's index")
    names = [row["file_path"] for row in rows]
    places = {"country": [row["ip_country"] for row in rows], "region": [row["region"] for row in rows]}
    return _split(PictureFiles(path / "images", names), names, places, train)


def xm3600_places(path: Path, images: str = "images", train: int = 1_800) -> Places:
    """Locales that Crossmodal-3600's pictures were chosen for (``image/locale``): half to learn from, half to test."""
    file = path / "captions.jsonl"
    rows = [json.loads(line) for line in read_lines(file, "captions.zip unpacks to it")]
    if not all("image/locale" in row for row in rows):
        raise UserError(f"{file}: a picture without 'image/locale'")
    names = [f"{row['image/key']}.jpg" for row in rows]
    return _split(PictureFiles(path / images, names), names, {"locale": [row["image/locale"] for row in rows]}, train)


def _split(pictures: PictureFiles, names: Sequence[str], places: dict[str, list[str]], train: int) -> Places:
    if not 0 < train < len(names):
        raise UserError(f"train={train}: the set has {len(names)} pictures, some have to be left to test")
    order = shuffled(names).tolist()
    return Places(pictures=pictures, places=places, train=order[:train], test=order[train:])


def gldv2(path: Path) -> Classification:
    """Google Landmarks v2, recognition: the test pictures that show a landmark, named among all such landmarks.

    Files: ``recognition_solution_v2.1.csv`` (``id``, ``landmarks``), ``train_label_to_category.csv`` (``landmark_id``,
    ``category``: a Wikimedia Commons category) and ``test/<3 folders>/<id>.jpg``.
    """
    solution = read_csv(path / "recognition_solution_v2.1.csv", ("id", "landmarks"), "the recognition ground truth")
    categories = read_csv(path / "train_label_to_category.csv", ("landmark_id", "category"), "names of the landmarks")
    name_of = {row["landmark_id"]: _landmark(row["category"]) for row in categories}
    shown = [(row["id"], [mark for mark in row["landmarks"].split() if mark in name_of]) for row in solution]
    shown = [(key, marks) for key, marks in shown if marks]
    if not shown:
        raise UserError(f"{path}: no test picture shows a landmark that train_label_to_category.csv names")
    landmarks = sorted({mark for _, marks in shown for mark in marks}, key=int)
    number = {mark: index for index, mark in enumerate(landmarks)}
    files = [f"{key[0]}/{key[1]}/{key[2]}/{key}.jpg" for key, _ in shown]
    texts = ClassTexts(
        classes=range(len(landmarks)), names=[name_of[mark] for mark in landmarks], templates=("a photo of {}.",)
    )
    return Classification(
        pictures=PictureFiles(path / "test", files),
        labels=[tuple(number[mark] for mark in marks) for _, marks in shown],
        languages={"en": texts},
        skipped={"picture_without_landmark": len(solution) - len(shown)},
    )


def _landmark(category: str) -> str:
    return unquote(category.rsplit("Category:", 1)[-1]).replace("_", " ")
