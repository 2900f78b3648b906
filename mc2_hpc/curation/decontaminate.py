"""Decontamination: remove benchmark images from training shards.

Every training image is compared with every benchmark image by a 64-bit perceptual hash
(:mod:`mc2_hpc.curation.pool.perceptual_hash`). Benchmark images are hashed whole and with 2.5 % and 5 % of their size
cut from every edge, so that slightly cropped copies are found too. Mirrored or heavily cropped copies are not.
"""

from __future__ import annotations

import csv
import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from mc2_hpc.caption_tables import KEY, column_types, is_caption_table
from mc2_hpc.curation.matched import write_matched
from mc2_hpc.curation.pool.captions import PoolShard, list_pool
from mc2_hpc.curation.pool.image_tars import TarIndex
from mc2_hpc.curation.pool.perceptual_hash import Hashes, image_hashes, nearest
from mc2_hpc.drops import Drop, Dropped
from mc2_hpc.errors import UserError
from mc2_hpc.images import read_image_file
from mc2_hpc.jobs import STATS, Plan, Stage, open_folder, stats_path, sum_kept
from mc2_hpc.reading.files import check_regular
from mc2_hpc.reading.json_file import Count, Foreign, read_json
from mc2_hpc.reading.parquet_file import open_parquet
from mc2_hpc.samples import IMAGE_EXTENSIONS, is_image_name
from mc2_hpc.shard_paths import walk_files
from mc2_hpc.storage import atomic_path, write_json
from mc2_hpc.tar import Member, fits_tar_name, write_tar

SETTINGS = "decontaminate.json"
REPORT = "removed.csv"
MAX_DISTANCE = 6
"""Default, in bits: the largest distance at which pairs of CIFAR-10 train and test images, checked by eye, were almost
always the same image. At 8 bits many are not."""
_CUTS = (0.0, 0.025, 0.05)
_FILES_AT_ONCE = 1000
_HEADER = ("key", "benchmark", "distance", "shard")


def plan_decontaminate(
    shards: str | Path, against: str | Path, out: str | Path, *, max_distance: int = MAX_DISTANCE
) -> Plan:
    """Copy training shards without the images that are within ``max_distance`` bits of a benchmark image.

    Writes ``<shard>.tar`` and, if the shard has one, ``<shard>.parquet``, as packing does. A packed shard that loses
    nothing keeps its bytes; a shard that loses everything gets no files. ``removed.csv`` lists each removed key, the
    nearest benchmark image, the distance between them and the shard. Finished shards are skipped.

    Args:
        shards: folder of training shards, written by packing or plain WebDataset tars.
        against: benchmark images: a folder, searched at any depth for image files and tars of them, or one tar.

    Returns:
        stages, whose result is counters: ``images_read`` (of training), ``images`` (kept), ``removed``, and ``drops``
        by reason: ``image_undecodable`` (it cannot be compared with the benchmark, and training could not use it),
        ``name_too_long`` (does not fit a ustar header), ``name_repeated`` (a second file of the same name)

    Raises:
        UserError: nothing to read, or a folder made with other settings. A benchmark image that cannot be decoded
            raises when it is read, because nothing could be compared with it.
    """
    out = Path(out).absolute()
    if find_spec("imagehash") is None:
        raise UserError("perceptual hashes need the imagehash package: pip install imagehash")
    if not 0 <= max_distance < 32:
        raise UserError(f"max_distance={max_distance}: must be 0 to 31 bits; unrelated images differ in about 32")
    training = {shard.name: shard for shard in list_pool(Path(shards).absolute())}
    if without := [name for name, shard in training.items() if shard.images is None]:
        raise UserError(f"{Path(shards) / without[0]}.parquet: there is no {without[0]}.tar with its images beside it")
    units, listing = _benchmark_units(Path(against).absolute())
    open_folder(out, SETTINGS, {"max_distance": max_distance, "against": listing}, list(training))
    clean = CleanShard(out, list(units), max_distance)
    report = WriteReport(out, list(training))
    stages = (
        Stage("benchmark hashes", out / "benchmark", units, HashUnit(out), ("{shard}.npz",), unit="parts"),
        Stage("decontaminate", out, training, clean, ("removed/{shard}.csv", STATS), invalidates=(out / REPORT,)),
        Stage("report of removals", out, {REPORT: None}, report, (REPORT,), unit="reports"),
    )
    return Plan(stages, result=lambda: sum_kept(out, list(training), "images"))


def _benchmark_units(against: Path) -> tuple[dict[str, list[Path]], str]:
    """Benchmark files in parts that are hashed together (one tar, or up to 1,000 images), and a digest of their names
    and sizes."""
    if not against.exists():
        raise UserError(f"{against}: no such file or folder of benchmark images")
    files = sorted(walk_files(against)) if against.is_dir() else [against]
    tars = [path for path in files if path.suffix.lower() == ".tar"]
    images = [path for path in files if is_image_name(path.name) and path.is_file()]
    if not tars and not images:
        raise UserError(f"{against}: no images (.{', .'.join(IMAGE_EXTENSIONS)}) and no tars of them")
    parts = [[tar] for tar in tars] + [
        images[begin : begin + _FILES_AT_ONCE] for begin in range(0, len(images), _FILES_AT_ONCE)
    ]
    sizes = "".join(f"{path.relative_to(against)} {path.stat().st_size}\n" for path in tars + images)
    digest = hashlib.sha256(sizes.encode("utf-8", "surrogateescape")).hexdigest()
    return {f"{number:05d}": part for number, part in enumerate(parts)}, digest


def _hashes_path(out: Path, unit: str) -> Path:
    return out / "benchmark" / f"{unit}.npz"


