"""The parts of fetching by themselves: addresses, opt-outs, stored bytes, unpacking, the ledger, the queue of hosts."""

import asyncio
import email.utils
import gzip
import io
import time
import zlib

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from mc2_hpc.curation.fetching.addresses import AddressPolicy, AddressRefused
from mc2_hpc.curation.fetching.client import retry_after, unpacked
from mc2_hpc.curation.fetching.hosts import HostQueue
from mc2_hpc.curation.fetching.ledger import Ledger
from mc2_hpc.curation.fetching.robots import OPT_OUT, opts_out
from mc2_hpc.curation.fetching.stored import StoredImage, _reduced_to, kept_jpeg, store
from mc2_hpc.drops import Drop, Dropped
from mc2_hpc.images import load_rgb, open_image
from tests.curation.image_server import encoded

REFUSED = """
0.0.0.0 0.1.2.3 10.0.0.1 100.64.0.1 100.127.255.255 127.0.0.1 127.8.8.8 169.254.169.254 172.16.0.1 172.31.255.255
192.0.0.8 192.0.2.1 192.168.1.1 198.18.0.1 198.51.100.1 203.0.113.1 224.0.0.1 239.1.1.1 240.0.0.1 255.255.255.255
:: ::1 ::7f00:1 ::ffff:10.0.0.1 ::ffff:127.0.0.1 ::ffff:169.254.169.254 64:ff9b::7f00:1 64:ff9b:1::1 100::1 2001::1
2001:db8::1 2002:7f00:1::1 2002:a00:1::1 fc00::1 fd12::1 fe80::1 fe80::1%eth0 fec0::1 ff02::1 ff0e::1 localhost 0x7f.1
""".split()
PUBLIC = """
1.1.1.1 8.8.8.8 100.63.255.255 100.128.0.1 172.15.0.1 172.32.0.1 193.0.0.1 198.20.0.1 223.255.255.254
2606:4700::1111 2a00:1450:4001::1 ::ffff:8.8.8.8 64:ff9b::808:808 2002:808:808::1
""".split()


@pytest.mark.parametrize("address", REFUSED)
def test_addresses_of_no_public_host_are_refused(address):
    policy = AddressPolicy()
    assert not policy.allows(address)
    with pytest.raises(AddressRefused):
        policy.open_socket((2, 1, 6, "", (address, 80)))


@pytest.mark.parametrize("address", PUBLIC)
def test_public_addresses_are_allowed(address):
    assert AddressPolicy().allows(address)


def test_a_network_that_is_allowed_by_name():
    policy = AddressPolicy(("10.1.0.0/16", "fd00::/8"))
    assert [
        policy.allows(a) for a in ("10.1.2.3", "::ffff:10.1.2.3", "fd00::1", "10.2.0.1", "127.0.0.1", "8.8.8.8")
    ] == [*(True, True, True, False, False, True)]


@pytest.mark.parametrize(
    "headers, expected",
    [
        ([], False),
        (["all"], False),
        (["noai"], True),
        (["nofollow", "x, NoImageAI "], True),
        (["googlebot: noindex"], False),
        (["googlebot: nofollow, noindex"], False),
        (["googlebot: noindex, mc2_hpc: noai"], True),
        (["MC2_HPC: nofollow, noai"], True),
        (["unavailable_after: 25 Jun 2010 15:00:00 PST"], False),
        (["max-image-preview: large, noindex"], True),
        (["none"], True),
        (["noaid"], False),
    ],
)
def test_opt_outs(headers, expected):
    assert opts_out(headers, OPT_OUT, "mc2_hpc") is expected
    assert not opts_out(headers, (), "mc2_hpc")


def decoded(data: bytes) -> np.ndarray:
    return np.asarray(load_rgb(open_image(data)), int)


def gradient(kind: str, size: tuple[int, int], mode: str = "RGB", **options) -> bytes:
    """A smooth image, which JPEG and scaling change little."""
    x, y = np.meshgrid(np.linspace(0, 255, size[0]), np.linspace(0, 255, size[1]))
    image = Image.fromarray(np.stack([x, y, 255 - x], -1).astype(np.uint8))
    file = io.BytesIO()
    image.convert(mode).save(file, kind, **options)
    return file.getvalue()


def turned(orientation: int, size: tuple[int, int]) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return gradient("JPEG", size, exif=exif, quality=95)


