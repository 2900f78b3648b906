"""Retrieval sets: Crossmodal-3600, files of one caption per line (XTD-10, XTD-200, Flickr30k-200), COCO annotations."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mc2_hpc.errors import UserError
from mc2_hpc.evaluation.images import ImageFiles
from mc2_hpc.evaluation.sets.files import read_lines, required
from mc2_hpc.evaluation.tasks import Captions, Retrieval
from mc2_hpc.storage import read_json


def xm3600(path: Path, images: str = "images") -> Retrieval:
    """Crossmodal-3600: ``captions.jsonl`` and ``images/<image/key>.jpg``.

    Each line of the former is an image: ``{"image/key": ..., "<locale>": {"caption": [...]}, ...}``.
    """
    texts: dict[str, list[str]] = {}
    owners: dict[str, list[int]] = {}
    records = xm3600_records(path)
    for number, record in enumerate(records):
        for locale, entry in record.items():
            if isinstance(entry, dict) and "caption" in entry:
                own = [caption for caption in entry["caption"] if caption.strip()]
                texts.setdefault(locale, []).extend(own)
                owners.setdefault(locale, []).extend([number] * len(own))
    languages = {lang: Captions(texts=texts[lang], images=owners[lang]) for lang in sorted(texts) if texts[lang]}
    return Retrieval(
        images=ImageFiles(path / images, [f"{record['image/key']}.jpg" for record in records]),
        languages=languages,
        lacking=_without_captions(texts.keys() - languages.keys()),
    )


def xm3600_records(path: Path) -> list[dict[str, Any]]:
    """The lines of ``captions.jsonl``, each with a key and any lists of captions."""
    file = path / "captions.jsonl"
    records = []
    for number, line in enumerate(read_lines(file, "captions.zip unpacks to it"), start=1):
        try:
            record = json.loads(line)
            texts = [text for entry in record.values() if isinstance(entry, dict) for text in entry.get("caption", [])]
            if not all(isinstance(text, str) for text in (record["image/key"], *texts)):
                raise TypeError("a key or caption is not a string")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{file}: line {number} is not an image of Crossmodal-3600 ({error})") from None
        records.append(record)
    return records


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


def coco(path: Path, images: str, language: str = "en") -> Retrieval:
    """COCO's caption annotations: ``{"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}``.

    Args:
        path: the JSON file.
        images: folder of the images.
    """
    record = read_json(required(path, "COCO's caption annotations"))
    try:
        place = {image["id"]: number for number, image in enumerate(record["images"])}
        files = [image["file_name"] for image in record["images"]]
        rows = [(row["caption"].strip(), place[row["image_id"]]) for row in record["annotations"]]
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not COCO's caption annotations ({error!r})") from None
    if len(place) != len(files):
        raise UserError(f"{path}: two images with the same id")
    rows = [row for row in rows if row[0]]
    captions = Captions(texts=[text for text, _ in rows], images=[owner for _, owner in rows])
    return Retrieval(images=ImageFiles(Path(images), files), languages={language: captions})
