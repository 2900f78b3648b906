"""``mc2 data pack`` killed in the middle: the same command completes the same bytes."""

import subprocess
import sys

import pyarrow.parquet as pq

from tests.holding import held
from tests.ingestion.sources import picture, write_files
from tests.killing import WAIT_S, kill_when


def command(tmp_path, out):
    words = ["data", "pack", tmp_path / "t.csv", "--lang", "en", "--images-per-shard", "4", "--workers", "1", "--out"]
    return [sys.executable, "-m", "mc2_hpc.cli", *map(str, words), str(tmp_path / out)]


def test_a_killed_pack_is_continued(tmp_path, outputs):
    """An image that cannot be opened yet holds the command inside a shard until it is killed."""
    names = [f"{number:02d}.jpg" for number in range(16)]
    write_files(tmp_path, {name: picture(number) for number, name in enumerate(names)})
    write_files(tmp_path, {"t.csv": "image,text\n" + "".join(f"{name},caption {name}\n" for name in names)})
    subprocess.run(command(tmp_path, "whole"), check=True, capture_output=True, timeout=WAIT_S)
    whole = outputs(tmp_path / "whole")
    assert len([name for name in whole if name.endswith(".tar")]) == 4
    last = pq.read_table(tmp_path / "whole" / "00002.parquet")["key"].to_pylist()[-1]
    with held(tmp_path / f"{last}.jpg"):
        kill_when(command(tmp_path, "out"), lambda: any((tmp_path / "out").glob(".00002.*")))
    finished = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("0000*.tar")}
    assert len(finished) == 2, "two shards were packed before"
    subprocess.run(command(tmp_path, "out"), check=True, capture_output=True, timeout=WAIT_S)
    assert outputs(tmp_path / "out") == whole
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    assert not list((tmp_path / "out").glob(".0*")), "what the killed command was writing is still there"
