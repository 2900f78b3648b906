"""WebDatasets in CLIP_benchmark's layout, with classes or captions."""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mc2_hpc.errors import UserError
from mc2_hpc.evaluation.images import ImageMembers, tar_samples
from mc2_hpc.evaluation.sets.files import read_lines, read_text, required
from mc2_hpc.evaluation.tasks import Captions, Classification, ClassTexts, Retrieval
from mc2_hpc.samples import IMAGE_EXTENSIONS
from mc2_hpc.tar import LocalFile, Member


@dataclass(frozen=True)
class _Sample:
    """A complete sample: its shard, its files by lower-case extension, and its image."""

    shard: Path
    files: dict[str, Member]
    image: Member

    def read(self, extension: str) -> bytes:
        """The payload of one file. Raises UserError if it cannot be read."""
        member = self.files[extension]
        try:
            return LocalFile(self.shard).read(member.offset, member.size)
        except OSError as error:
            raise UserError(f"{self.shard}: {member.name} cannot be read ({error})") from None

    def text(self, extension: str) -> str:
        """The payload of one file as text. Raises UserError if it is not UTF-8."""
        try:
            return self.read(extension).decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{self.shard}: {self.files[extension].name} is not UTF-8 ({error})") from None


def clip_benchmark(
    path: Path, split: str = "test", metric: str = "accuracy", group: int | None = None
) -> Classification | Retrieval:
    """A WebDataset in CLIP_benchmark's layout.

    ``<path>/<split>/nshards.txt`` and ``0.tar`` ... If ``dataset_type.txt`` says ``retrieval``, samples have a
    ``<key>.txt`` with one caption per line. Otherwise they have a ``<key>.cls``, and there are ``classnames.txt`` and
    ``zeroshot_classification_templates.txt``, whose templates have ``{c}``.

    Args:
        metric: one of ``tasks.METRICS``, for classes.
        group: for ``worst_group``: the index in each sample's ``<key>.npy`` of its group number, from 0. DataComp's
            copies of WILDS, Dollar Street and GeoDE have these files.
    """
    kind_file = path / "dataset_type.txt"
    kind = read_text(kind_file, "").strip().lower() if kind_file.is_file() else "classification"
    if kind not in ("classification", "retrieval"):
        raise UserError(f"{kind_file}: {kind[:20]!r} sets are not scored, only classification and retrieval")
    needed = ("txt",) if kind == "retrieval" else ("cls",) if group is None else ("cls", "npy")
    samples, skipped = _samples(path / split, needed)
    images = ImageMembers([(sample.shard, sample.image) for sample in samples])
    if kind == "retrieval":
        texts = [sample.text("txt") for sample in samples]
        owned = [(line, owner) for owner, text in enumerate(texts) for line in text.splitlines() if line.strip()]
        captions = Captions(texts=[text for text, _ in owned], images=[owner for _, owner in owned])
        return Retrieval(images=images, languages={"en": captions}, skipped=skipped)
    names = read_lines(path / "classnames.txt", "one class name per line")
    forms = read_lines(path / "zeroshot_classification_templates.txt", "one template per line")
    return Classification(
        images=images,
        labels=[(_class(sample, len(names)),) for sample in samples],
        languages={
            "en": ClassTexts(
                classes=range(len(names)), names=names, templates=[form.replace("{c}", "{}") for form in forms]
            )
        },
        metric=metric,
        groups=[] if group is None else [_group(sample, group) for sample in samples],
        skipped=skipped,
    )


def _samples(folder: Path, needed: Sequence[str]) -> tuple[list[_Sample], dict[str, int]]:
    """Every sample with an image and the ``needed`` files, and the count of the others."""
    samples: list[_Sample] = []
    incomplete = 0
    count = _number(folder / "nshards.txt")
    for shard in (folder / f"{number}.tar" for number in range(count)):
        required(shard, f"{folder / 'nshards.txt'} says {count} shards")
        for files in tar_samples(shard).values():
            image = next((files[extension] for extension in IMAGE_EXTENSIONS if extension in files), None)
            if image is None or not files.keys() >= set(needed):
                incomplete += 1
                continue
            samples.append(_Sample(shard, files, image))
    if not samples:
        wanted = " and a ".join(f".{extension}" for extension in needed)
        raise UserError(f"{folder}: no sample in its tars has an image and a {wanted} ({incomplete} incomplete)")
    return samples, {"incomplete_sample": incomplete} if incomplete else {}


def _class(sample: _Sample, classes: int) -> int:
    text = sample.text("cls")
    if not text.strip().isdecimal():
        raise UserError(f"{sample.shard}: the .cls beside {sample.image.name} is {text[:20]!r}, not a class number")
    if int(text) >= classes:
        raise UserError(
            f"{sample.shard}: {sample.image.name} is of class {int(text)}, but there are {classes} class names"
        )
    return int(text)


def _group(sample: _Sample, column: int) -> int:
    try:
        numbers = np.load(io.BytesIO(sample.read("npy")), allow_pickle=False)
        value = float(numbers[column])
        if value < 0 or value != int(value):
            raise ValueError(f"{value} is not a whole number of at least 0")
    except (ValueError, TypeError, IndexError, OverflowError, EOFError) as error:
        raise UserError(
            f"{sample.shard}: the .npy beside {sample.image.name} names no group at {column} ({error})"
        ) from None
    return int(value)


def _number(path: Path) -> int:
    text = read_text(path, "it should contain the number of shards").strip()
    if not re.fullmatch("[1-9][0-9]{0,8}", text):
        raise UserError(f"{path}: {text[:20]!r} is not a number of shards")
    return int(text)
