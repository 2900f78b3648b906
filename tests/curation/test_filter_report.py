"""The page of a filtered pool shows what is nearest to each limit; the limits follow the samples to every data card."""

import base64
import io
import json
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from mc2_hpc import jobs
from mc2_hpc.cli import main
from mc2_hpc.curation.copies.hashes import MAX_CHECK, MAX_DISTANCE
from mc2_hpc.curation.dedup_images import plan_dedup_images
from mc2_hpc.curation.match import plan_match
from mc2_hpc.curation.report.sheets import SHEETS
from mc2_hpc.errors import UserError
from mc2_hpc.jobs.named import Named
from mc2_hpc.storage import write_json
from tests.curation.filtered_pool import run_filter, write_shard
from tests.curation.image_server import encoded

HOSTILE = "<script>alert('1')</script> & \u202etext"
SIZE = "mc2_hpc.filters.Size"

MODULE = """
from mc2_hpc.curation.filtering.images import ScoreFilter


class Told(ScoreFilter):
    reads_pixels = False

    def scores(self, rows, images):
        return [float(text.split()[0]) for text in rows["text"].to_pylist()]


class Invert:
    def drop_reasons(self, rows, images):
        for image in images:
            image.replace(image.pixels.point(lambda value: 255 - value), "inverted")
        return [None] * len(rows)
"""


