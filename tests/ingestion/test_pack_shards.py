"""WebDataset shards, and folders written by Hugging Face's ``datasets``, as training shards."""

import io
import json
import tracemalloc

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mc2_hpc.errors import UserError
from mc2_hpc.ingestion.columns import Columns
from mc2_hpc.ingestion.image_files import ImageFolder
from mc2_hpc.ingestion.rows import cut_rows, part_samples
from mc2_hpc.ingestion.samples import PackOptions
from mc2_hpc.tar import write_tar
from tests.ingestion.sources import pack, picture, read_back


@pytest.fixture(scope="module")
def datasets():
    """The real package, without its progress bars."""
    package = pytest.importorskip("datasets", reason="Hugging Face's datasets is not installed (mc2_hpc[dev])")
    package.disable_progress_bars()
    return package


def dataset(datasets, count: int, **columns):
    images = [Image.new("RGB", (20, 20), (9 * number, 0, 0)) for number in range(count)]
    found = datasets.Dataset.from_dict({"image": images, **columns})
    return found.cast_column("image", datasets.Image())


def colours(folder) -> dict[str, int]:
    """Key -> the red of its image."""
    return {key: np.asarray(Image.open(io.BytesIO(data)))[0, 0, 0] for key, (data, _) in read_back(folder).items()}


@pytest.mark.parametrize("layout", ["saved", "parquet"])
def test_a_datasets_folder(tmp_path, datasets, layout):
    """As ``save_to_disk`` and ``push_to_hub`` write it, in several files."""
    captions = [[f"number {number}", f"Zahl {number}"] for number in range(25)]
    data = dataset(datasets, 25, caption=captions, id=list(range(25)), lang=["en"] * 25)
    if layout == "saved":
        data.save_to_disk(tmp_path / "data", num_shards=2)
    else:
        for part in range(2):
            path = tmp_path / "data" / "data" / f"train-{part:05d}-of-00002.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            data.shard(2, part, contiguous=True).to_parquet(path)
    counters = pack(tmp_path / "data", tmp_path / "out")
    found = read_back(tmp_path / "out")
    assert list(found) == [f"{number:09d}" for number in range(25)]
    assert found["000000007"][1] == [("Zahl 7", "en"), ("number 7", "en")]
    assert list(colours(tmp_path / "out").values()) == [9 * number for number in range(25)]
    assert counters["images"] == 25 and counters["texts"] == 50 and not counters["drops"]
    assert sorted(path.name for path in (tmp_path / "out").glob("*.tar")) == ["00000.tar", "00001.tar"]


def test_selected_rows_and_translations(tmp_path, datasets):
    """A dataset that was shuffled and filtered is saved as it is; a caption for each language is kept with it."""
    texts = [{"en": f"number {number}", "de": f"Zahl {number}"} for number in range(9)]
    data = dataset(datasets, 9, caption=texts)
    data.shuffle(seed=1).select(range(4)).save_to_disk(tmp_path / "data")
    pack(tmp_path / "data", tmp_path / "out", PackOptions())
    found = read_back(tmp_path / "out")
    assert len(found) == 4 and all({lang for _, lang in texts} == {"de", "en"} for _, texts in found.values())
    reds = colours(tmp_path / "out")
    assert all(f"number {red // 9}" in dict(found[key][1]) for key, red in reds.items())


def test_splits_have_to_be_chosen(tmp_path, datasets):
    data = dataset(datasets, 3, caption=["a", "b", "c"])
    datasets.DatasetDict({"train": data, "test": data}).save_to_disk(tmp_path / "both")
    with pytest.raises(UserError, match="both: holds several splits; name one of .*both/train, .*both/test"):
        pack(tmp_path / "both", tmp_path / "out")
    assert pack(tmp_path / "both" / "train", tmp_path / "out")["images"] == 3
    (tmp_path / "hub").mkdir()
    for split in ("train", "test"):
        data.to_parquet(tmp_path / "hub" / f"{split}-00000-of-00001.parquet")
    with pytest.raises(UserError, match=r"holds several splits \(test, train\); name the files of one.*train-\*"):
        pack(tmp_path / "hub", tmp_path / "out2")
    assert pack(str(tmp_path / "hub" / "train-*.parquet"), tmp_path / "out2")["images"] == 3


