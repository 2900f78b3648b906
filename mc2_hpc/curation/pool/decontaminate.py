"""Decontamination: training shards without the pictures of benchmarks.

Every training picture is compared with every benchmark picture by a 64-bit perceptual hash
(:mod:`mc2_hpc.curation.pool.perceptual_hash`). Benchmark pictures are hashed whole and with 2.5 % and 5 % of their size
cut from every edge, so that slightly cropped copies are found as well. Mirrored or heavily cropped ones are not.
"""

from __future__ import annotations

import csv
import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mc2_hpc.curation.matched import write_matched
from mc2_hpc.curation.pool.captions import PoolShard, list_pool
from mc2_hpc.curation.pool.image_tars import TarIndex
from mc2_hpc.curation.pool.perceptual_hash import Hashes, UnreadablePicture, nearest, picture_hashes
from mc2_hpc.errors import UserError
from mc2_hpc.jobs.engines import Engine
from mc2_hpc.jobs.stages import REDO, Progress, Stage, open_stage, run_stages, stats_path, sum_stats
from mc2_hpc.reading.arrays import open_npz
from mc2_hpc.reading.json_file import Count, File, read_json
from mc2_hpc.storage import atomic_path, write_json
from mc2_hpc.tar import fits_tar_name, write_tar

SETTINGS = "decontaminate.json"
REPORT = "removed.csv"
MAX_DISTANCE = 6
"""Bits by default: the most at which pairs of CIFAR-10's train and test pictures, looked at by eye, were still one
picture almost every time. At 8 bits many are not."""


class _Stats(File):
    """``stats/<shard>.json``."""

    pictures: Count
    images: Count
    removed: Count
    drops: dict[str, Count]


_CUTS = (0.0, 0.025, 0.05)
_PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
_FILES_AT_ONCE = 1000
_HEADER = ("key", "benchmark", "distance", "shard")


def decontaminate(
    shards: str | Path,
    against: str | Path,
    out: str | Path,
    *,
    max_distance: int = MAX_DISTANCE,
    engine: Engine | None = None,
    progress: Progress | None = None,
) -> dict[str, Any] | None:
    """Copy training shards without the pictures that lie within ``max_distance`` bits of a benchmark picture.

    Writes ``<shard>.tar`` and, where there is one, ``<shard>.parquet``, as packing does: a packed shard that loses
    nothing keeps its bytes, one that loses all gets no files. ``removed.csv`` lists each key removed, the nearest
    benchmark picture, their distance and the shard. What is finished is skipped.

    Args:
        shards: folder of training shards, as packing writes them or plain WebDataset tars.
        against: benchmark pictures: a folder, searched for picture files and tars of them at any depth, or one tar.
        engine: where it runs; this process by default.

    Returns:
        counters: ``pictures`` (of training, as read), ``images`` (kept), ``removed``, and ``drops`` by reason:
        ``undecodable_image`` (it cannot be told from a benchmark's, and training could not use it), ``long_name``
        (beyond a ustar header), ``duplicate_file`` (a second file of a name). None where the work was only submitted to
        Slurm.

    Raises:
        UserError: nothing to read, a benchmark picture that cannot be decoded (nothing could be told from it), shards
            that cannot be read (every other one is done), or a folder made with other settings.
    """
    out = Path(out)
    stages = plan_decontaminate(shards, against, out, max_distance=max_distance)
    if not run_stages(stages, engine, progress):
        return None
    names = list(stages[-1].shards)
    with atomic_path(out / REPORT) as temporary:
        _write_csv(temporary, (row for name in names for row in _read_csv(_removed_path(out, name))))
    return sum_stats(out, names)