class Sheets(HTMLParser):
    """Of each section: its heading, and below each smaller heading the captions and pictures."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.found: dict[str, dict[str, list[str]]] = {}
        self.pictures: list[bytes] = []
        self._tag, self._heading, self._side = "", "", ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes) -> None:
        self._tag = tag
        if tag == "img":
            self.pictures.append(base64.b64decode(dict(attributes)["src"].partition("base64,")[2]))

    def handle_data(self, data) -> None:
        if self._tag == "h2":
            self._heading, self._side = data, ""
            self.found[data] = {}
        elif self._tag == "h3":
            self._side = data.split()[0]
            self.found[self._heading][self._side] = []
        elif self._tag == "bdi":
            self.found[self._heading].setdefault(self._side, []).append(data)
        self._tag = ""


@pytest.fixture
def module(module_of) -> str:
    return module_of(MODULE)


def numbered(folder: Path, numbers: list[int], shards: int) -> Path:
    """Images whose captions begin with a number, dealt to shards."""
    for shard in range(shards):
        rows = [(f"{n:03d}", f"{n} {text}", "en") for n in numbers[shard::shards] for text in ("a dog", "dogs")]
        write_shard(folder, f"{shard}", {f"{row[0]}.jpg": encoded(seed=int(row[0])) for row in rows}, rows)
    return folder


@pytest.mark.parametrize("shards", [1, 3])
def test_the_nearest_images_on_both_sides_of_both_limits(module, tmp_path, shards):
    pool = numbered(tmp_path / "pool", list(range(100)), shards)
    run_filter(pool, tmp_path / "out", Named(f"{module}.Told", {"least": 29.5, "most": 69.5}))
    page = Sheets(tmp_path / "out" / SHEETS)
    expected = {
        "told at least 29.5": (range(30, 42), range(29, 17, -1)),
        "told at most 69.5": (range(69, 57, -1), range(70, 82)),
    }
    for heading, (kept, dropped) in expected.items():
        assert page.found[heading]["Kept"] == [f"{n} a dog" for n in kept]
        assert page.found[heading]["Dropped"] == [f"{n} a dog" for n in dropped]
    assert len(page.pictures) == 4 * 12 and Image.open(io.BytesIO(page.pictures[0])).size == (48, 32)


def test_the_page_depends_on_the_samples_alone(module, tmp_path):
    """A filter without limits shows a sample, which is the same however the samples are dealt to shards."""
    length = Named("mc2_hpc.filters.Length", {"max_characters": 7})
    pages = []
    for shards in (1, 4):
        run_filter(numbered(tmp_path / f"{shards}", list(range(80)), shards), tmp_path / f"out{shards}", length)
        page = Sheets(tmp_path / f"out{shards}" / SHEETS)
        sides = page.found["Length"]
        assert len(sides["Kept"]) == 12 and len(sides["Dropped"]) == 12
        assert all(len(text) <= 7 for text in sides["Kept"])
        pages.append((page.found["Length"], page.pictures))
    assert pages[0] == pages[1]


def test_changed_images_are_shown_as_written_and_text_is_escaped(module, tmp_path):
    file = io.BytesIO()
    Image.new("RGB", (32, 32), (250, 0, 0)).save(file, "PNG")
    rows = [("a", f"2 {HOSTILE}", "en"), ("b", "1 small", "en")]
    pool = write_shard(tmp_path / "pool", "0", {"a.png": file.getvalue(), "b.jpg": encoded()[:1500]}, rows)
    # The second image cannot be decoded, but the first filter does not look.
    run_filter(pool, tmp_path / "out", Named(f"{module}.Told", {"least": 1.5}), Named(f"{module}.Invert"))
    text = (tmp_path / "out" / SHEETS).read_text(encoding="utf-8")
    assert "<script>" not in text and "inverted 1" in text and "cannot be decoded" in text
    page = Sheets(tmp_path / "out" / SHEETS)
    assert page.found["Images that a filter changed"] == {"": [f"2 {HOSTILE}"]}
    red, green, _ = Image.open(io.BytesIO(page.pictures[-1])).getpixel((9, 9))
    assert red < 30 and green > 220


def test_the_page_is_made_again_with_a_shard(module, tmp_path):
    pool = numbered(tmp_path / "pool", list(range(9)), 1)
    told = Named(f"{module}.Told", {"least": 3})
    run_filter(pool, tmp_path / "out", told)
    first = (tmp_path / "out" / SHEETS).read_bytes()
    numbered(tmp_path / "pool", list(range(9)), 1)
    write_shard(pool, "1", {"100.jpg": encoded()}, [("100", "2.5 new", "en")])
    run_filter(pool, tmp_path / "out", told)
    assert b"2.5 new" in (tmp_path / "out" / SHEETS).read_bytes() and b"2.5 new" not in first


def test_limits_reach_the_data_card(tmp_path, capsys):
    """From ``filter.json`` to those of matching, balancing and packing, and to the report, also after two rounds and
    de-duplication."""
    for name in ("matplotlib", "imagehash"):
        pytest.importorskip(name, reason=f"{name} is not installed (pip install 'mc2_hpc[curation]')")
    pool = numbered(tmp_path / "pool", list(range(9)), 2)
    run_filter(pool, tmp_path / "one", Named(SIZE, {"least": 20}))
    run_filter(tmp_path / "one", tmp_path / "two", Named("mc2_hpc.filters.Aspect", {"most": 3}))
    plan_dedup_images(tmp_path / "two", tmp_path / "three")  # writes its settings; these images have no copies
    for path in sorted((tmp_path / "two").glob("?.*")):
        shutil.copy(path, tmp_path / "three")
    write_json(tmp_path / "metadata" / "en.json", ["dog", "dogs"])
    words = ["run", str(tmp_path / "three"), "--metadata", str(tmp_path / "metadata"), "--t-en", "5", "--workers", "1"]
    length = ["--filter", "mc2_hpc.filters.Length", "min_characters=2"]
    assert main(["curate", *words, "--out", str(tmp_path / "run"), *length]) == 0
    run = tmp_path / "run"
    read = {name: json.loads((run / name).read_text()) for name in ("matched/match.json", "shards/pack.json")}
    for settings in (read["matched/match.json"], read["shards/pack.json"]["matched"]):
        assert [one["arguments"].get("least") for one in settings["pool_filters"]] == [20, None, None]
        assert settings["pool_filters"][2]["arguments"] == {
            "phash_max_check": MAX_CHECK,
            "phash_max_distance": MAX_DISTANCE,
        }
    sources = json.loads((run / "balance" / "balance.json").read_text())["sources"]
    names = [one["name"].rpartition(".")[2] for one in sources["filters"]]
    assert names == ["Size", "Aspect", "dedup-images", "Length"]
    page = (run / "report" / "curation.html").read_text(encoding="utf-8")
    for text in ("mc2_hpc.filters.Size least=20", "mc2_hpc.filters.Aspect most=3", "Length min_characters=2"):
        assert text in page
    assert "mc2_hpc.filters.Size least=20" in (tmp_path / "two" / SHEETS).read_text(encoding="utf-8")


def test_matching_refuses_a_pool_filtered_otherwise_or_damaged(tmp_path):
    pool = numbered(tmp_path / "pool", list(range(9)), 1)
    run_filter(pool, tmp_path / "out", Named(SIZE, {"least": 20}))
    write_json(tmp_path / "metadata" / "en.json", ["dog"])
    jobs.run(plan_match(tmp_path / "out", tmp_path / "metadata", tmp_path / "matched"))
    settings = json.loads((tmp_path / "out" / "filter.json").read_text())
    settings["filters"][0]["arguments"]["least"] = 21
    write_json(tmp_path / "out" / "filter.json", settings)
    with pytest.raises(UserError, match="match.json: this folder was made with another pool_filters"):
        plan_match(tmp_path / "out", tmp_path / "metadata", tmp_path / "matched")
    (tmp_path / "out" / "filter.json").write_text("{")
    with pytest.raises(UserError, match="filter.json: .*filter the pool again into another folder"):
        plan_match(tmp_path / "out", tmp_path / "metadata", tmp_path / "matched")