def test_rows_of_bytes_with_keys_and_repeated_images(tmp_path):
    """One row per caption, as flattened sets have it: adjacent rows of an image are one sample."""
    images = [picture(1), picture(1), picture(2), b"damaged", None, picture(3)]
    columns = {"jpg": images, "key": ["a", "a", "b", "c", "d", "b"], "text": ["one", "two", "three", "x", "x", "x"]}
    pq.write_table(pa.table(columns), tmp_path / "t.parquet", row_group_size=2)
    counters = pack(tmp_path / "t.parquet", tmp_path / "out", images_per_shard=100)
    assert read_back(tmp_path / "out") == {
        "a": (picture(1), [("one", "en"), ("two", "en")]),
        "b": (picture(2), [("three", "en")]),
    }
    assert counters["drops"] == {"not_an_image": 1, "image_missing": 1, "image_repeated": 1}


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_no_shard_has_more_rows_than_asked_for(tmp_path, kind):
    """However the file is divided; the rows of an image stay together where a shard ends between them."""
    keys = ["a", "b", "c", "c", "c", "c", "d", "e", "f", "g", "g"]
    data = {key: picture(number) for number, key in enumerate("abcdefg")}
    texts = [f"text {number}" for number in range(len(keys))]
    table = pa.table({"image": [data[key] for key in keys], "key": keys, "text": texts})
    if kind == "parquet":
        pq.write_table(table, tmp_path / "t.parquet", row_group_size=5)
    else:
        with pa.ipc.new_stream(tmp_path / "t.arrow", table.schema) as stream:
            stream.write_table(table, max_chunksize=5)
    counters = pack(tmp_path / f"t.{kind}", tmp_path / "out", images_per_shard=3)
    assert counters["images"] == 7 and counters["texts"] == 11 and not counters["drops"]
    shards = {path.stem: pq.read_table(path)["key"].to_pylist() for path in (tmp_path / "out").glob("*.parquet")}
    assert shards == {"00000": list("abcccc"), "00002": list("def"), "00003": list("gg")}
    pack(tmp_path / f"t.{kind}", tmp_path / "whole")
    assert read_back(tmp_path / "out") == read_back(tmp_path / "whole")


def test_rows_without_keys_are_cut_to_size(tmp_path):
    pq.write_table(
        pa.table({"image": [picture(n) for n in range(8)], "text": list("abcdefgh")}), tmp_path / "t.parquet"
    )
    pack(tmp_path / "t.parquet", tmp_path / "out", images_per_shard=3)
    shards = {path.stem: pq.read_table(path)["text"].to_pylist() for path in (tmp_path / "out").glob("*.parquet")}
    assert shards == {"00000": list("abc"), "00001": list("def"), "00002": list("gh")}
    assert list(read_back(tmp_path / "out")) == [f"{number:09d}" for number in range(8)]


def test_an_image_is_its_bytes_whatever_its_path(tmp_path):
    """Each row of a flattened set may have another name for the same bytes."""
    image = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    rows = [{"bytes": picture(1), "path": path} for path in ("one.jpg", "two.jpg")]
    table = pa.table({"image": pa.array(rows, image), "key": ["a", "a"], "text": ["x", "y"]})
    pq.write_table(table, tmp_path / "t.parquet")
    assert not pack(tmp_path / "t.parquet", tmp_path / "out")["drops"]
    assert read_back(tmp_path / "out") == {"a": (picture(1), [("x", "en"), ("y", "en")])}


def test_the_image_of_many_rows_is_held_once(tmp_path):
    image, rows = bytes(1 << 18), 400
    table = pa.table({"image": [image] * rows, "key": ["a"] * rows, "text": [f"text {n}" for n in range(rows)]})
    pq.write_table(table, tmp_path / "t.parquet")
    del table
    (part,) = cut_rows([tmp_path / "t.parquet"], Columns(), rows)
    tracemalloc.start()
    try:
        (sample,) = part_samples(part, Columns(), ImageFolder(tmp_path, False))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert sample.image() == image and len(sample.captions()) == rows
    assert peak < 0.5 * rows * len(image)


