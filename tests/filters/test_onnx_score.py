"""Scores by ONNX models: small ones made here, and NudeNet's from its wheel."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from mc2_hpc.curation.filtering.images import PoolImage
from mc2_hpc.errors import UserError
from mc2_hpc.filters import OnnxScore
from mc2_hpc.jobs.named import Named
from tests.curation import planted
from tests.curation.filtered_pool import run_filter, verdicts, write_shard
from tests.curation.image_server import encoded

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (pip install 'mc2_hpc[filter]')")
ROWS = pa.table({})
SIDES = ((40, 20), (20, 40), (30, 30), (64, 48), (9, 50))
NUDENET = "nudenet==3.4.2"
"""Its metadata says MIT, and the licence file in the wheel is the AGPL: it is fetched for this test alone."""


@pytest.fixture
def save(tmp_path) -> Callable[..., Path]:
    """``save(nodes, shape, kind="FLOAT")``: a model with input ``x`` and output ``y``."""
    onnx = pytest.importorskip("onnx", reason="onnx is not installed (pip install 'mc2_hpc[onnx]')")

    def write(nodes: list[tuple], shape: list, kind: str = "FLOAT") -> Path:
        element = getattr(onnx.TensorProto, kind)
        made = [onnx.helper.make_node(name, inputs, outputs, **more) for name, inputs, outputs, more in nodes]
        ends = [onnx.helper.make_tensor_value_info(name, element, dims) for name, dims in (("x", shape), ("y", None))]
        graph = onnx.helper.make_graph(made, "model", ends[:1], ends[1:])
        model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
        onnx.save(model, tmp_path / "model.onnx")
        return tmp_path / "model.onnx"

    return write


def means(*axes: int) -> list[tuple]:
    """The mean of each channel: three classes."""
    return [("ReduceMean", ["x"], ["y"], {"axes": list(axes), "keepdims": 0})]


def pool_images(count: int = 5) -> list[PoolImage]:
    return [PoolImage(f"{n}", f"{n}.png", encoded("PNG", size=SIDES[n % 5], seed=n)) for n in range(count)]


def as_array(image: Image.Image) -> np.ndarray:
    return np.asarray(image, np.float64) / 255


@pytest.mark.parametrize("batch", ["B", 1, 4])
@pytest.mark.parametrize("channels_first", [True, False])
def test_scores_are_the_largest_chosen_output(save, batch, channels_first):
    shape = [batch, 3, 16, 24] if channels_first else [batch, 16, 24, 3]
    one = OnnxScore(model=save(means(2, 3) if channels_first else means(1, 2), shape), classes="0, 2", most=1)
    images = pool_images()
    by_row = [images[0], images[0], *images[1:], images[4]]
    resized = [as_array(image.pixels.resize((24, 16), Image.Resampling.BILINEAR)) for image in by_row]
    expected = [array.mean((0, 1))[[0, 2]].max() for array in resized]
    np.testing.assert_allclose(one.scores(ROWS, by_row), expected, atol=1e-5)


def test_pixels_are_normalised_and_outputs_activated(save):
    image = pool_images(1)
    model = save(means(2, 3), ["B", 3, 8, 8])
    raw = as_array(image[0].pixels.resize((8, 8), Image.Resampling.BILINEAR)).mean((0, 1))
    logits = (raw - [0.1, 0.2, 0.3]) / [0.5, 0.6, 0.7]
    options = {"model": model, "most": 1, "mean": "0.1,0.2,0.3", "std": "0.5,0.6,0.7", "classes": "1"}
    softmax = np.exp(logits) / np.exp(logits).sum()
    expected = {"none": logits[1], "softmax": softmax[1], "sigmoid": 1 / (1 + np.exp(-logits[1]))}
    for activation, value in expected.items():
        (score,) = OnnxScore(**options, activation=activation).scores(ROWS, image)
        assert score == pytest.approx(value, abs=1e-5)


def test_how_an_image_is_fitted(save):
    """A wide image, white in its left quarter."""
    wide = Image.new("RGB", (64, 16))
    wide.paste((255, 255, 255), (0, 0, 16, 16))
    image = pool_images(1)
    image[0].replace(wide, "made")
    model = save(means(2, 3), ["B", 3, "H", "W"])
    expected = {"squash": 0.25, "crop": 0.0, "pad": 0.0625}
    for fit, share in expected.items():
        (score,) = OnnxScore(model=model, fit=fit, size=16, most=1).scores(ROWS, image)
        assert score == pytest.approx(share, abs=0.02), fit


def test_half_precision_and_outputs_of_one_number(save):
    model = save([("ReduceMean", ["x"], ["y"], {"axes": [1, 2, 3], "keepdims": 0})], ["B", 3, 8, 8], "FLOAT16")
    images = pool_images(3)
    expected = [as_array(image.pixels.resize((8, 8), Image.Resampling.BILINEAR)).mean() for image in images]
    np.testing.assert_allclose(OnnxScore(model=model, most=1).scores(ROWS, images), expected, atol=2e-3)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"mean": "1,2"}, "mean=1,2: write one number, or three"),
        ({"std": "a"}, "std=a: write one number, or three"),
        ({"std": "1,0,1"}, "nothing can be divided by 0"),
        ({"classes": "a"}, "classes=a: write numbers from 0"),
        ({"size": 99999}, "size=99999: must be at most"),
    ],
)
def test_options_that_make_no_sense(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        OnnxScore(model=tmp_path / "none.onnx", most=1, **options)


def test_models_that_cannot_be_used(save, tmp_path):
    def message(model: Path, **options) -> str:
        with pytest.raises(UserError) as error:
            one = OnnxScore(model=model, most=1, **options)
            one.sources()
            one.scores(ROWS, pool_images(2))
        assert str(error.value).isprintable()
        return str(error.value)

    (tmp_path / "bad.onnx").write_bytes(b"no model")
    assert "bad.onnx: cannot be loaded as ONNX" in message(tmp_path / "bad.onnx")
    assert "gone.onnx: no such file" in message(tmp_path / "gone.onnx")
    assert "is a folder" in message(tmp_path)
    anything = save(means(2, 3), ["B", 3, "H", "W"])
    assert "takes images of any size; give size=PIXELS" in message(anything)
    assert "classes=3: the model has 3 classes, from 0" in message(anything, size=8, classes="3")
    anything.rename(tmp_path / "a.onnx")
    fixed = save(means(2, 3), ["B", 3, 8, 8]).rename(tmp_path / "b.onnx")
    assert "takes images of 8x8 pixels, not size=9" in message(fixed, size=9)
    grey = save(means(2, 3), ["B", 1, 8, 8]).rename(tmp_path / "c.onnx")
    assert "must have one input, floats (B, 3, H, W) or (B, H, W, 3)" in message(grey)
    whole = save(means(0, 1, 2, 3), ["B", 3, 8, 8]).rename(tmp_path / "d.onnx")
    assert "does not have an entry per image" in message(whole)


def test_nudenet(wheel, photos, tmp_path):
    """A detector with 18 classes after four numbers of a box, at 2,100 places: classes 1 and 12 are faces."""
    import onnxruntime

    model = wheel(NUDENET) / "nudenet" / "320n.onnx"
    names = sorted(photos)
    data = {name: planted.encoded(photos[name], 95) for name in names}
    pool = write_shard(tmp_path / "pool", "0", data, [(Path(name).stem, "a picture", "en") for name in names])
    options = {"model": str(model), "size": 320, "fit": "pad", "name": "faces", "classes": "5,16", "most": 0.5}
    counters = run_filter(pool, tmp_path / "out", Named("mc2_hpc.filters.OnnxScore", options))
    session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    rows = verdicts(tmp_path / "out")
    assert [row["key"] for row in rows] == [Path(name).stem for name in names]
    for name, row in zip(names, rows, strict=True):
        image = Image.open(io.BytesIO(data[name]))
        side = max(image.size)
        square = Image.new("RGB", (side, side))
        square.paste(image)
        array = as_array(square.resize((320, 320), Image.Resampling.BILINEAR)).astype(np.float32)
        (output,) = session.run(None, {"images": array.transpose(2, 0, 1)[None]})
        assert row["score_faces"] == pytest.approx(float(output[0, [5, 16]].max()), abs=0.05)
        assert (row["reason"] == "faces_high") == (row["score_faces"] > 0.5)
    # The drawing of a bricklayer: the only large face that looks at us.
    assert counters["image_drops"] == {"faces_high": 1}
    assert [row["key"] for row in rows if row["reason"]] == ["000000032"]
