"""The search for copies among all shards, in independent parts, and the choice of the copy that stays."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mc2_hpc.curation.copies.features import NUM_PROJECTIONS, centre_of, feature_codes
from mc2_hpc.curation.copies.hashes import (
    FEATURES,
    PROJECTIONS,
    Hash,
    HashStats,
    map_codes,
    read_images,
    write_codes,
)
from mc2_hpc.curation.copies.linking import (
    Entries,
    Forest,
    bucket_hashes,
    collapse,
    collapse_crowded,
    join,
    link,
    links_of,
    new_forest,
    roots_of,
)
from mc2_hpc.curation.copies.tables import table_masks
from mc2_hpc.errors import UserError
from mc2_hpc.jobs import stats_path
from mc2_hpc.reading.arrays import map_array
from mc2_hpc.reading.json_file import read_json
from mc2_hpc.storage import write_array, write_csv, write_json

CODES_PER_GB = 1 << 23
"""Codes that a gigabyte holds, with what searching them needs."""
COPIES, REPORT = "{shard}.npy", "{shard}.csv"
"""Per shard, the rows of the images to remove, and a table of them for people."""
_HEADER = ("key", "kept", "kept_shard")
_CURE = "delete its folder and run the same command again"


def first_images(hashed: Path, shards: Sequence[str]) -> npt.NDArray[np.int64]:
    """The number of each shard's first image among all, ``(shards + 1,)``; the last is the number of images."""
    counts = [read_json(stats_path(hashed, name), HashStats).images_read for name in shards]
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])


@dataclass(frozen=True)
class WriteCentre:
    """Writes the centre of the projections of all images."""

    hashed: Path
    out: Path
    shards: list[str]

    def __call__(self, name: str, value: None) -> None:
        projections = (_map_projections(self.hashed, shard) for shard in self.shards)
        write_array(self.out / f"{name}.npy", centre_of(projections))


@dataclass(frozen=True)
class FeatureCodes:
    """Turns a shard's projections into codes."""

    hashed: Path
    out: Path
    """Folder of the centre, and of the codes."""

    def __call__(self, name: str, value: None) -> None:
        centre = map_array(self.out / "centre.npy", np.int64, length=NUM_PROJECTIONS, cure=_CURE)
        rows = np.flatnonzero(np.asarray(read_images(self.hashed, name)["reason"].is_null()))
        projections = _map_projections(self.hashed, name)
        if len(projections) != len(rows):
            raise UserError(f"{self.hashed}: shard {name} has projections of other images; delete the folder")
        write_codes(self.out, name, FEATURES, [feature_codes(projections, centre, rows)])


def _map_projections(hashed: Path, shard: str) -> npt.NDArray[np.int32]:
    path = hashed / PROJECTIONS.format(shard=shard)
    projections = map_array(path, np.int32, ndim=2, cure=_CURE)
    if projections.shape[1:] != (NUM_PROJECTIONS,):
        raise UserError(f"{path}: not {NUM_PROJECTIONS} projections of each image; {_CURE}")
    return projections


