"""Takedown lists: what an entry may say, which samples it names, and that the loader leaves out those alone."""

import hashlib
import json
import pickle
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mc2_hpc.config import DataConfig
from mc2_hpc.data.loader import TrainLoader
from mc2_hpc.data.packing import write_shard
from mc2_hpc.data.takedown import Takedown, entries_of, read_list, whole_lines
from mc2_hpc.data.tokenizer import Tokenizer
from mc2_hpc.draws import hash_keys
from mc2_hpc.errors import UserError
from mc2_hpc.train_sources import TrainSource


def listing(*entries: dict[str, str]) -> Takedown:
    return Takedown.of("".join(json.dumps(entry) + "\n" for entry in entries).encode())


def test_a_list_of_every_kind_of_entry(tmp_path: Path) -> None:
    path = tmp_path / "list.jsonl"
    path.write_text('{"key": "a"}\n\n{"sha256": "' + "0" * 64 + '", "note": "17"}\n{"url": "http://x/*"}\n{"key": "ha')
    content = read_list(path)
    assert content == whole_lines(path.read_bytes()) and content.endswith(b'"http://x/*"}\n')
    assert [str(entry) for entry in entries_of(content, path)] == ["key a", f"sha256 {'0' * 64}", "url http://x/*"]
    assert Takedown.of(content).looks_inside and not listing({"key": "a"}).looks_inside


