"""Faces are dropped or blurred, whatever finds them; MTCNN with its published weights finds real ones."""

import io
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mc2_hpc.errors import UserError
from mc2_hpc.filters.faces import blurred
from mc2_hpc.filters.mtcnn import Mtcnn, _nms
from mc2_hpc.jobs.named import Named
from tests.curation import planted
from tests.curation.filtered_pool import in_tar, run_filter, verdicts, write_shard
from tests.curation.image_server import encoded

DROP, BLUR = "mc2_hpc.filters.DropFaces", "mc2_hpc.filters.BlurFaces"
FACENET = "facenet-pytorch==2.6.0"
"""MIT. It cannot be installed beside our version of PyTorch without --no-deps, so the test takes it from its wheel."""
PEOPLE = "000000039"
"""A photograph of three men; two look at the camera."""

MODULE = '''
import numpy as np


class Red:
    """A face is what is red: one box around it, as confident as it is red."""

    def detect(self, images):
        return [self.box(np.asarray(image, np.float64)) for image in images]

    def box(self, pixels):
        red = pixels[..., 0] - pixels[..., 1:].max(2)
        rows, columns = np.nonzero(red > 50)
        if not len(rows):
            return np.zeros((0, 5))
        return [[columns.min(), rows.min(), columns.max() + 1, rows.max() + 1, red.max() / 255]]

    def sources(self):
        return {"colour": "red"}


class Wrong(Red):
    def box(self, pixels):
        return np.zeros((1, 4))


class Raises(Red):
    def box(self, pixels):
        return {}["box"]


class Few(Red):
    def detect(self, images):
        return []


class NoDetector:
    pass
'''


@pytest.fixture
def module(module_of) -> str:
    """Name of a module of detectors."""
    return module_of(MODULE)


def with_spot(red: int) -> bytes:
    """A green image of noise with a spot that is more or less red, as a PNG."""
    noise = np.random.default_rng(0).integers(0, 200, (60, 80))
    pixels = np.zeros((60, 80, 3), np.uint8)
    pixels[..., 1] = noise
    pixels[20:40:2, 30:50] = (red, 0, 0)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def pool(tmp_path) -> Path:
    """Images with spots of different reds, one of them with two captions, and one without."""
    images = {f"{red:03d}.png": with_spot(red) for red in (100, 200, 255)} | {"none.jpg": encoded("JPEG", mode="L")}
    rows = [
        (name.partition(".")[0], text, "en") for name in images for text in ("a spot", "b spot")[: 1 + ("2" in name)]
    ]
    return write_shard(tmp_path / "pool", "0", images, rows)


def test_images_with_faces_are_dropped(pool, module, tmp_path):
    counters = run_filter(pool, tmp_path / "out", Named(DROP, {"detector": f"{module}.Red", "most": 0.6}))
    assert set(in_tar(tmp_path / "out" / "0.tar")) == {"100.png", "none.jpg"}
    assert counters["drops"] == {"face_high": 4} and counters["image_drops"] == {"face_high": 2}
    scores = {row["key"]: row["score_face"] for row in verdicts(tmp_path / "out")}
    assert scores == {"100": pytest.approx(100 / 255), "200": pytest.approx(200 / 255), "255": 1.0, "none": 0.0}


def test_faces_are_blurred_and_other_images_keep_their_bytes(pool, module, tmp_path):
    options = {"detector": f"{module}.Red", "least": 0.5, "margin": 0.1}
    counters = run_filter(pool, tmp_path / "out", Named(BLUR, options))
    assert counters["drops"] == {} and counters["changes"] == {"faces_blurred": 2}
    before, after = in_tar(pool / "0.tar"), in_tar(tmp_path / "out" / "0.tar")
    assert list(after) == ["100.png", "200.jpg", "255.jpg", "none.jpg"]
    assert after["100.png"] == before["100.png"] and after["none.jpg"] == before["none.jpg"]
    was, now = (np.asarray(Image.open(io.BytesIO(one)), np.int64) for one in (before["255.png"], after["255.jpg"]))
    # The stripes of the spot, 20 pixels wide and 19 high, are gone; two pixels beyond it, only JPEG's noise is new.
    assert now[22:38, 32:48, 0].std() < 30 < 100 < was[22:38, 32:48, 0].std()
    outside = np.ones((60, 80), bool)
    outside[17:43, 27:53] = False
    assert np.abs(now - was).mean(2)[outside].mean() < 40 < np.abs(now - was)[20:40, 30:50, 0].mean()
    assert {row["change"] for row in verdicts(tmp_path / "out")} == {None, "faces_blurred"}


def test_the_same_limit_blurs_what_it_would_drop(pool, module, tmp_path):
    """A face exactly as confident as the limit is one for neither filter."""
    most = 200 / 255
    run_filter(pool, tmp_path / "drop", Named(DROP, {"detector": f"{module}.Red", "most": most}))
    run_filter(pool, tmp_path / "blur", Named(BLUR, {"detector": f"{module}.Red", "least": most}))
    assert set(in_tar(pool / "0.tar")) - set(in_tar(tmp_path / "drop" / "0.tar")) == {"255.png"}
    assert {row["key"] for row in verdicts(tmp_path / "blur") if row["change"]} == {"255"}


