"""Fetching images from a server on this machine, beside img2dataset: images per second, with and without resizing.

    python -m benchmarks.bench_fetch [--quick] [--json FILE]

Server and clients share the machine's cores, and the server sends prepared bytes. Both programs run as commands, from
the list of addresses to tars, start-up included, with one worker per core, alternately. With resizing, images whose
longest side is over 512 pixels become JPEGs of quality 90 and the others keep their bytes.

The peer is an ``img2dataset`` command on PATH, or the one that the variable IMG2DATASET names; it needs other versions
of several packages, so it is best installed into an environment of its own. Without it, only our rates are measured.
"""

import asyncio
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import simplejpeg

from benchmarks.harness import ROOT, main, own_command, spread

SIZES = {(320, 240): 2, (480, 360): 2, (640, 480): 2, (800, 600): 1, (1024, 768): 1}
"""How many of eight images have a size: half are over 512 pixels."""
VARIANTS = 4
LONGEST = 512
QUALITY = 80
_SHARDS = 8
_LIMIT_S = 900


def run(quick: bool) -> dict[str, Any]:
    """Rows of each program for whole and resized images."""
    number, rounds = (400, 1) if quick else (24_000, 3)
    cores = len(os.sched_getaffinity(0))
    bodies = draw_bodies()
    peer = os.environ.get("IMG2DATASET") or shutil.which("img2dataset")
    rows, ratios = [], {}
    with tempfile.TemporaryDirectory() as name, serving(Path(name), bodies) as port:
        folder = Path(name)
        pool = write_pool(folder / "pool", port, number)
        for what, longest in (("whole", None), ("resized", LONGEST)):
            commands: dict[str, Callable[[], None]] = {"mc2": partial(_ours, pool, folder / "ours", longest, cores)}
            if peer:
                commands["img2dataset"] = partial(_peer, peer, pool, folder / "peer", longest, cores, number)
            rates = _rates(commands, number, rounds)
            for who, samples in rates.items():
                rows.append({"who": who, "images": what, "unit": "images / s", **spread(samples), "samples": samples})
            prefix = "" if longest is None else "resized_"
            ours = spread(rates["mc2"])["median"]
            ratios[f"{prefix}images_per_second"] = ours
            if peer:
                ratios[f"{prefix}vs_img2dataset"] = ours / spread(rates["img2dataset"])["median"]
    return {
        "config": {
            "images": number,
            "sizes": {f"{width}x{height}": count for (width, height), count in SIZES.items()},
            "mean_bytes": round(sum(map(len, bodies)) / len(bodies)),
            "jpegs": f"1/f clouds, quality {QUALITY}",
            "longest": LONGEST,
            "workers": cores,
            "peer": _version(peer),
        },
        "rows": rows,
        "ratios": ratios,
    }


def draw_bodies() -> list[bytes]:
    """JPEGs of clouds with the spectrum of photographs, amplitude 1/f."""
    rng = np.random.default_rng(0)
    bodies = []
    for (width, height), count in SIZES.items():
        frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
        frequency[0, 0] = np.inf
        for _ in range(count * VARIANTS):
            phases = rng.uniform(0, 2 * np.pi, (3, *frequency.shape))
            colours = np.fft.irfft2(np.exp(1j * phases) / frequency, s=(height, width))
            pixels = 0.8 * colours[:1] + 0.2 * colours  # the channels of photographs are strongly correlated
            pixels = (128 + 40 * pixels / pixels.std()).clip(0, 255).astype(np.uint8)
            array = np.ascontiguousarray(pixels.transpose(1, 2, 0))
            bodies.append(simplejpeg.encode_jpeg(array, quality=QUALITY, colorsubsampling="420"))
    return [bodies[index] for index in rng.permutation(len(bodies))]


def write_pool(pool: Path, port: int, number: int) -> Path:
    """Shards of addresses, each once; also the peer's input, which reads the same columns."""
    pool.mkdir()
    for shard, numbers in enumerate(np.array_split(np.arange(number), _SHARDS)):
        keys = [f"{one:08d}" for one in numbers]
        sources = [f"http://127.0.0.1:{port}/{one}.jpg" for one in numbers]
        table = pa.table({"key": keys, "text": [f"image {key}" for key in keys], "source": sources})
        pq.write_table(table, pool / f"{shard}.parquet")
    return pool


