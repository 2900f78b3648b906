"""Retrieval sets: Crossmodal-3600, caption files by line (XTD-10, XTD-200, Flickr30k-200), COCO's annotations."""

import json
from collections.abc import Sequence
from pathlib import Path

from mc2_hpc.errors import UserError
from mc2_hpc.evaluation.pictures import PictureFiles
from mc2_hpc.evaluation.sets.files import read_lines, required
from mc2_hpc.evaluation.tasks import Captions, Retrieval
from mc2_hpc.storage import read_json


def xm3600(path: Path, images: str = "images") -> Retrieval:
    """Crossmodal-3600: ``captions.jsonl`` and ``images/<image/key>.jpg``.

    A line of the former is a picture: ``{"image/key": ..., "<locale>": {"caption": [...]}, ...}``.
    """
    keys: list[str] = []
    texts: dict[str, list[str]] = {}
    owners: dict[str, list[int]] = {}
    for number, line in enumerate(read_lines(path / "captions.jsonl", "captions.zip unpacks to it"), start=1):
        try:
            record = json.loads(line)
            key = record["image/key"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path / 'captions.jsonl'}: line {number} is no picture of Crossmodal-3600 ({error})"
            ) from None
        for locale, entry in record.items():
            if isinstance(entry, dict) and "caption" in entry:
                own = [caption for caption in entry["caption"] if caption.strip()]
                texts.setdefault(locale, []).extend(own)
                owners.setdefault(locale, []).extend([len(keys)] * len(own))
        keys.append(key)
    pictures = PictureFiles(path / images, [f"{key}.jpg" for key in keys])
    languages = {locale: Captions(texts=texts[locale], pictures=owners[locale]) for locale in sorted(texts)}
    return Retrieval(pictures=pictures, languages=languages)


def caption_lines(
    path: Path,
    index: str = "filenames.txt",
    captions: str = "{}.txt",
    images: str = "images",
    languages: Sequence[str] = (),
) -> Retrieval:
    """A file of picture names, and for each language a file with one caption a line, in the same order.

    XTD-10: ``index=test_image_names.txt captions=test_1kcaptions_{}.txt``; XTD-200: ``index=test_image_names.txt``;
    Flickr30k-200: the defaults.

    Args:
        captions: name of a language's file, with ``{}`` for its code.
        languages: codes; by default, of all files that are there.
    """
    names = read_lines(path / index, "one picture's file name a line")
    if captions.count("{}") != 1:
        raise UserError(f"captions={captions!r}: write exactly one {{}} for the language's code")
    before, after = captions.split("{}")
    found = languages or sorted(
        file.name[len(before) : -len(after) or None]
        for file in path.glob(f"{before}*{after}")
        if file.name != index and file.is_file()
    )
    if not found:
        raise UserError(f"{path}: no caption files {captions} there")
    read = {}
    for lang in found:
        lines = read_lines(path / captions.replace("{}", lang), "one caption a line")
        if len(lines) != len(names):
            raise UserError(f"{path / captions.replace('{}', lang)}: {len(lines)} captions for {len(names)} pictures")
        described = [place for place, line in enumerate(lines) if line]
        read[lang] = Captions(texts=[lines[place] for place in described], pictures=described)
    return Retrieval(pictures=PictureFiles(path / images, names), languages=read)


def coco(path: Path, images: str, language: str = "en") -> Retrieval:
    """COCO's caption annotations: ``{"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}``.

    Args:
        path: the JSON file.
        images: folder of the pictures.
    """
    record = read_json(required(path, "COCO's caption annotations"))
    try:
        place = {image["id"]: number for number, image in enumerate(record["images"])}
        files = [image["file_name"] for image in record["images"]]
        rows = [(row["caption"].strip(), place[row["image_id"]]) for row in record["annotations"]]
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not COCO's caption annotations ({error!r})") from None
    rows = [row for row in rows if row[0]]
    captions = Captions(texts=[text for text, _ in rows], pictures=[owner for _, owner in rows])
    return Retrieval(pictures=PictureFiles(Path(images), files), languages={language: captions})
