"""Decontamination: remove benchmark images from training shards.

Every training image is compared with every benchmark image by a 64-bit perceptual hash
(:mod:`mc2_hpc.curation.pool.perceptual_hash`). Benchmark images are hashed whole and with 2.5 % and 5 % of their size
cut from every edge, so that slightly cropped copies are found too. Mirrored or heavily cropped copies are found by the
hash of an encoder's features (:mod:`mc2_hpc.curation.copies.features`), as in the recipe, if an encoder is given.
"""

from __future__ import annotations

import csv
import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mc2_hpc.curation.copies.features import centre_of, encoder_settings, feature_words, nearest_features
from mc2_hpc.curation.copies.hashes import FEATURE_CHECK, FEATURE_DISTANCE, FEATURES, PHASH, Hash, checked_hash
from mc2_hpc.curation.copies.hashing import FeatureBatches, encoder_of
from mc2_hpc.curation.pool.captions import PoolShard, list_pool
from mc2_hpc.curation.pool.copying import check_elsewhere, copy_without, first_of_name, key_of, require_images
from mc2_hpc.curation.pool.image_tars import TarIndex
from mc2_hpc.curation.pool.perceptual_hash import Hashes, image_hashes, nearest
from mc2_hpc.drops import Drop, Dropped
from mc2_hpc.errors import UserError
from mc2_hpc.images import read_image_file
from mc2_hpc.jobs import STATS, Plan, Stage, open_folder, stats_path, sum_kept
from mc2_hpc.jobs.named import Named
from mc2_hpc.reading.arrays import open_npz
from mc2_hpc.reading.files import check_regular, shown
from mc2_hpc.reading.json_file import Count, Foreign, read_json
from mc2_hpc.samples import IMAGE_EXTENSIONS, is_image_name
from mc2_hpc.shard_paths import walk_files
from mc2_hpc.storage import atomic_path, write_csv, write_json
from mc2_hpc.tar import Member

SETTINGS = "decontaminate.json"
REPORT = "removed.csv"
MAX_DISTANCE = 6
"""Default, in bits: the largest distance at which pairs of CIFAR-10 train and test images, checked by eye, were almost
always the same image. At 8 bits many are not."""
_CUTS = (0.0, 0.025, 0.05)
_FILES_AT_ONCE = 1000
_HEADER = ("key", "benchmark", "distance", "hash", "shard")


def plan_decontaminate(
    shards: str | Path,
    against: str | Path,
    out: str | Path,
    *,
    max_distance: int = MAX_DISTANCE,
    features: Named | None = None,
    feature_distance: int = FEATURE_DISTANCE,
    feature_check: int = FEATURE_CHECK,
) -> Plan:
    """Copy training shards without the images that are within ``max_distance`` bits of a benchmark image, or copies of
    one by their features.

    Writes ``<shard>.tar`` and, if the shard has one, ``<shard>.parquet``, as packing does. A packed shard that loses
    nothing keeps its bytes; a shard that loses everything gets no files. ``removed.csv`` lists each removed key, the
    nearest benchmark image, the distance between them (in bits of 64 by pHash, of 256 by features), by which of the two
    it was found, and the shard. Finished shards are skipped.

    Args:
        shards: folder of training shards, written by packing or plain WebDataset tars.
        against: benchmark images: a folder, searched at any depth for image files and tars of them, or one tar.
        features: an encoder (:func:`~mc2_hpc.curation.copies.features.parse_encoder`); the other two as in
            :func:`~mc2_hpc.curation.dedup_images.plan_dedup_images`.

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
    kind = None if features is None else checked_hash(Hash(FEATURES, feature_distance, feature_check))
    training = {shard.name: shard for shard in list_pool(Path(shards).absolute())}
    require_images(training.values())
    check_elsewhere(training.values(), out)
    units, listing = _benchmark_units(Path(against).absolute())
    settings: dict[str, Any] = {"max_distance": max_distance, "against": listing}
    if kind is not None:
        settings |= {**encoder_settings(features), "features": asdict(kind)}
    open_folder(out, SETTINGS, settings, list(training))
    clean = CleanShard(out, list(units), max_distance, features, kind)
    report = WriteReport(out, list(training))
    stages = (
        Stage("benchmark hashes", out / "benchmark", units, HashUnit(out, features), ("{shard}.npz",), unit="parts"),
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
    encoder: Named | None

    def __call__(self, name: str, files: list[Path]) -> None:
        names, hashes = [], []
        features = FeatureBatches(encoder_of(self.encoder))
        for image, read in _images_of(files):
            try:
                data = read()
                hashes.append(image_hashes(data, _CUTS))
                features.add(data)
            except Dropped as error:
                raise UserError(
                    f"{shown(image)}: this benchmark image cannot be decoded ({error}); fix or remove it, "
                    f"then delete {self.out} and rerun the command"
                ) from None
            names.append(image)
        if not names:
            raise UserError(f"{files[0]}: holds no benchmark images; remove it")
        with atomic_path(_hashes_path(self.out, name)) as temporary:
            projections = features.projections()
            np.savez(temporary, names=np.array(names, np.str_), hashes=np.stack(hashes), projections=projections)


def _images_of(files: Sequence[Path]) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """The name of each image, and how to read it."""
    for path in files:
        if path.suffix.lower() == ".tar":
            with TarIndex(path) as index:
                for member in index.members:
                    if not is_image_name(member.name):
                        continue
                    yield f"{path}/{member.name}", partial(index.read, member)
        else:
            yield str(path), partial(read_image_file, path)


class _Benchmark(NamedTuple):
    """Hashes of all benchmark images."""

    names: list[str]
    hashes: Hashes
    """``(len(names) * len(_CUTS),)``."""
    centre: npt.NDArray[np.int64]
    words: npt.NDArray[np.uint64]
    """Bits of features, ``(len(names), WORDS)``; none without an encoder."""


@lru_cache(maxsize=1)
def _benchmark(out: Path, units: tuple[str, ...]) -> _Benchmark:
    names: list[str] = []
    hashes: list[Hashes] = []
    projections: list[npt.NDArray[np.int32]] = []
    for unit in units:
        with open_npz(_hashes_path(out, unit), cure=f"delete {out} and run the same command again") as file:
            names += file.read_texts("names")
            hashes.append(file.read("hashes", np.uint64, ndim=2).ravel())
            projections.append(file.read("projections", np.int32, ndim=2))
    centre = centre_of(projections)
    return _Benchmark(names, np.concatenate(hashes), centre, feature_words(np.concatenate(projections), centre))


class _Images(Foreign):
    """The part of a shard's counts that tells whether it has a tar."""

    images: Count