def test_bytes_are_kept_without_resizing():
    for kind, mode in (("JPEG", "RGB"), ("JPEG", "L"), ("JPEG", "CMYK"), ("PNG", "P"), ("GIF", "P"), ("WEBP", "RGB")):
        data = gradient(kind, (90, 60), mode)
        image = store(data, None)
        assert image.data == data and (image.width, image.height) == (90, 60)
        decoded(image.data)
    assert store(turned(6, (90, 60)), None).data == turned(6, (90, 60))
    sixteen = io.BytesIO()
    Image.fromarray(np.full((4, 4), 40_000, np.uint16)).save(sixteen, "PNG")
    assert store(sixteen.getvalue(), None).data == sixteen.getvalue()


@pytest.mark.parametrize("size", [(64, 48), (10, 64), (1, 1)])
def test_a_small_plain_jpeg_is_kept_when_resizing(size):
    data = gradient("JPEG", size)
    assert store(data, 64).data == data and kept_jpeg(data, 64) is not None


@pytest.mark.parametrize(
    "data, size",
    [
        (gradient("JPEG", (640, 480), quality=95), (64, 48)),
        (gradient("JPEG", (65, 33), quality=95), (64, 32)),
        (gradient("JPEG", (700, 200), quality=95), (64, 18)),
        (gradient("JPEG", (300, 700), "CMYK", quality=95), (27, 64)),
        (gradient("PNG", (100, 200)), (32, 64)),
        (gradient("PNG", (20, 10)), (20, 10)),
        (gradient("WEBP", (128, 128), lossless=True), (64, 64)),
        (gradient("AVIF", (128, 64), quality=95), (64, 32)),
    ],
    ids=lambda value: str(value) if isinstance(value, tuple) else "",
)
def test_everything_else_becomes_a_small_jpeg(data, size):
    image = store(data, 64)
    assert image.extension == "jpg" and image.data[:2] == b"\xff\xd8" and (image.width, image.height) == size
    reference = load_rgb(open_image(data)).resize(size, Image.Resampling.LANCZOS)
    assert np.abs(decoded(image.data) - np.asarray(reference, int)).mean() < 6


@pytest.mark.parametrize("size", [(30, 20), (97, 61), (1, 1), (199, 3)])
def test_reducing_equals_pillow_to_one_level(size):
    pixels = np.random.default_rng(0).integers(0, 256, (122, 200, 3), dtype=np.uint8)
    reference = Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR)
    reduced = _reduced_to(pixels, *size).astype(int)
    assert reduced.shape == (size[1], size[0], 3) and np.abs(reduced - np.asarray(reference, int)).max() <= 1


@pytest.mark.parametrize("orientation", range(2, 9))
@pytest.mark.parametrize("size", [(60, 40), (200, 100)])
def test_a_turned_jpeg_becomes_upright(orientation, size):
    data = turned(orientation, size)
    image = store(data, 64)
    upright = load_rgb(open_image(data), upright=True)
    assert (image.width > image.height) == (upright.width > upright.height) and max(image.width, image.height) <= 64
    assert open_image(image.data).getexif().get(0x0112, 1) == 1
    upright = upright.resize((image.width, image.height), Image.Resampling.LANCZOS)
    assert np.abs(decoded(image.data) - np.asarray(upright, int)).mean() < 6


def test_the_first_frame_of_an_animation_is_stored_when_resizing():
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue")]
    file = io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    assert store(file.getvalue(), None).data == file.getvalue()
    assert decoded(store(file.getvalue(), 64).data)[10, 10, 0] > 200