def test_the_bytes_are_the_same_again(pool, module, tmp_path, outputs):
    blur = Named(BLUR, {"detector": f"{module}.Red", "least": 0.5})
    for out in ("a", "b"):
        run_filter(pool, tmp_path / out, blur)
    assert outputs(tmp_path / "a") == outputs(tmp_path / "b")
    assert '"colour": "red"' in (tmp_path / "a" / "filter.json").read_text()


def test_boxes_beyond_the_edges():
    image = Image.open(io.BytesIO(with_spot(255))).convert("RGB")
    for box in ((-30, -30, 10, 10), (70, 50, 200, 200), (-9, -9, 999, 999)):
        assert blurred(image, [box], 0.2).size == image.size
        assert blurred(image, [box], 0.2).tobytes() != image.tobytes()
    for box in ((-30, -30, -20, -20), (100, 100, 120, 120), (30, 30, 20, 20)):
        assert blurred(image, [box], 0.0).tobytes() == image.tobytes()


@pytest.mark.parametrize(
    "kind, message",
    [
        ("Wrong", r"detect must return finite numbers \(faces, 5\), not \(1, 4\)"),
        ("Raises", "detect raised KeyError: 'box'"),
        ("Few", "detect returned 0 arrays for 4 images"),
        ("NoDetector", r"must have a method detect\(images\)"),
        ("Nothing", "has no 'Nothing'"),
    ],
)
def test_bad_detectors_are_one_line(pool, module, tmp_path, kind, message):
    for name in (DROP, BLUR):
        with pytest.raises(UserError, match=f"{name}: detector {module}.{kind}.*{message}") as error:
            run_filter(pool, tmp_path / name, Named(name, {"detector": f"{module}.{kind}"}))
        assert str(error.value).isprintable()


@pytest.fixture
def mtcnn(wheel, monkeypatch) -> Mtcnn:
    """With the package from its wheel."""
    for name in ("torchvision", "requests", "tqdm"):  # what it imports
        if find_spec(name) is None:
            pytest.skip(f"{name} is not installed (pip install 'mc2_hpc[eval]' requests tqdm)")
    monkeypatch.syspath_prepend(str(wheel(FACENET)))
    yield Mtcnn()
    for name in [name for name in sys.modules if name.partition(".")[0] == "facenet_pytorch"]:
        del sys.modules[name]


def test_mtcnn_finds_the_faces_of_a_photograph(mtcnn, photos):
    image = photos[f"{PEOPLE}.jpg"]
    (faces,) = mtcnn.detect([image])
    left, right = sorted(faces[faces[:, 4] > 0.99].tolist())[:2]
    for face, middle in ((left, (82, 213)), (right, (331, 218))):
        assert face[0] < middle[0] < face[2] and face[1] < middle[1] < face[3] and face[2] - face[0] < 80
    # Three times as large, it is reduced before faces are looked for; the boxes are those of the large one.
    (large,) = mtcnn.detect([image.resize((image.width * 3, image.height * 3))])
    nearest = np.abs(large[:, None, :4] / 3 - np.array([left, right])[:, :4]).max(2).min(0)
    assert (nearest < 15).all()
    assert [len(boxes) for boxes in mtcnn.detect([Image.new("RGB", (300, 300)), Image.new("RGB", (300, 9))])] == [0, 0]


def test_mtcnn_blurs_so_that_it_finds_nothing_left(mtcnn, photos, tmp_path):
    names = [f"{PEOPLE}.jpg", "000000009.jpg"]
    data = {name: planted.encoded(photos[name], 95) for name in names}
    pool = write_shard(tmp_path / "pool", "0", data, [(name[:-4], "a picture", "en") for name in names])
    counters = run_filter(pool, tmp_path / "blurred", Named(BLUR, {}))
    assert counters["changes"] == {"faces_blurred": 1}
    written = in_tar(tmp_path / "blurred" / "0.tar")
    assert written["000000009.jpg"] == data["000000009.jpg"]
    (left,) = mtcnn.detect([Image.open(io.BytesIO(written[names[0]]))])
    assert not (left[:, 4] >= 0.9).any(), left
    counters = run_filter(pool, tmp_path / "dropped", Named(DROP, {}))
    assert list(in_tar(tmp_path / "dropped" / "0.tar")) == ["000000009.jpg"]
    assert len((tmp_path / "dropped" / "filter.json").read_text().split('"onet": "')[1].partition('"')[0]) == 64


def test_suppression_equals_a_naive_one():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, 40, (200, 2))
    boxes, scores = np.hstack([corners, corners + rng.uniform(1, 30, (200, 2))]), rng.random(200)

    def overlap(a, b) -> float:
        sides = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
        both = sides[0] * sides[1] if (sides > 0).all() else 0.0
        return both / ((a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod() - both)

    kept: list[int] = []
    for number in np.argsort(-scores).tolist():
        if all(overlap(boxes[number], boxes[other]) <= 0.4 for other in kept):
            kept.append(number)
    found = _nms(torch.tensor(boxes), torch.tensor(scores), torch.zeros(200), 0.4)
    assert found.tolist() == kept and 3 < len(kept) < 150
    assert len(_nms(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0), 0.4)) == 0


def test_without_the_package_the_message_says_what_to_install(pool, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "facenet_pytorch", None)
    with pytest.raises(UserError, match="pip install --no-deps facenet-pytorch"):
        Mtcnn().sources()