@dataclass(frozen=True)
class CleanShard:
    """Copies one shard without the images that match the benchmark."""

    out: Path
    units: list[str]
    max_distance: int
    encoder: Named | None
    features: Hash | None

    def is_current(self, shard: str, value: object) -> bool:
        """Whether the shard's tar exists, or no images are left in it."""
        return (self.out / f"{shard}.tar").is_file() or read_json(stats_path(self.out, shard), _Images).images == 0

    def __call__(self, name: str, shard: PoolShard) -> None:
        assert shard.images is not None
        with TarIndex(shard.images) as index:
            images = [member for member in first_of_name(index) if is_image_name(member.name)]
            drops: Counter[str] = Counter()
            hashes, projections = self._hashes(index, images)
            drops[Drop.IMAGE_UNDECODABLE] = len(images) - len(hashes)
            removed = self._matches(hashes, projections, name)
            unwanted = {key_of(member) for member in images if member not in hashes} | {row[0] for row in removed}
            num_images, _ = copy_without(shard, index, self.out, unwanted, drops)
        write_csv(_removed_path(self.out, name), _HEADER, removed)
        stats = {"images_read": len(images), "images": num_images, "removed": len(removed), "drops": dict(+drops)}
        write_json(stats_path(self.out, name), stats)

    def _hashes(self, index: TarIndex, images: list[Member]) -> tuple[dict[Member, np.uint64], npt.NDArray[np.int32]]:
        """Hash of each decodable image, by member, and their projections."""
        found = {}
        features = FeatureBatches(encoder_of(self.encoder))
        for member in images:
            data = index.read(member)
            with suppress(Dropped):
                hash_of = image_hashes(data)[0]
                features.add(data)
                found[member] = hash_of
        return found, features.projections()

    def _matches(
        self, hashes: Mapping[Member, np.uint64], projections: npt.NDArray[np.int32], shard: str
    ) -> list[tuple[str, str, int, str, str]]:
        """Rows of the report: images close to a benchmark image."""
        benchmark = _benchmark(self.out, tuple(self.units))
        index, distance = nearest(np.array(list(hashes.values()), np.uint64), benchmark.hashes)
        index, kinds = index // len(_CUTS), np.where(distance <= self.max_distance, PHASH, "")
        if self.features is not None:
            limits = {"max_distance": self.features.max_distance, "max_check": self.features.max_check}
            words = feature_words(projections, benchmark.centre)
            by_features, bits = nearest_features(words, benchmark.words, **limits)
            is_more = (by_features >= 0) & (kinds == "")
            index, distance = np.where(is_more, by_features, index), np.where(is_more, bits, distance)
            kinds = np.where(is_more, FEATURES, kinds)
        rows = zip(hashes, index.tolist(), distance.tolist(), kinds.tolist(), strict=True)
        return [(key_of(member), benchmark.names[i], bits, kind, shard) for member, i, bits, kind in rows if kind]


def _removed_path(out: Path, shard: str) -> Path:
    return out / "removed" / f"{shard}.csv"


@dataclass(frozen=True)
class WriteReport:
    """Merges the removals of all shards into one file."""

    out: Path
    shards: list[str]

    def __call__(self, name: str, value: None) -> None:
        rows = (row for shard in self.shards for row in _read_csv(_removed_path(self.out, shard)))
        write_csv(self.out / REPORT, _HEADER, rows)


def _read_csv(path: Path) -> Iterator[Sequence[str]]:
    check_regular(path)
    with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file:
        yield from list(csv.reader(file))[1:]
