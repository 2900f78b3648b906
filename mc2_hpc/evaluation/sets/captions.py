"""Retrieval sets: Crossmodal-3600, files of one caption per line (XTD-10, XTD-200, Flickr30k-200), COCO annotations."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from mc2_hpc.errors import UserError
from mc2_hpc.evaluation.images import ImageFiles
from mc2_hpc.evaluation.sets.files import MOST_BYTES, read_lines, required
from mc2_hpc.evaluation.tasks import Captions, Retrieval
from mc2_hpc.reading.json_file import Foreign, as_type, parse_json, read_json


def xm3600(path: Path, images: str = "images") -> Retrieval:
    """Crossmodal-3600: ``captions.jsonl`` and ``images/<image/key>.jpg``.

    Each line of the former is an image: ``{"image/key": ..., "<locale>": {"caption": [...]}, ...}``.
    """
    texts: dict[str, list[str]] = {}
    owners: dict[str, list[int]] = {}
    records = xm3600_images(path)
    for number, record in enumerate(records):
        for lang, captions in record.captions.items():
            own = [caption for caption in captions if caption.strip()]
            texts.setdefault(lang, []).extend(own)
            owners.setdefault(lang, []).extend([number] * len(own))
    languages = {lang: Captions(texts=texts[lang], images=owners[lang]) for lang in sorted(texts) if texts[lang]}
    return Retrieval(
        images=ImageFiles(path / images, [f"{record.key}.jpg" for record in records]),
        languages=languages,
        lacking=_without_captions(texts.keys() - languages.keys()),
    )


class Xm3600Image(NamedTuple):
    """A line of Crossmodal-3600's ``captions.jsonl``."""

    key: str
    locale: str | None
    """The one that the image was chosen for."""
    captions: dict[str, list[str]]
    """By locale."""


class _Line(Foreign):
    key: str = msgspec.field(name="image/key")
    locale: str | None = msgspec.field(name="image/locale", default=None)


class _Captions(Foreign):
    caption: list[str]


def xm3600_images(path: Path) -> list[Xm3600Image]:
    """The lines of ``captions.jsonl``.

    Raises:
        UserError: a line has another form.
    """
    file, what = path / "captions.jsonl", "an image of Crossmodal-3600"
    images = []
    for number, line in enumerate(read_lines(file, "captions.zip unpacks to it"), start=1):
        source = f"{file}: line {number}"
        fields = parse_json(line.encode(), dict[str, Any], source, what=what)
        own = as_type(fields, _Line, source, what=what)
        # A slash marks a property of the image; every other key is a locale.
        entries = {lang: entry for lang, entry in fields.items() if "/" not in lang}
        captions = as_type(entries, dict[str, _Captions], source, what=what)
        images.append(Xm3600Image(own.key, own.locale, {lang: entry.caption for lang, entry in captions.items()}))
    return images


def _without_captions(languages: Iterable[str]) -> dict[str, str]:
    return dict.fromkeys(sorted(languages), "language_without_captions")


def caption_lines(
    path: Path,
    index: str = "filenames.txt",
    captions: str = "{}.txt",
    images: str = "images",
    languages: Sequence[str] = (),
) -> Retrieval:
    """A file of image names and, for each language, a file with one caption per line in the same order.

    XTD-10: ``index=test_image_names.txt captions=test_1kcaptions_{}.txt``; XTD-200: ``index=test_image_names.txt``;
    Flickr30k-200: the defaults.

    Args:
        captions: name of a language's file, with ``{}`` for its code.
        languages: codes; by default those of all existing files.
    """
    names = read_lines(path / index, "one image's file name per line")
    if captions.count("{}") != 1:
        raise UserError(f"captions={captions!r}: write exactly one {{}} for the language's code")
    before, after = captions.split("{}")
    found = languages or sorted(
        file.name[len(before) : -len(after) or None]
        for file in path.glob(f"{before}*{after}")
        if file.name != index and file.is_file()
    )
    if not found:
        raise UserError(f"{path}: no caption files {captions}")
    read = {}
    for lang in found:
        lines = read_lines(path / captions.replace("{}", lang), "one caption per line")
        if len(lines) != len(names):
            raise UserError(f"{path / captions.replace('{}', lang)}: {len(lines)} captions for {len(names)} images")
        described = [place for place, line in enumerate(lines) if line]
        if described:
            read[lang] = Captions(texts=[lines[place] for place in described], images=described)
    if not read:
        raise UserError(f"{path}: no caption in {len(found)} files {captions}")
    lacking = _without_captions(set(found) - read.keys())
    return Retrieval(images=ImageFiles(path / images, names), languages=read, lacking=lacking)


class _CocoImage(Foreign):
    id: int | str
    file_name: str


class _CocoCaption(Foreign):
    image_id: int | str
    caption: str


class _Coco(Foreign):
    images: list[_CocoImage]
    annotations: list[_CocoCaption]


def coco(path: Path, images: str, language: str = "en") -> Retrieval:
    """COCO's caption annotations: ``{"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}``.

    Args:
        path: the JSON file.
        images: folder of the images.
    """
    what = "COCO's caption annotations"
    record = read_json(required(path, what), _Coco, most=MOST_BYTES, what=what)
    place = {image.id: number for number, image in enumerate(record.images)}
    files = [image.file_name for image in record.images]
    if len(place) != len(files):
        raise UserError(f"{path}: two images with the same id")
    astray = next((row.image_id for row in record.annotations if row.image_id not in place), None)
    if astray is not None:
        raise UserError(f"{path}: a caption of image {astray}, which is not among the images")
    rows = [(row.caption.strip(), place[row.image_id]) for row in record.annotations]
    rows = [row for row in rows if row[0]]
    captions = Captions(texts=[text for text, _ in rows], images=[owner for _, owner in rows])
    return Retrieval(images=ImageFiles(Path(images), files), languages={language: captions})