@dataclass(frozen=True)
class SearchPart:
    """Does one of ``parts`` equal shares of the search, and writes the links that it found."""

    hashed: Path
    out: Path
    shards: list[str]
    hashes: list[tuple[Path, Hash]]
    """Each kind, and the folder of its codes."""
    parts: int
    codes_at_once: int = 2 * CODES_PER_GB
    """Codes in memory at a time; the result does not depend on it."""

    def __call__(self, name: str, part: int) -> None:
        first = first_images(self.hashed, self.shards)
        if first[-1] >= 1 << 32:
            raise UserError(f"{self.hashed}: {first[-1]:,} images; divide the pool into parts of at most 4 billion")
        forest = new_forest(int(first[-1]))
        for folder, kind in self.hashes:
            self._search(folder, first, kind, part, forest)
        write_array(self.out / f"{name}.npy", links_of(forest))

    def _search(self, folder: Path, first: npt.NDArray[np.int64], kind: Hash, part: int, forest: Forest) -> None:
        def codes() -> Iterator[Entries]:
            # One shard at a time: pages of a file that is mapped count as the process's memory.
            return (map_codes(folder, shard, kind.name) for shard in self.shards)

        num_codes = sum(map(len, codes()))
        masks = table_masks(kind.max_distance, num_codes)
        slices = max(1, -(-num_codes // self.codes_at_once))
        tasks = range(part, len(masks) * slices, self.parts)
        everything = collapse(_gather(codes(), first, masks[0], 0, 1), forest) if slices == 1 and len(tasks) else None
        for task in tasks:
            mask, number = masks[task // slices], task % slices
            entries = everything
            if entries is None:  # a slice serves one mask alone: collapsing all of it would cost more than the search
                entries = collapse_crowded(_gather(codes(), first, mask, number, slices), mask, forest)
            link(entries, mask, forest, max_distance=kind.max_distance, max_check=kind.max_check)


def _gather(
    codes: Iterator[Entries], first: npt.NDArray[np.int64], mask: np.uint64, number: int, slices: int
) -> Entries:
    """The codes in one of ``slices`` slices, which keep together the hashes that agree in ``mask``."""
    found = []
    for start, of_shard in zip(first[:-1], codes, strict=True):
        if slices > 1:
            buckets = bucket_hashes(np.ascontiguousarray(of_shard["words"][:, 0]), mask)
            of_shard = of_shard[buckets % np.uint64(slices) == number]
        of_shard = np.array(of_shard)  # from the file to memory
        of_shard["image"] += np.uint32(start)
        found.append(of_shard)
    return np.concatenate(found)


@dataclass(frozen=True)
class GroupCopies:
    """Joins the links of all parts to groups, and chooses the copy of each that stays.

    The copy with the most pixels stays; of several, the largest file; of several, the one whose key comes first.
    """

    hashed: Path
    links: Path
    """Folder of the links, and where counters are written at the end."""
    out: Path
    """Folder of what to remove: :data:`COPIES` and :data:`REPORT`."""
    shards: list[str]
    parts: list[str]

    def __call__(self, name: str, value: None) -> None:
        first = first_images(self.hashed, self.shards)
        forest = new_forest(int(first[-1]))
        for part in self.parts:
            links = map_array(self.links / f"{part}.npy", np.int64, ndim=2, cure=_CURE)
            if links.shape[1:] != (2,) or (len(links) and not 0 <= links.min() <= links.max() < len(forest)):
                raise UserError(f"{self.links / part}.npy: not links of {len(forest):,} images; {_CURE}")
            join(forest, links)
        roots = roots_of(forest)
        sizes = np.bincount(roots, minlength=len(roots))
        members = self._ranked(first, roots, sizes[roots] > 1)
        self._write(members)
        groups = sizes[sizes > 1]
        write_json(self.links / f"{name}.json", {"groups": len(groups), "largest_group": int(groups.max(initial=0))})

    def _ranked(
        self, first: npt.NDArray[np.int64], roots: npt.NDArray[np.int64], in_group: npt.NDArray[np.bool_]
    ) -> pa.Table:
        """Images with copies, group by group, the one that stays first."""
        tables = []
        for number, shard in enumerate(self.shards):
            rows = np.flatnonzero(in_group[first[number] : first[number + 1]])
            images = read_images(self.hashed, shard).take(pa.array(rows)).drop_columns(["reason"])
            images = images.append_column("shard", pa.array(np.full(len(rows), number)))
            images = images.append_column("row", pa.array(rows))
            tables.append(images.append_column("root", pa.array(roots[first[number] + rows])))
        ranking = [("root", "ascending"), ("pixels", "descending"), ("bytes", "descending"), ("key", "ascending")]
        return pa.concat_tables(tables).sort_by([*ranking, ("shard", "ascending"), ("row", "ascending")])

    def _write(self, members: pa.Table) -> None:
        """The images to remove, and what stays in their place, shard by shard."""
        root, shard, row = (np.asarray(members[name]) for name in ("root", "shard", "row"))
        is_first = np.diff(root, prepend=-1) != 0
        stays = np.maximum.accumulate(np.where(is_first, np.arange(len(root)), 0))
        removed = np.flatnonzero(~is_first)
        removed = removed[np.lexsort((row[removed], shard[removed]))]
        bounds = np.searchsorted(shard[removed], np.arange(len(self.shards) + 1))
        keys = members["key"].combine_chunks()
        for number, name in enumerate(self.shards):
            gone = removed[bounds[number] : bounds[number + 1]]
            kept = stays[gone]
            of_shard = [self.shards[index] for index in shard[kept]]
            rows = zip(
                keys.take(pa.array(gone)).to_pylist(), keys.take(pa.array(kept)).to_pylist(), of_shard, strict=True
            )
            write_csv(self.out / REPORT.format(shard=name), _HEADER, rows)
            write_array(self.out / COPIES.format(shard=name), row[gone])


def rows_to_remove(folder: Path, shard: str) -> npt.NDArray[np.int64]:
    """The rows, in :func:`~mc2_hpc.curation.copies.hashes.read_images`, of images whose copy stays elsewhere."""
    return map_array(folder / COPIES.format(shard=shard), np.int64, cure=_CURE)