def plan_decontaminate(
    shards: str | Path, against: str | Path, out: str | Path, *, max_distance: int = MAX_DISTANCE
) -> list[Stage]:
    """The stages of :func:`decontaminate`, its arguments checked and its settings written."""
    out = Path(out)
    if find_spec("imagehash") is None:
        raise UserError("perceptual hashes need the package imagehash: pip install imagehash")
    if not 0 <= max_distance < 32:
        raise UserError(f"max_distance={max_distance}: must be 0 to 31 bits; unrelated pictures differ in about 32")
    training = {shard.name: shard for shard in list_pool(shards)}
    if without := [name for name, shard in training.items() if shard.images is None]:
        raise UserError(f"{Path(shards) / without[0]}.parquet: no {without[0]}.tar with its pictures beside it")
    units, listing = _benchmark_units(Path(against))
    open_stage(out, SETTINGS, {"max_distance": max_distance, "against": listing}, list(training))
    hashing = Stage(
        "benchmark hashes", out / "benchmark", units, _HashUnit(out), partial(_is_hashed, out), unit="parts"
    )
    work = _CleanShard(out, list(units), max_distance)
    return [hashing, Stage("decontaminate", out, training, work, partial(_is_clean, out))]


def _benchmark_units(against: Path) -> tuple[dict[str, list[Path]], str]:
    """Benchmark files in parts that are hashed together (a tar, or up to 1,000 pictures), and a digest of their names
    and sizes."""
    if not against.exists():
        raise UserError(f"{against}: no such file or folder of benchmark pictures")
    files = sorted(p for p in against.rglob("*") if p.is_file()) if against.is_dir() else [against]
    tars = [path for path in files if path.suffix == ".tar"]
    pictures = [path for path in files if path.suffix.lower() in _PICTURES]
    if not tars and not pictures:
        raise UserError(f"{against}: no pictures ({', '.join(_PICTURES)}) and no tars of them")
    parts = [[tar] for tar in tars] + [
        pictures[begin : begin + _FILES_AT_ONCE] for begin in range(0, len(pictures), _FILES_AT_ONCE)
    ]
    sizes = "".join(f"{path.relative_to(against)} {path.stat().st_size}\n" for path in tars + pictures)
    digest = hashlib.sha256(sizes.encode("utf-8", "surrogateescape")).hexdigest()
    return {f"{number:05d}": part for number, part in enumerate(parts)}, digest


def _hashes_path(out: Path, unit: str) -> Path:
    return out / "benchmark" / f"{unit}.npz"


def _is_hashed(out: Path, unit: str) -> bool:
    return _hashes_path(out, unit).is_file()


@dataclass(frozen=True)
class _HashUnit:
    """Hashes a part of the benchmark; picklable."""

    out: Path

    def __call__(self, name: str, files: Sequence[Path]) -> None:
        names, hashes = [], []
        for picture, data in _pictures_of(files):
            try:
                hashes.append(picture_hashes(data, _CUTS))
            except UnreadablePicture as error:
                raise UserError(
                    f"{picture}: this benchmark picture cannot be decoded ({error}); mend or remove it, "
                    f"delete {self.out} and run the same command again"
                ) from None
            names.append(picture)
        if not names:
            raise UserError(f"{files[0]}: holds no benchmark pictures; remove it")
        with atomic_path(_hashes_path(self.out, name)) as temporary:
            np.savez(temporary, names=np.array(names, np.str_), hashes=np.stack(hashes))


def _pictures_of(files: Sequence[Path]) -> Iterator[tuple[str, bytes]]:
    for path in files:
        if path.suffix == ".tar":
            with TarIndex(path) as index:
                for member in filter(_is_picture, index.members):
                    yield f"{path}/{member}", index.read(member)
        else:
            yield str(path), path.read_bytes()


def _is_picture(name: str) -> bool:
    return name.lower().endswith(_PICTURES)