def test_rows_that_name_their_image_by_path(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(picture(1))
    (tmp_path / "b.jpg").write_bytes(picture(2))
    image = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    rows = [{"bytes": None, "path": path} for path in ("a.jpg", "../b.jpg", "gone.jpg")]
    table = pa.table({"image": pa.array(rows, image), "text": ["x", "y", "z"]})
    with pa.ipc.new_stream(tmp_path / "t.arrow", table.schema) as stream:
        stream.write_table(table)
    counters = pack(tmp_path / "t.arrow", tmp_path / "out", images=tmp_path / "photos")
    assert read_back(tmp_path / "out") == {"000000000": (picture(1), [("x", "en")])}
    assert counters["drops"] == {"name_unsafe": 1, "image_missing": 1}


@pytest.mark.parametrize("damage", [0.3, 0.9])
def test_a_damaged_arrow_file_is_one_line(tmp_path, damage):
    table = pa.table({"image": [picture(number) for number in range(20)], "text": ["x"] * 20})
    with pa.ipc.new_stream(tmp_path / "t.arrow", table.schema) as stream:
        stream.write_table(table, max_chunksize=5)
    data = (tmp_path / "t.arrow").read_bytes()
    (tmp_path / "t.arrow").write_bytes(data[: int(damage * len(data))])
    with pytest.raises(UserError, match="t.arrow: cannot be read as an Arrow stream"):
        pack(tmp_path / "t.arrow", tmp_path / "out")


def test_offsets_that_point_anywhere_are_an_error(tmp_path):
    """The lengths of strings come from the file, so they are checked before a string is read."""
    table = pa.table({"image": [picture(1)], "text": ["caption"]})
    with pa.ipc.new_stream(tmp_path / "t.arrow", table.schema) as stream:
        stream.write_table(table)
    data = (tmp_path / "t.arrow").read_bytes()
    end = data.rindex(b"caption")
    length = data.rindex((7).to_bytes(4, "little"), 0, end)
    (tmp_path / "t.arrow").write_bytes(data[:length] + (1 << 30).to_bytes(4, "little") + data[length + 4 :])
    with pytest.raises(UserError, match="t.arrow: damaged"):
        pack(tmp_path / "t.arrow", tmp_path / "out")


def test_an_index_of_rows_is_refused(tmp_path):
    state = {"_data_files": [{"filename": "d.arrow"}], "_indices_data_files": [{"filename": "i.arrow"}]}
    (tmp_path / "state.json").write_text(json.dumps(state))
    with pytest.raises(UserError, match="rows are selected by an index; save it again after flatten_indices"):
        pack(tmp_path, tmp_path / "out")
    (tmp_path / "state.json").write_text(json.dumps({"_data_files": [{"filename": "../d.arrow"}]}))
    with pytest.raises(UserError, match="names no data files, or files in other folders"):
        pack(tmp_path, tmp_path / "out")


def test_two_columns_of_images(tmp_path):
    pq.write_table(pa.table({"a": [picture(1)], "b": [picture(2)], "text": ["x"]}), tmp_path / "t.parquet")
    with pytest.raises(UserError, match="columns with images: a, b; name one with --image-column"):
        pack(tmp_path / "t.parquet", tmp_path / "out")
    pack(tmp_path / "t.parquet", tmp_path / "out", columns=Columns(image="b"))
    assert read_back(tmp_path / "out") == {"000000000": (picture(2), [("x", "en")])}


def test_webdataset_shards(tmp_path):
    """As img2dataset leaves them, nested, with a Parquet file that has no keys' texts; one has a table of captions."""
    (tmp_path / "pool" / "deep").mkdir(parents=True)
    record = json.dumps({"url": "http://example.org/1.jpg", "caption": "from json", "lang": "fr"})
    write_tar(
        tmp_path / "pool" / "00000.tar",
        [
            ("000000000.jpg", picture(1)),
            ("000000000.json", record.encode()),
            ("000000000.txt", b"a cat"),
            ("b.input.webp", picture(2, "WEBP")),
            ("b.outputs.json", b'{"texts": [["alt", "ein Hund"]], "lang": "de"}'),
            ("c.jpg", picture(3)),
            ("d.txt", b"no image"),
            ("../e.jpg", picture(4)),
            ("f.jpg", picture(5)),
            ("f.json", b"{}"),
        ],
    )
    rows = pa.table({"url": ["http://example.org/1.jpg"], "key": ["000000000"], "caption": ["a cat"]})
    pq.write_table(rows, tmp_path / "pool" / "00000.parquet")
    counters = pack(tmp_path / "pool", tmp_path / "out")
    assert read_back(tmp_path / "out") == {
        "000000000": (picture(1), [("a cat", "fr")]),
        "b": (picture(2, "WEBP"), [("ein Hund", "de")]),
    }
    assert counters["drops"] == {"name_unsafe": 1, "caption_missing": 2, "image_missing": 1}

    write_tar(
        tmp_path / "pool" / "deep" / "1.tar", [(f"{key}.jpg", picture(number)) for number, key in enumerate("xyz")]
    )
    captions = pa.table({"key": ["x", "x", "y", "w", "y"], "text": ["one", "two", "three", "four", " "]})
    pq.write_table(captions, tmp_path / "pool" / "deep" / "1.parquet")
    counters = pack(tmp_path / "pool" / "deep", tmp_path / "out2")
    assert read_back(tmp_path / "out2") == {
        "x": (picture(0), [("one", "en"), ("two", "en")]),
        "y": (picture(1), [("three", "en")]),
    }
    assert counters["drops"] == {"image_missing": 1, "caption_missing": 1, "caption_empty": 1}


def test_a_tar_of_something_else_says_what_it_holds(tmp_path):
    write_tar(tmp_path / "s.tar", [("a.npy", b"x")])
    with pytest.raises(UserError, match=r"s.tar: holds 1 \*\.npy; looked for an image"):
        pack(tmp_path / "s.tar", tmp_path / "out")


def test_another_source_needs_another_folder(tmp_path):
    """Its shards have the same names, and would otherwise count as packed."""
    for name in "ab":
        columns = {"image": [picture(1), picture(2)], "text": ["x", "y"]}
        pq.write_table(pa.table(columns), tmp_path / f"{name}.parquet")
    pack(tmp_path / "a.parquet", tmp_path / "out")
    with pytest.raises(UserError, match="made with another source, files; name another folder or delete it"):
        pack(tmp_path / "b.parquet", tmp_path / "out")
    pq.write_table(pa.table({"image": [picture(3)], "text": ["z"]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="made with another files"):
        pack(tmp_path / "a.parquet", tmp_path / "out")


def test_a_tar_or_table_that_was_written_again_is_packed_again(tmp_path):
    """Not mixed with shards of the old one; the other tar stays as it is packed."""
    for name in ("one", "two"):
        write_tar(tmp_path / f"{name}.tar", [(f"{name}.jpg", picture(1)), (f"{name}.txt", b"a cat")])
    source = str(tmp_path / "*.tar")
    pack(source, tmp_path / "out")
    before = (tmp_path / "out" / "one.tar").stat().st_mtime_ns
    write_tar(tmp_path / "two.tar", [("two.jpg", picture(2)), ("two.txt", b"a dog")])
    pack(source, tmp_path / "out")
    found = {"one": (picture(1), [("a cat", "en")]), "two": (picture(2), [("a dog", "en")])}
    assert read_back(tmp_path / "out") == found
    pq.write_table(pa.table({"key": ["two"], "text": ["a bird"]}), tmp_path / "two.parquet")
    pack(source, tmp_path / "out")
    assert read_back(tmp_path / "out") == {**found, "two": (picture(2), [("a bird", "en")])}
    assert (tmp_path / "out" / "one.tar").stat().st_mtime_ns == before


def test_a_file_of_rows_is_not_packed_over_itself(tmp_path):
    """Its name may be that of a shard."""
    path = tmp_path / "00000.parquet"
    pq.write_table(pa.table({"image": [picture(1)], "text": ["a cat"]}), path)
    before = path.read_bytes()
    with pytest.raises(UserError, match="holds the shards that are read; name another folder"):
        pack(path, tmp_path)
    assert path.read_bytes() == before and [one.name for one in tmp_path.iterdir()] == [path.name]
    assert pack(path, tmp_path / "out")["images"] == 1


def test_rows_of_the_same_size_are_packed_again(tmp_path):
    def write(text):
        table = pa.table({"image": [picture(1)], "text": [text]})
        with pa.ipc.new_stream(tmp_path / "t.arrow", table.schema) as stream:
            stream.write_table(table)

    write("a cat")
    pack(tmp_path / "t.arrow", tmp_path / "out")
    write("a dog")
    pack(tmp_path / "t.arrow", tmp_path / "out")
    assert read_back(tmp_path / "out") == {"000000000": (picture(1), [("a dog", "en")])}