def _rates(commands: dict[str, Callable[[], None]], number: int, rounds: int) -> dict[str, list[float]]:
    rates: dict[str, list[float]] = {who: [] for who in commands}
    for _ in range(rounds):
        for who, command in commands.items():
            begin = time.perf_counter()
            command()
            rates[who].append(number / (time.perf_counter() - begin))
    return rates


def _ours(pool: Path, out: Path, longest: int | None, cores: int) -> None:
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "mc2_hpc.cli", "curate", "fetch", str(pool), "--out", str(out)]
    command += ["--workers", str(cores), "--allow-addresses", "127.0.0.1", "--host-rate", "0"]
    command += ["--host-connections", "64", *(["--resize", str(longest)] if longest else [])]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=_LIMIT_S)
    assert not json.loads(done.stdout)["drops"]


def _peer(program: str, pool: Path, out: Path, longest: int | None, cores: int, number: int) -> None:
    shutil.rmtree(out, ignore_errors=True)
    flags = {
        **{"url_list": pool, "input_format": "parquet", "url_col": "source", "caption_col": "text"},
        **{"output_folder": out, "output_format": "webdataset", "number_sample_per_shard": -(-number // _SHARDS)},
        **{"processes_count": cores, "thread_count": 64, "extract_exif": False},
        "resize_mode": "keep_ratio_largest" if longest else "no",
    }
    if longest:
        flags |= {"image_size": longest, "resize_only_if_bigger": True, "skip_reencode": True, "encode_quality": 90}
    else:
        flags |= {"disable_all_reencoding": True}
    command = [program, *(f"--{name}={value}" for name, value in flags.items())]
    environment = {**os.environ, "NO_ALBUMENTATIONS_UPDATE": "1"}  # it looks for a newer version
    subprocess.run(command, check=True, capture_output=True, timeout=_LIMIT_S, env=environment)
    successes = sum(json.loads(path.read_text())["successes"] for path in out.glob("*_stats.json"))
    assert successes == number, f"img2dataset fetched {successes} of {number} images"


def _version(program: str | None) -> str | None:
    """The peer's version, from its own environment."""
    if program is None:
        return None
    python = Path(program).resolve().parent / "python"
    code = "from importlib.metadata import version; print('img2dataset', version('img2dataset'))"
    done = subprocess.run([str(python), "-c", code], capture_output=True, text=True, timeout=60)
    return done.stdout.strip() or "img2dataset"


@contextmanager
def serving(folder: Path, bodies: Sequence[bytes]) -> Iterator[int]:
    """A server of ``bodies`` in its own process; yields its port."""
    for number, body in enumerate(bodies):
        (folder / f"{number}.jpg").write_bytes(body)
    command = [*own_command(__file__), "--serve", str(folder), str(len(bodies))]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield int(process.stdout.readline())
    finally:
        process.kill()
        process.wait()


class _Server(asyncio.Protocol):
    """Answers every request for ``/<number>.jpg`` with one of the bodies."""

    answers: list[bytes]

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._received = b""

    def data_received(self, data: bytes) -> None:
        self._received += data
        while b"\r\n\r\n" in self._received:
            head, _, self._received = self._received.partition(b"\r\n\r\n")
            number = int(head.split(b" ", 2)[1].strip(b"/").partition(b".")[0])
            self._transport.write(self.answers[number % len(self.answers)])
            if b"connection: close" in head.lower():
                self._transport.close()


def serve(folder: Path, number: int) -> None:
    """Serve the images of ``folder`` until killed; prints the port."""
    for one in range(number):
        body = (folder / f"{one}.jpg").read_bytes()
        head = f"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\nContent-Length: {len(body)}\r\n\r\n"
        _Server.answers = [*getattr(_Server, "answers", []), head.encode() + body]

    async def forever() -> None:
        server = await asyncio.get_running_loop().create_server(_Server, "127.0.0.1", 0, backlog=1024)
        print(server.sockets[0].getsockname()[1], flush=True)
        await server.serve_forever()

    asyncio.run(forever())


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(Path(sys.argv[2]), int(sys.argv[3]))
    else:
        main("fetch", run)