@lru_cache(maxsize=1)
def _benchmark(out: Path, units: tuple[str, ...]) -> tuple[list[str], Hashes]:
    """Name of each benchmark hash, and the hashes: one for each picture and cut."""
    names: list[str] = []
    hashes: list[npt.NDArray[np.uint64]] = []
    for unit in units:
        with open_npz(_hashes_path(out, unit), cure=REDO) as file:
            of_unit = file.read_texts("names")
            names += [name for name in of_unit for _ in _CUTS]
            hashes.append(file.read("hashes", np.uint64, ndim=2, length=len(of_unit)).ravel())
    return names, np.concatenate(hashes)


@dataclass(frozen=True)
class _CleanShard:
    """Copies one shard without what matches the benchmark; picklable."""

    out: Path
    units: list[str]
    max_distance: int

    def __call__(self, name: str, shard: PoolShard) -> None:
        assert shard.images is not None
        with TarIndex(shard.images) as index:
            drops = Counter({"duplicate_file": len(index.repeated), "long_name": 0, "undecodable_image": 0})
            hashes = self._hashes(index, drops)
            removed = self._matches(hashes, name)
            unwanted = {member for member in index.members if _is_picture(member)} - hashes.keys()
            keys = {_key(member) for member in unwanted} | {row[0] for row in removed}
            kept = [member for member in index.members if _key(member) not in keys]
            drops["long_name"] = sum(not fits_tar_name(member) for member in kept)
            kept = [member for member in kept if fits_tar_name(member)]
            images = sum(map(_is_picture, kept))
            if images:
                if shard.captions is not None:
                    write_matched(self.out / f"{name}.parquet", _rows_without(shard.captions, keys))
                with atomic_path(self.out / f"{name}.tar") as temporary:
                    write_tar(temporary, ((member, index.read(member)) for member in kept))
        with atomic_path(_removed_path(self.out, name)) as temporary:
            _write_csv(temporary, removed)
        pictures = len(hashes) + drops["undecodable_image"]
        stats = {"pictures": pictures, "images": images, "removed": len(removed), "drops": dict(+drops)}
        write_json(stats_path(self.out, name), stats)

    def _hashes(self, index: TarIndex, drops: Counter[str]) -> dict[str, np.uint64]:
        """Hash of each picture that can be decoded, by member."""
        found = {}
        for member in filter(_is_picture, index.members):
            try:
                found[member] = picture_hashes(index.read(member))[0]
            except UnreadablePicture:
                drops["undecodable_image"] += 1
        return found

    def _matches(self, hashes: Mapping[str, np.uint64], shard: str) -> list[tuple[str, str, int, str]]:
        """Rows of the report: pictures near one of the benchmark."""
        names, against = _benchmark(self.out, tuple(self.units))
        index, distance = nearest(np.array(list(hashes.values()), np.uint64), against)
        return [
            (_key(member), names[i], int(bits), shard)
            for member, i, bits in zip(hashes, index, distance, strict=True)
            if bits <= self.max_distance
        ]


def _key(member: str) -> str:
    return member.rpartition(".")[0]


def _rows_without(path: Path, keys: set[str]) -> pa.Table:
    try:
        table = pq.read_table(path, partitioning=None)
        return table.filter(pc.invert(pc.is_in(table["key"], pa.array(sorted(keys), table["key"].type))))
    except (pa.ArrowException, OSError, KeyError) as error:
        raise UserError(f"{path}: cannot be read as the rows of a training shard ({error})") from None


def _removed_path(out: Path, shard: str) -> Path:
    return out / "removed" / f"{shard}.csv"


def _is_clean(out: Path, shard: str) -> bool:
    stats = stats_path(out, shard)
    if not (stats.is_file() and _removed_path(out, shard).is_file()):
        return False
    return (out / f"{shard}.tar").is_file() or read_json(stats, _Stats, cure=REDO).images == 0


def _write_csv(path: Path, rows: Iterable[Sequence[Any]]) -> None:
    with open(path, "w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(_HEADER)
        writer.writerows(rows)


def _read_csv(path: Path) -> Iterator[Sequence[str]]:
    with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file:
        yield from list(csv.reader(file))[1:]
