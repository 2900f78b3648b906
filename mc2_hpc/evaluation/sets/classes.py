"""Classification sets: ImageNet, Babel-ImageNet, folders of classes, labelled Parquet."""

import importlib.util
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Annotated

import msgspec

from mc2_hpc.errors import UserError
from mc2_hpc.evaluation.images import ImageColumn, ImageFiles
from mc2_hpc.evaluation.prompts import templates_of
from mc2_hpc.evaluation.sets.files import (
    MOST_BYTES,
    encoded_images,
    images_below,
    read_lines,
    read_parquet,
    required,
    subfolders,
)
from mc2_hpc.evaluation.tasks import Classification, ClassTexts
from mc2_hpc.reading.json_file import read_json
from mc2_hpc.reading.parquet_file import ANY, TEXT_OR_INTEGER

DEFAULT_TEMPLATES = ("a photo of a {}.",)
_Labels = tuple[list[Annotated[int, msgspec.Meta(ge=0, le=999)]], list[str]]
"""Classes of ImageNet and their names, one for each."""
BARE = ["{}"]
"""Just the name, for languages without prompts."""


def imagenet(path: Path) -> Classification:
    """ILSVRC 2012's validation images as ``<path>/<WordNet id>/*.JPEG``, 1,000 folders in the order of the classes.

    Class names and the 80 templates are OpenAI's, from the package open_clip_torch.
    """
    images, labels, skipped = _imagenet_images(path)
    names, templates = openai_imagenet()
    texts = ClassTexts(classes=range(len(names)), names=names, templates=templates)
    return Classification(images=images, labels=labels, languages={"en": texts}, skipped=skipped)


def babel_imagenet(path: Path, labels: str, prompts: str) -> Classification:
    """ImageNet's images with Babel-ImageNet's classes in up to 298 languages.

    Args:
        path: as for :func:`imagenet`.
        labels: ``babel_imagenet-298.json``: ``{LANGUAGE: [[class indices], [names]]}``.
        prompts: ``{LANGUAGE: [templates with {}]}``; a language without any uses just ``{}``, and is counted.
    """
    images, right, skipped = _imagenet_images(path)
    languages = babel_languages(Path(labels), Path(prompts))
    lacking = {lang: "language_without_prompts" for lang, texts in languages.items() if texts.templates == BARE}
    return Classification(images=images, labels=right, languages=languages, skipped=skipped, lacking=lacking)


def babel_languages(labels: Path, prompts: Path) -> dict[str, ClassTexts]:
    """Classes, names and templates of each language of Babel-ImageNet's files, by lower-case code.

    Raises:
        UserError: a file is missing or has another format.
    """
    what = "Babel-ImageNet's prompts by language"
    templates = read_json(required(prompts, what), dict[str, list[str]], most=MOST_BYTES, what=what)
    languages = {}
    what = "Babel-ImageNet's labels by language"
    for lang, entry in read_json(required(labels, what), dict[str, _Labels], most=MOST_BYTES, what=what).items():
        classes, names = entry
        if not len(classes) == len(names) > 0:
            raise UserError(f"{labels}: {lang} has {len(classes)} classes and {len(names)} names; one name per class")
        if len(set(classes)) != len(classes):
            raise UserError(f"{labels}: {lang} has a class twice")
        # The templates have a space on each side of the braces, which a name does not need.
        forms = [" ".join(form.split()) for form in templates.get(lang, BARE)]
        languages[lang.lower()] = ClassTexts(classes=classes, names=names, templates=forms)
    return dict(sorted(languages.items()))


def _imagenet_images(path: Path) -> tuple[ImageFiles, list[tuple[int, ...]], dict[str, int]]:
    """Images, their labels, and the count of empty folders, if there are any."""
    folders = subfolders(path, "ImageNet's validation folders")
    if len(folders) != 1000 or not all(re.fullmatch(r"n\d{8}", folder) for folder in folders):
        raise UserError(f"{path}: {len(folders)} folders; ImageNet has one per WordNet id, 1,000 in total (n01440764)")
    files, labels = _labelled(path, folders)
    empty = len(folders) - len(set(labels))
    return ImageFiles(path, files), labels, {"class_without_image": empty} if empty else {}


