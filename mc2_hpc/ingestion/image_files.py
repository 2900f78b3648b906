"""Image files that a listing names: keys for them, and reading them without leaving their folder."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from mc2_hpc.drops import Drop, Dropped
from mc2_hpc.errors import UserError
from mc2_hpc.images import read_image_file
from mc2_hpc.ingestion.listing import Row
from mc2_hpc.ingestion.samples import Sample
from mc2_hpc.ingestion.texts import usable
from mc2_hpc.reading.files import read_bytes
from mc2_hpc.samples import LARGEST_RECORD, Caption, captions_of


def place_in(folder: Path, name: str) -> str:
    """The name of an image relative to ``folder``, without ``.`` and ``..`` where that is possible; an absolute name
    below the folder becomes relative too."""
    found = os.path.normpath(os.path.join(folder, name))
    inside = os.path.join(os.path.normpath(folder), "")
    return found.removeprefix(inside)


def keys_of(names: pa.Array) -> pa.Array:
    """A key for every image name: the name without its extension, or with it if two images differ in nothing else."""
    stems = pc.replace_substring_regex(names, r"([^/])\.[^./]*$", r"\1")
    distinct = pc.unique(names)
    counts = pc.replace_substring_regex(distinct, r"([^/])\.[^./]*$", r"\1").value_counts()
    repeated = counts.field("values").filter(pc.greater(counts.field("counts"), 1))
    keys = pc.if_else(pc.is_in(stems, repeated), names, stems)
    return pc.utf8_ltrim(keys, "/")


@dataclass(frozen=True)
class ImageFolder:
    """The folder that names of images are relative to."""

    path: Path
    allow_outside: bool = False
    """Names and links may lead out of the folder."""

    @cached_property
    def _root(self) -> Path:
        return self.path.resolve()

    def read(self, name: str) -> bytes:
        """The image file ``name``.

        Raises:
            Dropped: ``name_unsafe``, ``image_missing``, ``read_error`` or ``too_large``.
        """
        path = self.path / name
        if "\0" in name:
            raise Dropped(Drop.NAME_UNSAFE)
        try:
            target = path.resolve()
            if not self.allow_outside and not target.is_relative_to(self._root):
                raise Dropped(Drop.NAME_UNSAFE, f"leads to {target}, which --allow-outside would permit")
            if not path.exists():
                raise Dropped(Drop.IMAGE_MISSING, "no such file")
            return read_image_file(path)
        except (UserError, OSError, RuntimeError) as error:  # RuntimeError: a circle of links
            raise Dropped(Drop.READ_ERROR, str(error)) from None

    def sample(self, key: str, rows: list[Row]) -> Sample:
        """The sample that rows of a listing with one key and one image describe."""
        first = rows[0]
        image, files = first["image"], (first["caption_file"], first["record_file"])

        def captions() -> list[Caption | Dropped]:
            if any(files):
                return [*_captions_in(*(self.path / name if name else None for name in files))]
            return [usable(row["text"], row["lang"] or "") for row in rows if row["text"] is not None]

        return Sample(key, image, lambda: self.read(image), captions)


def split_by_image(rows: Iterable[Row]) -> list[list[Row]]:
    """Rows with one key by their image, in order."""
    by_image: dict[str, list[Row]] = {}
    for row in rows:
        by_image.setdefault(row["image"], []).append(row)
    return list(by_image.values())


def _captions_in(caption: Path | None, record: Path | None) -> list[Caption]:
    """The captions in the files of a sample; a record that cannot be read beside a caption is ignored."""
    text = _read_text(caption) if caption else None
    try:
        fields = _read_text(record) if record else None
    except Dropped:
        if text is None:
            raise
        fields = None
    return captions_of(text, fields)


def _read_text(path: Path) -> bytes:
    try:
        return read_bytes(path, most=LARGEST_RECORD)
    except UserError as error:
        raise Dropped(Drop.CAPTION_MISSING, str(error)) from None