@pytest.mark.parametrize(
    "line, words",
    [
        ("000123", 'line 2: not valid JSON.*; write one of {"key"'),
        ("[12]", r"line 2: \$: expected an object, found a list; write one of"),
        ('{"key": "a", "url": "b"}', 'line 2: write one of {"key"'),
        ('{"note": "a"}', 'line 2: write one of {"key"'),
        ('{"kye": "a"}', "line 2: .* unknown key 'kye'"),
        ('{"key": 12}', "line 2: .* expected text or null, found a whole number"),
        ('{"key": ""}', "line 2: "),
        ('{"sha256": "ABC"}', "line 2: "),
        ("{", "line 2: not valid JSON"),
        ("\xff", "line 2: "),
    ],
)
def test_a_line_that_is_no_entry_is_named(line: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "list.jsonl"
    path.write_bytes(b'{"key": "a"}\n' + line.encode("latin-1") + b"\n")
    with pytest.raises(UserError, match=words) as error:
        read_list(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_keys_are_listed_in_any_normal_form() -> None:
    takedown = listing({"key": "caf\u00e9"}, {"key": "000123"})
    copy = pickle.loads(pickle.dumps(takedown))
    for key, listed in (("caf\u00e9", True), ("cafe\u0301", True), ("000123", True), ("123", False), ("cafe", False)):
        assert copy.lists_key(hash_keys([key])[0]) is takedown.lists_key(hash_keys([key])[0]) is listed
    assert not listing().lists_key(hash_keys(["a"])[0])


@pytest.mark.parametrize(
    "pattern, url, listed",
    [
        ("https://example.com/*", "https://Example.com/a?b=[1].jpg", True),
        ("https://example.com/*", "https://example.org/a", False),
        ("*://*.example.com/*", "http://cdn.example.com/x", True),
        ("*://*.example.com/*", "http://example.com/x", False),
        ("https://e.com/a?b", "https://e.com/a?b", True),
        ("https://e.com/a?b", "https://e.com/axb", False),
        ("https://e.com/a.jpg", "https://e.com/a.jpg2", False),
        ("https://E.com/A.jpg", "https://e.com/a.JPG", True),
        ("*", "", False),
    ],
)
def test_addresses(pattern: str, url: str, listed: bool) -> None:
    assert listing({"url": "none"}, {"url": pattern}).lists_content(b"", url) is listed


def test_addresses_without_a_star_are_looked_up_not_matched() -> None:
    """A pattern of a million alternatives would be tried one by one for every sample."""
    takedown = listing({"url": "http://a/1"}, {"url": "http://A/2"}).joined(listing({"url": "http://b/1"}))
    assert takedown.addresses == {"http://a/1", "http://a/2", "http://b/1"} and takedown.patterns is None
    assert takedown.looks_inside and takedown.lists_content(b"", "HTTP://a/2")
    assert not takedown.lists_content(b"", "http://b/2")


def test_lists_are_joined() -> None:
    first = {"key": "a"}, {"url": "http://x/*"}, {"url": "http://w"}
    second = {"key": "b"}, {"url": "http://y/*"}, {"sha256": hashlib.sha256(b"image").hexdigest()}
    for one, other in ((first, second), (second, first)):
        both = listing(*one).joined(listing(*other))
        assert all(both.lists_key(key_hash) for key_hash in hash_keys(["a", "b"]))
        assert both.lists_content(b"", "http://x/1") and both.lists_content(b"", "http://y/1")
        assert both.lists_content(b"", "http://w")
        assert both.lists_content(b"image", "") and not both.lists_content(b"", "http://z/1")


def test_hashes_of_images() -> None:
    takedown = listing({"sha256": hashlib.sha256(b"image").hexdigest()})
    assert takedown.lists_content(memoryview(b"image"), "") and not takedown.lists_content(b"other", "")


# In the loader

NUM = 48


@pytest.fixture(scope="module")
def images(make_jpeg: Callable[..., bytes]) -> list[bytes]:
    return [make_jpeg(20, 24, seed=n) for n in range(NUM)]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory, images: list[bytes]) -> list[TrainSource]:
    """A plain source ``a`` and a curated source ``b``; both say where images are from."""
    folder = tmp_path_factory.mktemp("shards")
    for shard in range(3):
        rows = range(shard * 16, shard * 16 + 16)
        plain = [(f"a{n}", {"jpg": images[n], "txt": b"x", "json": _record(n)}) for n in rows]
        write_shard(folder / "a" / f"{shard}.tar", plain)
        write_shard(folder / "b" / f"{shard}.tar", [(f"b{n}", {"jpg": images[n]}) for n in rows])
        table = [{"key": f"b{n}", "text": "x", "source": f"https://b.org/{n}.jpg"} for n in rows]
        pq.write_table(pa.Table.from_pylist(table), folder / "b" / f"{shard}.parquet")
    return [TrainSource(name=name, path=str(folder / name)) for name in "ab"]


def _record(number: int) -> bytes:
    """Of some samples, damaged: beside a ``.txt`` it does not matter."""
    return b"{" if number % 7 == 3 else json.dumps({"url": f"https://a.org/{number}.jpg"}).encode()


@pytest.fixture
def load(tokenizer_file: Path) -> Iterator[Callable[..., TrainLoader]]:
    """``load(train, takedown, **changes)``: a loader of three lanes."""
    made: list[TrainLoader] = []

    def make(train: Any, takedown: Takedown | None, *, position: Any = None, workers: int = 0) -> TrainLoader:
        config = DataConfig(train=train, lanes=3, workers=workers)
        sizes = {"global_batch": 6, "image_size": 16, "rank": 0, "world_size": 1}
        tokenizer = Tokenizer(tokenizer_file, "xlmv")
        made.append(TrainLoader(config, tokenizer=tokenizer, position=position, takedown=takedown, **sizes))
        return made[-1]

    yield make
    for loader in made:
        loader.close()


def keys_of(loader: TrainLoader, steps: int) -> list[str]:
    return [key for _ in range(steps) for key in next(loader).keys]


ENTRIES: dict[str, tuple[dict[str, str], set[str]]] = {
    "a key": ({"key": "a5"}, {"a5"}),
    "addresses in records": (
        {"url": "https://a.org/1*.jpg"},
        {"a1"} | {f"a{n}" for n in (11, 12, 13, 14, 15, 16, 18, 19)},
    ),
    "addresses in tables": ({"url": "https://b.org/2?.jpg"}, set()),
    "an address in a table": ({"url": "https://b.org/22.jpg"}, {"b22"}),
}


@pytest.mark.parametrize("name", ENTRIES)
def test_listed_samples_are_left_out_and_counted(name: str, load, sources: list[TrainSource]) -> None:
    entry, listed = ENTRIES[name]
    skipped: Counter[str] = Counter()
    keys: list[str] = []
    loader = load(sources, listing(entry))
    for _ in range(40):
        batch = next(loader)
        keys += batch.keys
        skipped.update(batch.skipped)
    everything = {f"{source}{number}" for source in "ab" for number in range(NUM)}
    assert set(keys) == everything - listed
    assert (skipped["taken_down"] > 0) == bool(listed) and set(skipped) <= {"taken_down"}


def test_an_image_is_left_out_of_every_source(load, sources: list[TrainSource], images: list[bytes]) -> None:
    entry = {"sha256": hashlib.sha256(images[9]).hexdigest()}
    everything = {f"{source}{number}" for source in "ab" for number in range(NUM)}
    assert set(keys_of(load(sources, listing(entry)), 40)) == everything - {"a9", "b9"}


def test_a_list_that_names_nothing_changes_nothing(load, sources: list[TrainSource]) -> None:
    """Neither do the addresses that it makes the loader read."""
    for train in (sources, sources[0].path, sources[1].path):
        assert keys_of(load(train, listing()), 20) == keys_of(load(train, None), 20)


def test_the_order_of_all_others_stays(load, sources: list[TrainSource]) -> None:
    plain = keys_of(load(sources[0].path, None), 8)  # one epoch
    listed = {"a3", "a17", "a30", "a31"}
    found = keys_of(load(sources[0].path, listing(*({"key": key} for key in listed))), 6)
    by_lane = [
        [key for n, key in enumerate(keys) if n % 6 // 2 == lane] for keys in (plain, found) for lane in range(3)
    ]
    for before, after in zip(by_lane[:3], by_lane[3:], strict=True):
        expected = [key for key in before if key not in listed]
        assert after[: len(expected)] == expected[: len(after)]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_restart_continues_exactly_without_what_is_now_listed(workers: int, load, sources: list[TrainSource]) -> None:
    """What workers had prepared is discarded, so the new list holds from the very next batch."""
    listed = {"a1", "a8", "a20", "b3", "b40"}
    takedown = listing(*({"key": key} for key in listed))
    loader = load(sources, listing(), workers=workers)
    before = [next(loader) for _ in range(4)]
    loader.restart(before[-1].position, takedown)
    after = [next(loader) for _ in range(12)]
    other = load(sources, takedown, position=before[-1].position)
    assert [batch.keys for batch in after] == [next(other).keys for _ in range(12)]
    assert not listed & {key for batch in after for key in batch.keys}
    uninterrupted = [key for batch in before for key in batch.keys]
    assert uninterrupted == keys_of(load(sources, None), 4)


def test_after_a_restart_that_fails_nothing_comes(load, sources: list[TrainSource]) -> None:
    """Neither the rest of what was prepared with the old list, nor the data from its start."""
    loader = load(sources, listing())
    batch = next(loader)
    with pytest.raises(UserError, match="lanes cannot change during a run"):
        loader.restart({lane: batch.position[lane] for lane in (0, 1)}, listing())
    assert list(loader) == []


def test_when_everything_is_listed_the_run_ends_with_one_line(load, sources: list[TrainSource]) -> None:
    takedown = listing(*({"key": f"a{number}"} for number in range(NUM)))
    with pytest.raises(UserError, match="no sample can be used; everything was skipped: taken_down 48"):
        next(load(sources[0].path, takedown))
