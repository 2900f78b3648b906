"""Which members of a tar form a sample, and its captions."""

import json
import unicodedata

import pytest

from mc2_hpc.drops import Drop, Dropped
from mc2_hpc.samples import captions_of, group_members, is_image_name
from mc2_hpc.tar import Member


def listing_of(*names):
    return group_members(Member(name, number, 1) for number, name in enumerate(names))


def complete(*names):
    """Key -> (image, caption or record) of the complete samples among files with these names."""
    return {
        sample.key: (sample.image.name, (sample.caption or sample.record).name)
        for sample in listing_of(*names).samples.values()
        if sample.is_complete()
    }


def test_files_of_one_name_are_one_sample():
    assert complete("1.jpg", "1.txt", "1.json", "2.PNG", "2.JSON", "in/3.webp", "in/3.txt") == {
        "1": ("1.jpg", "1.txt"),
        "2": ("2.PNG", "2.JSON"),
        "in/3": ("in/3.webp", "in/3.txt"),
    }


@pytest.mark.parametrize("ending", ["jpg", "JPEG", "jfif", "png", "Webp", "avif", "gif", "bmp", "TIF", "jp2", "ppm"])
def test_every_format_that_can_be_decoded_is_an_image(ending):
    assert complete(f"a.{ending}", "a.txt") == {"a": (f"a.{ending}", "a.txt")}
    assert is_image_name(f"in/a.{ending}")


def test_a_key_may_hold_dots():
    assert complete("DSC.0001.jpg", "DSC.0001.txt", "DSC.0002.jpg", "DSC.0002.txt") == {
        "DSC.0001": ("DSC.0001.jpg", "DSC.0001.txt"),
        "DSC.0002": ("DSC.0002.jpg", "DSC.0002.txt"),
    }


def test_parts_with_names_make_a_sample():
    found = listing_of("s1.input.jpg", "s1.outputs.txt", "s2.outputs.json", "s2.input.png")
    assert [(s.key, s.is_complete()) for s in found.samples.values()] == [("s1", True), ("s2", True)]


def test_two_images_with_names_are_ambiguous():
    found = listing_of("s1.left.jpg", "s1.right.jpg", "s1.text.txt")
    assert not any(sample.is_complete() for sample in found.samples.values())
    assert len(found.samples) == 3, "each stays and counts as incomplete"


def test_further_images_of_a_sample_are_counted():
    found = listing_of("a.jpg", "a.txt", "a.mask.png", "b.png", "b.jpg", "b.txt")
    assert {s.key: s.image.name for s in found.samples.values()} == {"a": "a.jpg", "b": "b.jpg"}
    assert found.drops == {Drop.IMAGE_REPEATED: 2}


def test_unicode_forms_pair():
    name = "\u00fcber"
    decomposed = unicodedata.normalize("NFD", name)
    assert decomposed != name
    assert complete(f"{decomposed}.jpg", f"{name}.txt") == {decomposed: (f"{decomposed}.jpg", f"{name}.txt")}


def test_hidden_and_unsafe_names():
    found = listing_of("./a.jpg", "./a.txt", "._a.jpg", "in/._b.jpg", ".DS_Store", "../c.jpg", "/d.jpg", "e\\f.jpg")
    assert list(found.samples) == ["a"]
    assert found.drops == {Drop.NAME_UNSAFE: 3}


def test_formats_that_cannot_be_decoded_are_counted():
    """Once each: the caption beside one is not a sample without an image in addition."""
    found = listing_of("a.jxl", "a.txt", "b.HEIC", "b.json", "c.jpg", "c.heic", "c.txt", "d.txt")
    assert found.drops == {Drop.IMAGE_UNSUPPORTED: 3}
    assert list(found.samples) == ["c", "d"] and found.samples["c"].is_complete()


def test_a_tar_of_something_else_is_described():
    found = listing_of("a.npy", "b.npy", "a.seg.cls", "noending")
    assert not found.samples
    assert "2 *.npy" in found.describe_others() and "seg.cls" in found.describe_others()


def record(**fields):
    return json.dumps(fields).encode()


@pytest.mark.parametrize(
    "caption, more, expected",
    [
        (b" a cat\n", None, [("a cat", "")]),
        (b"\xef\xbb\xbfa cat", None, [("a cat", "")]),
        (b"a cat", record(caption="a dog", lang="en"), [("a cat", "en")]),
        (b"a cat", b'{"lang": "en"', [("a cat", "")]),
        (b"a cat", b'["lang"]', [("a cat", "")]),
        (b"a cat", b'{"lang": "\xff"}', [("a cat", "")]),
        (b"a cat", b'{"lang": "en", "more": "' + b"a" * (1 << 20) + b'"}', [("a cat", "")]),
        (None, record(caption="a dog", lang="en"), [("a dog", "en")]),
        (None, record(text="a dog"), [("a dog", "")]),
        (None, record(caption="a cat", text="a dog"), [("a cat", "")]),
        (None, record(captions=["a cat", " ", "a dog", "a cat"]), [("a cat", ""), ("a dog", "")]),
        (None, record(texts=[["alt", "a cat"], ["title", "Katze"]], lang="de"), [("a cat", "de"), ("Katze", "de")]),
        (None, record(text=["a cat", "a dog"]), [("a cat", ""), ("a dog", "")]),
        (None, record(caption="a dog", lang=7), [("a dog", "")]),
    ],
)
def test_captions(caption, more, expected):
    assert captions_of(caption, more) == expected


@pytest.mark.parametrize(
    "caption, more, reason",
    [
        (b" \n", None, Drop.CAPTION_EMPTY),
        (b"\xff\xfe", None, Drop.CAPTION_NOT_UTF8),
        (None, None, Drop.CAPTION_MISSING),
        (None, record(url="x"), Drop.CAPTION_MISSING),
        (None, record(caption=None), Drop.CAPTION_EMPTY),
        (None, record(caption=5), Drop.CAPTION_MISSING),
        (None, record(caption=True), Drop.CAPTION_MISSING),
        (None, record(texts=[1, None, {"a": 1}]), Drop.CAPTION_MISSING),
        (None, record(texts=[]), Drop.CAPTION_MISSING),
        (None, b'{"caption": "\\ud800"}', Drop.CAPTION_NOT_UTF8),
        (None, b"[1]", Drop.CAPTION_NOT_JSON),
        (None, b"{", Drop.CAPTION_NOT_JSON),
        (None, b"[" * 100_000, Drop.CAPTION_NOT_JSON),
        (None, b'{"caption": ' + b"9" * 5000 + b"}", Drop.CAPTION_NOT_JSON),
        (None, b'{"caption": "' + b"a" * (1 << 20) + b'"}', Drop.CAPTION_NOT_JSON),
        (b"\xff", record(caption="a dog"), Drop.CAPTION_NOT_UTF8),
    ],
)
def test_captions_that_cannot_be_used(caption, more, reason):
    with pytest.raises(Dropped) as caught:
        captions_of(caption, more)
    assert caught.value.reason is reason


def test_images_alone_are_not_parts_of_each_other():
    """Their captions are in a table by key, as in curated shards."""
    found = listing_of("DSC.jpg", "DSC.0001.jpg", "DSC.0002.jpg")
    assert list(found.samples) == ["DSC", "DSC.0001", "DSC.0002"] and not found.drops