def _labelled(path: Path, folders: Sequence[str]) -> tuple[list[str], list[tuple[int, ...]]]:
    """All images below the class folders, and their labels."""
    number = {folder: (index,) for index, folder in enumerate(folders)}
    files = [file for file in images_below(path) if Path(file).parts[0] in number]
    return files, [number[Path(file).parts[0]] for file in files]


def class_folders(path: Path, names: str = "", templates: str = "", metric: str = "accuracy") -> Classification:
    """``<path>/<class>/<image>``.

    Args:
        names: file with one class name per line, in the folders' sorted order; by default the folders' own names, with
            ``_`` for a space.
        templates: file with one template per line, each with one ``{}``.
        metric: one of ``tasks.METRICS``.
    """
    folders = subfolders(path, "one folder per class")
    if not folders:
        raise UserError(f"{path}: no folders; expected one per class")
    files, labels = _labelled(path, folders)
    empty = sorted(set(range(len(folders))) - {label for (label,) in labels})
    if empty:
        raise UserError(f"{path / folders[empty[0]]}: a class without an image; remove the folder or fill it")
    found = read_lines(Path(names), "one class name per line") if names else [f.replace("_", " ") for f in folders]
    if len(found) != len(folders):
        raise UserError(f"{names}: {len(found)} names for the {len(folders)} folders of {path}")
    forms = read_lines(Path(templates), "one template per line") if templates else DEFAULT_TEMPLATES
    texts = ClassTexts(classes=range(len(found)), names=found, templates=forms)
    return Classification(images=ImageFiles(path, files), labels=labels, languages={"en": texts}, metric=metric)


def labelled_parquet(
    path: Path,
    names: Mapping[str, Sequence[str]],
    templates: Mapping[str, Sequence[str]],
    classes: Sequence[str],
    image: str = "jpg",
    label: str = "label",
    key: str = "key",
) -> Classification:
    """A Parquet file of labelled images, with class names in any number of languages.

    Args:
        names: by language, one name per class, in the order of ``classes``.
        templates: by language, each with one ``{}``.
        classes: values of the label column.
        image, label, key: columns.
    """
    columns = {key: TEXT_OR_INTEGER, label: TEXT_OR_INTEGER, image: ANY}
    table = read_parquet(path, columns, "a Parquet file of labelled images")
    number = {name: index for index, name in enumerate(classes)}
    found = table[label].to_pylist()
    unknown = sorted({str(value) for value in found if value not in number})
    if unknown:
        raise UserError(f"{path}: label {unknown[0]!r} is not among the suite's classes")
    languages = {
        lang: ClassTexts(classes=range(len(classes)), names=own, templates=templates_of(templates, lang))
        for lang, own in names.items()
    }
    images = ImageColumn(encoded_images(table[image], path), [str(name) for name in table[key].to_pylist()])
    return Classification(images=images, labels=[(number[value],) for value in found], languages=languages)


@cache
def openai_imagenet() -> tuple[list[str], list[str]]:
    """ImageNet's 1,000 class names and OpenAI's 80 templates, from the package open_clip_torch.

    Raises:
        UserError: the package is not installed.
    """
    module = _open_clip_metadata()
    return list(module.IMAGENET_CLASSNAMES), [form("{}") for form in module.OPENAI_IMAGENET_TEMPLATES]


def _open_clip_metadata() -> ModuleType:
    # Only this file of data, because the package around it needs torchvision.
    package = importlib.util.find_spec("open_clip")
    if package is None or not package.submodule_search_locations:
        raise UserError("ImageNet's class names and templates come with open_clip: pip install open_clip_torch")
    file = Path(package.submodule_search_locations[0]) / "zero_shot_metadata.py"
    spec = importlib.util.spec_from_file_location("open_clip_zero_shot_metadata", file)
    if spec is None or spec.loader is None or not file.is_file():
        raise UserError(f"{file}: open_clip has no such file; install open_clip_torch 3.x")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
