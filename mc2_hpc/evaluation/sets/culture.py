"""Cultural diversity: Dollar Street, GeoDE and Google Landmarks v2, zero-shot and as places."""

import ast
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import unquote

from mc2_hpc.errors import UserError
from mc2_hpc.evaluation.images import ImageFiles
from mc2_hpc.evaluation.sets.captions import xm3600_images
from mc2_hpc.evaluation.sets.classes import BARE, openai_imagenet
from mc2_hpc.evaluation.sets.files import read_csv, shuffled
from mc2_hpc.evaluation.tasks import Classification, ClassTexts, Places

_DOLLAR_STREET = ("images_v2_imagenet_train.csv", "images_v2_imagenet_test.csv")


def dollar_street(path: Path) -> Classification:
    """Dollar Street with ImageNet's classes: both CSV files in ``path`` (the set's ``dataset_dollarstreet`` folder).

    ``imagenet_sysnet_id`` (sic) lists the correct classes of an image; ``imageRelPath`` is its path.
    """
    rows = [row for file in _DOLLAR_STREET for row in _dollar_street_rows(path / file)]
    labels = [_imagenet_classes(row, path) for row in rows]
    names, templates = openai_imagenet()
    texts = ClassTexts(classes=range(len(names)), names=names, templates=templates)
    images = ImageFiles(path, [row["imageRelPath"] for row in rows])
    return Classification(images=images, labels=labels, languages={"en": texts})


def _imagenet_classes(row: dict[str, str], path: Path) -> tuple[int, ...]:
    try:
        found = tuple(int(number) for number in ast.literal_eval(row["imagenet_sysnet_id"]))
    except (ValueError, SyntaxError, TypeError):
        found = ()
    if not found or not set(found) <= set(range(1000)):
        raise UserError(
            f"{path}: imagenet_sysnet_id of {row['imageRelPath']} is {row['imagenet_sysnet_id']!r}, not a list of"
            " ImageNet's class numbers"
        )
    return found


def dollar_street_places(path: Path) -> Places:
    """Countries of Dollar Street, with its own training and test split."""
    parts = [_dollar_street_rows(path / file, "country.name") for file in _DOLLAR_STREET]
    rows = [row for part in parts for row in part]
    names = [row["imageRelPath"] for row in rows]
    order = shuffled(names).tolist()
    return Places(
        images=ImageFiles(path, names),
        places={"country": [row["country.name"] for row in rows]},
        train=[index for index in order if index < len(parts[0])],
        test=range(len(parts[0]), len(rows)),
    )


def _dollar_street_rows(file: Path, *columns: str) -> list[dict[str, str]]:
    return read_csv(file, ("imageRelPath", "imagenet_sysnet_id", *columns), "a file of Dollar Street's release")


def geode(path: Path) -> Classification:
    """GeoDE: ``index.csv`` (``file_path``, ``object``) and the images below ``images``.

    Class names are those of the index, unchanged, in ImageNet's 80 templates.
    """
    rows = read_csv(path / "index.csv", ("file_path", "object"), "GeoDE's index")
    names = sorted({row["object"] for row in rows})
    number = {name: index for index, name in enumerate(names)}
    texts = ClassTexts(classes=range(len(names)), names=names, templates=openai_imagenet()[1])
    images = ImageFiles(path / "images", [row["file_path"] for row in rows])
    return Classification(images=images, labels=[(number[row["object"]],) for row in rows], languages={"en": texts})


def geode_places(path: Path, train: int = 20_000) -> Places:
    """Countries and regions of GeoDE: images are shuffled, and the first ``train`` are for training."""
    rows = read_csv(path / "index.csv", ("file_path", "region", "ip_country"), "GeoDE's index")
    names = [row["file_path"] for row in rows]
    places = {"country": [row["ip_country"] for row in rows], "region": [row["region"] for row in rows]}
    return _split(ImageFiles(path / "images", names), names, places, train)


def xm3600_places(path: Path, images: str = "images", train: int = 1_800) -> Places:
    """Locales that Crossmodal-3600's images were chosen for (``image/locale``): half for training, half for testing."""
    rows = xm3600_images(path)
    locales = [row.locale for row in rows if row.locale is not None]
    if len(locales) < len(rows):
        raise UserError(f"{path / 'captions.jsonl'}: an image without 'image/locale'")
    names = [f"{row.key}.jpg" for row in rows]
    return _split(ImageFiles(path / images, names), names, {"locale": locales}, train)


def _split(images: ImageFiles, names: Sequence[str], places: dict[str, list[str]], train: int) -> Places:
    if not 0 < train < len(names):
        raise UserError(f"train={train}: the set has {len(names)} images, and some must be left for testing")
    order = shuffled(names).tolist()
    return Places(images=images, places=places, train=order[:train], test=order[train:])


def gldv2(path: Path) -> Classification:
    """Google Landmarks v2, recognition: test images that show a landmark, classified among all such landmarks.

    Files: ``recognition_solution_v2.1.csv`` (``id``, ``landmarks``), ``train_label_to_category.csv`` (``landmark_id``,
    ``category``: a Wikimedia Commons category) and ``test/<3 folders>/<id>.jpg``. A landmark's name has no template.
    """
    solution = read_csv(path / "recognition_solution_v2.1.csv", ("id", "landmarks"), "the recognition ground truth")
    categories = read_csv(path / "train_label_to_category.csv", ("landmark_id", "category"), "names of the landmarks")
    name_of = {row["landmark_id"]: _landmark(row["category"]) for row in categories}
    shown = [(row["id"], [mark for mark in row["landmarks"].split() if mark in name_of]) for row in solution]
    shown = [(key, marks) for key, marks in shown if marks]
    if not shown:
        raise UserError(f"{path}: no test image shows a landmark that train_label_to_category.csv names")
    landmarks = sorted({mark for _, marks in shown for mark in marks})
    number = {mark: index for index, mark in enumerate(landmarks)}
    files = [f"{key[0]}/{key[1]}/{key[2]}/{key}.jpg" for key, _ in shown]
    texts = ClassTexts(classes=range(len(landmarks)), names=[name_of[mark] for mark in landmarks], templates=BARE)
    return Classification(
        images=ImageFiles(path / "test", files),
        labels=[tuple(number[mark] for mark in marks) for _, marks in shown],
        languages={"en": texts},
        skipped={"image_without_landmark": len(solution) - len(shown)},
    )


def _landmark(category: str) -> str:
    return unquote(category.rsplit("Category:", 1)[-1]).replace("_", " ")