@dataclass(frozen=True)
class HashUnit:
    """Hashes a part of the benchmark."""

    out: Path

    def __call__(self, name: str, files: list[Path]) -> None:
        names, hashes = [], []
        for image, read in _images_of(files):
            try:
                hashes.append(image_hashes(read(), _CUTS))
            except Dropped as error:
                raise UserError(
                    f"{image}: this benchmark image cannot be decoded ({error}); fix or remove it, "
                    f"then delete {self.out} and rerun the command"
                ) from None
            names.append(image)
        if not names:
            raise UserError(f"{files[0]}: holds no benchmark images; remove it")
        with atomic_path(_hashes_path(self.out, name)) as temporary:
            np.savez(temporary, names=np.array(names, np.str_), hashes=np.stack(hashes))


def _images_of(files: Sequence[Path]) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """The name of each image, and how to read it."""
    for path in files:
        if path.suffix.lower() == ".tar":
            with TarIndex(path) as index:
                for member in filter(_is_image, index.members):
                    yield f"{path}/{member.name}", partial(index.read, member)
        else:
            yield str(path), partial(read_image_file, path)


def _is_image(member: Member) -> bool:
    return is_image_name(member.name)


@lru_cache(maxsize=1)
def _benchmark(out: Path, units: tuple[str, ...]) -> tuple[list[str], Hashes]:
    """The image name of each benchmark hash, and the hashes: one per image and cut."""
    names: list[str] = []
    hashes: list[npt.NDArray[np.uint64]] = []
    for unit in units:
        with np.load(_hashes_path(out, unit)) as file:
            names += [name for name in file["names"].tolist() for _ in _CUTS]
            hashes.append(file["hashes"].ravel())
    return names, np.concatenate(hashes)


class _Images(Foreign):
    """The part of a shard's counts that tells whether it has a tar."""

    images: Count


@dataclass(frozen=True)
class CleanShard:
    """Copies one shard without the images that match the benchmark."""

    out: Path
    units: list[str]
    max_distance: int

    def is_current(self, shard: str) -> bool:
        """Whether the shard's tar exists, or no images are left in it."""
        return (self.out / f"{shard}.tar").is_file() or read_json(stats_path(self.out, shard), _Images).images == 0

    def __call__(self, name: str, shard: PoolShard) -> None:
        assert shard.images is not None
        with TarIndex(shard.images) as index:
            members = {member.name: member for member in reversed(index.members)}  # first of a name wins
            files = [member for member in index.members if members[member.name] is member]
            drops: Counter[str] = Counter({Drop.NAME_REPEATED: len(index.members) - len(files)})
            hashes = self._hashes(index, files, drops)
            removed = self._matches(hashes, name)
            unwanted = {member for member in files if _is_image(member)} - hashes.keys()
            keys = {_key(member) for member in unwanted} | {row[0] for row in removed}
            kept = [member for member in files if _key(member) not in keys]
            drops[Drop.NAME_TOO_LONG] = sum(not fits_tar_name(member.name) for member in kept)
            kept = [member for member in kept if fits_tar_name(member.name)]
            images = sum(map(_is_image, kept))
            if images:
                if shard.captions is not None and is_caption_table(shard.captions):
                    write_matched(self.out / f"{name}.parquet", _rows_without(shard.captions, keys))
                with atomic_path(self.out / f"{name}.tar") as temporary:
                    write_tar(temporary, ((member.name, index.read(member)) for member in kept))
        with atomic_path(_removed_path(self.out, name)) as temporary:
            _write_csv(temporary, removed)
        num_read = len(hashes) + drops[Drop.IMAGE_UNDECODABLE]
        stats = {"images_read": num_read, "images": images, "removed": len(removed), "drops": dict(+drops)}
        write_json(stats_path(self.out, name), stats)

    def _hashes(self, index: TarIndex, files: list[Member], drops: Counter[str]) -> dict[Member, np.uint64]:
        """Hash of each decodable image, by member."""
        found = {}
        for member in filter(_is_image, files):
            try:
                found[member] = image_hashes(index.read(member))[0]
            except Dropped:
                drops[Drop.IMAGE_UNDECODABLE] += 1
        return found

    def _matches(self, hashes: Mapping[Member, np.uint64], shard: str) -> list[tuple[str, str, int, str]]:
        """Rows of the report: images close to a benchmark image."""
        names, against = _benchmark(self.out, tuple(self.units))
        index, distance = nearest(np.array(list(hashes.values()), np.uint64), against)
        return [
            (_key(member), names[i], int(bits), shard)
            for member, i, bits in zip(hashes, index, distance, strict=True)
            if bits <= self.max_distance
        ]


def _key(member: Member) -> str:
    return member.name.rpartition(".")[0]


def _rows_without(path: Path, keys: set[str]) -> pa.Table:
    with open_parquet(path, {KEY: column_types()[KEY]}, what="the rows of a training shard") as file:
        table = file.read()
        return table.filter(pc.invert(pc.is_in(table[KEY], pa.array(sorted(keys), table[KEY].type))))


def _removed_path(out: Path, shard: str) -> Path:
    return out / "removed" / f"{shard}.csv"


@dataclass(frozen=True)
class WriteReport:
    """Merges the removals of all shards into one file."""

    out: Path
    shards: list[str]

    def __call__(self, name: str, value: None) -> None:
        with atomic_path(self.out / REPORT) as temporary:
            _write_csv(temporary, (row for shard in self.shards for row in _read_csv(_removed_path(self.out, shard))))


def _write_csv(path: Path, rows: Iterable[Sequence[Any]]) -> None:
    with open(path, "w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(_HEADER)
        writer.writerows(rows)


def _read_csv(path: Path) -> Iterator[Sequence[str]]:
    check_regular(path)
    with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file:
        yield from list(csv.reader(file))[1:]