def cut(kind: str) -> bytes:
    data = encoded(kind, (64, 64))
    return data[: len(data) * 2 // 3]


@pytest.mark.parametrize("longest", [None, 32, 512])
@pytest.mark.parametrize(
    "data, reason",
    [
        (cut("JPEG"), Drop.IMAGE_TRUNCATED),
        (cut("PNG"), Drop.IMAGE_UNDECODABLE),
        (cut("WEBP"), Drop.IMAGE_UNDECODABLE),
        (b"\xff\xd8 nothing else", Drop.IMAGE_UNDECODABLE),
        (b"", Drop.NOT_AN_IMAGE),
        (b"<html><svg/></html>", Drop.NOT_AN_IMAGE),
        (b"%PDF-1.7 ...", Drop.NOT_AN_IMAGE),
        (b"P6 1 1 255\n123", Drop.NOT_AN_IMAGE),
        (b"<?xml version='1.0'?><svg/>", Drop.IMAGE_UNSUPPORTED),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", Drop.IMAGE_UNSUPPORTED),
        (b"\0\0\0\x0cJXL \r\n\x87\n", Drop.IMAGE_UNSUPPORTED),
        (encoded()[:-2] + b"\xff\xda\0\x0c" * 200, Drop.IMAGE_UNDECODABLE),
    ],
)
def test_what_is_no_usable_image_is_dropped_with_its_reason(data, reason, longest):
    with pytest.raises(Dropped) as dropped:
        store(data, longest)
    assert dropped.value.reason == reason


def test_bytes_after_the_end_do_no_harm():
    data = gradient("JPEG", (90, 60)) + bytes(10_000)
    assert store(data, None).data == data


def test_bodies_are_unpacked_up_to_a_limit():
    assert unpacked(gzip.compress(b"a" * 1000), 1000) == b"a" * 1000 == unpacked(zlib.compress(b"a" * 1000), 1000)
    for body, reason in (
        (gzip.compress(b"a" * 1001), Drop.TOO_LARGE),
        (gzip.compress(b"abc")[:-5], Drop.RESPONSE_BROKEN),
        (b"abc", Drop.RESPONSE_BROKEN),
        (b"", Drop.RESPONSE_BROKEN),
    ):
        with pytest.raises(Dropped) as dropped:
            unpacked(body, 1000)
        assert dropped.value.reason == reason


def test_retry_after():
    assert retry_after(" 120 ") == 120 and retry_after("0") == 0
    assert retry_after("") is None and retry_after("soon") is None and retry_after("-5") is None
    soon = retry_after(email.utils.formatdate(time.time() + 50, usegmt=True))
    assert soon is not None and 45 < soon < 51
    assert retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0 and retry_after("9" * 400) == float("9" * 12)


KEYS, SOURCES = pa.array(["a", "b", "c", "d"]), pa.array(["1", "2", "3", None])


def image_of(data: bytes) -> StoredImage:
    return StoredImage(data, "png", 3, 4)


def test_a_ledger_continues_with_what_is_whole(tmp_path):
    with Ledger(tmp_path, "x", KEYS, SOURCES) as ledger:
        assert ledger.pending() == [0, 1, 2, 3]
        ledger.add_image(2, image_of(b"cc"))
        ledger.add_drop(1, Drop.TIMEOUT)
        ledger.add_image(0, image_of(b"aaa"))
    with (tmp_path / "x.ledger").open("ab") as file:
        file.write(b"half a record")
    with Ledger(tmp_path, "x", KEYS, SOURCES) as ledger:
        assert ledger.pending() == [3]
        assert list(ledger.images()) == [("a.png", b"aaa"), ("c.png", b"cc")]
    (tmp_path / "x.images").write_bytes(b"cc\0\0\0")  # as after a power failure
    with Ledger(tmp_path, "x", KEYS, SOURCES) as ledger:
        assert ledger.pending() == [0, 3]
        ledger.add_image(0, image_of(b"AAA"))
        ledger.add_image(3, image_of(b"d"))
        assert dict(ledger.images()) == {"a.png": b"AAA", "c.png": b"cc", "d.png": b"d"}
        table = ledger.table().to_pydict()
    assert table["key"] == list("abcd") and table["reason"] == [None, "timeout", None, None]
    assert table["size"] == [3, None, 2, 1] and table["format"] == ["png", None, "png", "png"]
    with Ledger(tmp_path, "x", KEYS, pa.array(["1", "2", "9", None])) as ledger:
        assert ledger.pending() == [0, 1, 2, 3], "outcomes of other addresses"
        ledger.remove()
    assert not list(tmp_path.iterdir())


def test_a_slow_host_does_not_delay_the_others():
    async def run() -> list[str]:
        queue: HostQueue[str] = HostQueue(1, 0)
        for item in ("a1", "a2", "b1", "b2"):
            queue.put(item[0], item)
        taken = []
        for _ in range(2):
            found = await queue.get()
            assert found is not None
            taken.append(found[1])
        queue.release("b")  # a's connection stays open
        found = await queue.get()
        assert found is not None
        taken.append(found[1])
        queue.hold("a", 0.2)
        queue.release("a")
        queue.release("b")
        began = time.monotonic()
        assert await queue.get() == ("a", "a2") and time.monotonic() - began >= 0.19
        queue.release("a")
        assert await asyncio.wait_for(queue.get(), 5) is None
        return taken

    assert asyncio.run(run()) == ["a1", "b1", "b2"]


def test_the_queue_waits_for_items_that_others_lead_to():
    async def run() -> None:
        queue: HostQueue[str] = HostQueue(4, 0)
        queue.put("a", "first")
        assert await queue.get() == ("a", "first")

        def follow() -> None:
            queue.put("b", "second", first=True)
            queue.release("a")

        asyncio.get_running_loop().call_later(0.05, follow)
        assert await asyncio.wait_for(queue.get(), 5) == ("b", "second")
        queue.put("b", "third")
        assert queue.take_all("b") == ["third"]
        queue.release("b")
        assert await asyncio.wait_for(queue.get(), 5) is None

    asyncio.run(run())
