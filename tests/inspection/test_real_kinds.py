"""File kinds that people bring: each is packed right or left out for the right reason, and what is packed is whole."""

import json
import struct

import numpy as np
import pytest
from PIL import Image

from mc2_hpc.images import load_rgb, open_image
from mc2_hpc.inspection.lint import lint
from mc2_hpc.tar import write_tar
from tests.ingestion.sources import pack, picture, read_back, write_files


def packed(source, out, **more):
    """What is packed, and why the rest is not; lint agrees that all of it can be used."""
    counters = pack(source, out, **more)
    found = lint(out).findings
    assert (found.kept, found.images, +found.skipped) == (counters["images"], counters["images"], {})
    assert found.captions.total() == counters["texts"]
    return read_back(out), counters["drops"]


def plain(number: int, name: str = "s") -> list[tuple[str, bytes]]:
    return [(f"{name}{number:05d}.jpg", picture(number)), (f"{name}{number:05d}.txt", b"a caption")]


FORMATS = {
    "png": {},
    "webp": {},
    "gif": {"mode": "P"},
    "bmp": {},
    "tiff": {},
    "jpeg2000": {},
    "ppm": {},
    "tga": {},
    "avif": {},
}


@pytest.mark.parametrize("kind", FORMATS)
def test_formats_keep_their_bytes(tmp_path, kind):
    extension = {"jpeg2000": "jp2"}.get(kind, kind)
    try:
        data = picture(1, kind.upper(), **FORMATS[kind])
    except (KeyError, OSError):
        pytest.skip(f"this Pillow does not write {kind}")
    write_files(tmp_path / "in", {f"a.{extension}": data, "a.txt": "a caption"})
    found, drops = packed(tmp_path / "in", tmp_path / "out")
    assert found["a"][0] == data and not drops


@pytest.mark.parametrize("mode", ["CMYK", "L", "1", "LA", "RGBA", "I;16", "P"])
def test_colour_models(tmp_path, mode):
    kind = "JPEG" if mode == "CMYK" else "PNG"
    write_files(tmp_path / "in", {f"a.{kind.lower()}": picture(1, kind, mode), "a.txt": "a caption"})
    found, drops = packed(tmp_path / "in", tmp_path / "out")
    assert len(found) == 1 and not drops


def test_sixteen_bits_are_not_white(tmp_path):
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    (tmp_path / "in").mkdir()
    Image.fromarray(ramp).save(tmp_path / "in" / "a.png")
    write_files(tmp_path / "in", {"a.txt": "a scan"})
    found, _ = packed(tmp_path / "in", tmp_path / "out")
    assert 120 < np.asarray(load_rgb(open_image(found["a"][0]))).mean() < 135


def test_an_animation_and_a_photograph_for_printing(tmp_path):
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue")]
    (tmp_path / "in").mkdir()
    frames[0].save(tmp_path / "in" / "a.gif", save_all=True, append_images=frames[1:])
    exif = b"Exif\0\0II*\0\x08\0\0\0\x01\0" + struct.pack("<HHII", 0x0201, 2, 1000, 5000)
    write_files(
        tmp_path / "in", {"a.txt": "red", "b.jpg": picture(1, "JPEG", "CMYK", exif=exif), "b.txt": "damaged tags"}
    )
    found, drops = packed(tmp_path / "in", tmp_path / "out")
    assert load_rgb(open_image(found["a"][0])).getpixel((5, 5))[0] > 200 and set(found) == {"a", "b"} and not drops


def test_an_image_of_another_format_than_its_name_says(tmp_path):
    write_files(tmp_path / "in", {"a.jpg": picture(1, "WEBP"), "a.txt": "a caption"})
    pack(tmp_path / "in", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "stats" / "00000.json").read_text())["formats"] == {"webp": 1}


def test_shards_of_img2dataset(shared_data, tmp_path):
    """32 real pairs from the web, with jpg, txt and json."""
    found, drops = packed(shared_data / "cc12m-32.tar", tmp_path / "out")
    assert len(found) == 32 and not drops


def test_nested_shards_dots_and_named_parts(tmp_path):
    for number in range(4):
        folder = tmp_path / "pool" / str(number % 2)
        folder.mkdir(parents=True, exist_ok=True)
        write_tar(folder / f"{number}.tar", plain(number))
    dots = [part for n in range(3) for part in ((f"DSC.{n:04d}.jpg", picture(n)), (f"DSC.{n:04d}.txt", b"x"))]
    parts = [
        (f"sample{n}.{part}", data) for n in range(2) for part, data in (("in.jpg", picture(n)), ("out.txt", b"x"))
    ]
    write_tar(tmp_path / "pool" / "0" / "names.tar", dots + parts)
    found, drops = packed(tmp_path / "pool", tmp_path / "out")
    assert len(found) == 4 + 3 + 2 and not drops
    assert (tmp_path / "out" / "1" / "3.tar").is_file()
    found, _ = packed(f"{tmp_path}/pool/{{0,1}}/[0-3].tar", tmp_path / "out2")
    assert len(found) == 4


def test_linked_folders_and_dangling_links(tmp_path):
    write_files(
        tmp_path / "store" / "cats",
        {f"{n}.{kind}": data for n in range(3) for kind, data in (("jpg", picture(n)), ("txt", "a cat"))},
    )
    photos = write_files(tmp_path / "photos", {"own.jpg": picture(5), "own.txt": "my own", "broken.txt": "no image"})
    (photos / "cats").symlink_to(tmp_path / "store" / "cats")
    (photos / "broken.jpg").symlink_to("nowhere.jpg")
    found, drops = packed(photos, tmp_path / "out")
    assert set(found) == {"own", "cats/0", "cats/1", "cats/2"} and drops == {"image_missing": 1}


def test_language_codes_and_direction_marks_are_kept(tmp_path):
    codes = ["en-US", "EN", "eng_Latn", "zh-CN", "zho_Hans", "pt-BR", "iw", "nb", "fil"]
    captions = [
        {"image": f"{n}.jpg", "text": f"\u2067\u05e9\u05dc\u05d5\u05dd\u2069 {n}", "lang": code}
        for n, code in enumerate(codes)
    ]
    write_files(tmp_path, {f"{n}.jpg": picture(n) for n in range(len(codes))})
    write_files(tmp_path, {"t.jsonl": "\n".join(map(json.dumps, captions))})
    found, drops = packed(tmp_path / "t.jsonl", tmp_path / "out")
    assert [texts for _, texts in found.values()] == [[(row["text"], row["lang"])] for row in captions] and not drops
