"""``mc2 search``: on the terminal, over HTTP, and as a page in a real browser."""

import json
import shutil
import threading
import urllib.error
import urllib.parse
import urllib.request

import pytest

import mc2_hpc
from mc2_hpc.cli import main
from mc2_hpc.conversion.convert import convert
from mc2_hpc.evaluation.images import ImageFiles
from mc2_hpc.evaluation.search import ImageIndex, make_server


@pytest.fixture
def index(encoder, image_folder):
    (image_folder / "below").mkdir()
    shutil.copy(image_folder / "00.jpg", image_folder / "below" / "<b>&.jpg")
    (image_folder / "05.jpg").write_bytes(b"damaged")
    return ImageIndex(encoder, image_folder)


@pytest.fixture
def address(index):
    server = make_server(index, 0)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join(10)


def get(address: str):
    with urllib.request.urlopen(address, timeout=30) as answer:
        return answer.headers["Content-Type"], answer.read()


def test_hits_are_ordered_by_cosine(index, encoder, image_folder):
    features = encoder.images(ImageFiles(image_folder, [index.images.name(i) for i in range(11)])).features
    scores = (features @ encoder.texts(["кошка"])[0]).tolist()
    hits = index.search("кошка", 20)
    assert len(hits) == len(index) == 10 and index.skipped == {"image_undecodable": 1}
    expected = sorted((i for i in range(11) if index.images.name(i) != "05.jpg"), key=lambda i: (-scores[i], i))
    assert [hit.index for hit in hits] == expected
    assert [hit.score for hit in hits] == pytest.approx([scores[i] for i in expected], abs=1e-6)


def test_on_the_terminal_and_only_embedded_once(tiny_checkpoint, image_folder, tmp_path, capsys):
    words = ["search", str(tiny_checkpoint), "--images", str(image_folder), "--cache", str(tmp_path / "cache")]
    assert main([*words, "猫", "--top", "3"]) == 0
    first = capsys.readouterr().out
    assert len(first.splitlines()) == 3 and str(image_folder) in first
    (kept,) = (tmp_path / "cache").iterdir()
    before = kept.stat().st_mtime_ns
    assert main([*words, "猫", "--top", "3"]) == 0
    assert capsys.readouterr().out == first and kept.stat().st_mtime_ns == before


@pytest.mark.parametrize("kind", ["open_clip", "hf"])
def test_others_models_search_too(kind, tiny_checkpoint, image_folder, tmp_path, capsys):
    convert(tiny_checkpoint, kind, tmp_path / kind)
    words = ["search", str(tmp_path / kind), "--images", str(image_folder), "--cache", str(tmp_path / "cache")]
    assert main([*words, "кошка", "--top", "10"]) == 0
    hits = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
    encoder = mc2_hpc.load(tmp_path / kind, device="cpu")
    scores = encoder.encode_image([name for _, name in hits]) @ encoder.encode_text("кошка")
    assert [float(score) for score, _ in hits] == pytest.approx(scores.tolist(), abs=6e-4)
    assert scores.tolist() == sorted(scores.tolist(), reverse=True) and len({name for _, name in hits}) == 10


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "give either words to look for, or --serve"),
        (["cat", "--top", "0"], "--top 0: must be at least 1"),
        (["--serve", "99999"], "--serve 99999: must be at most 65,535"),
        (["cat", "--images", "nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_one_line(words, message, tiny_checkpoint, image_folder, capsys):
    images = [] if "--images" in words else ["--images", str(image_folder)]
    assert main(["search", str(tiny_checkpoint), *words, *images]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_over_http(address, index):
    kind, page = get(f"{address}/")
    assert kind.startswith("text/html") and b"<input" in page
    kind, body = get(f"{address}/search?q={urllib.parse.quote('кошка')}")
    found = json.loads(body)
    assert kind == "application/json" and [hit["index"] for hit in found] == [
        h.index for h in index.search("кошка", 24)
    ]
    assert json.loads(get(f"{address}/search?q=%20")[1]) == []
    kind, image = get(f"{address}/picture/{found[0]['index']}")
    assert kind == "image/jpeg" and image.startswith(b"\xff\xd8")


@pytest.mark.parametrize("path", ["/picture/11", "/picture/../../etc/passwd", "/picture/-1", "/other", "/picture/%30"])
def test_nothing_else_is_served(address, path):
    with pytest.raises(urllib.error.HTTPError) as answer:
        get(address + path)
    assert answer.value.code == 404


def test_a_image_that_went_away(address, image_folder):
    (image_folder / "01.jpg").unlink()
    with pytest.raises(urllib.error.HTTPError) as answer:
        get(f"{address}/picture/1")
    assert answer.value.code == 410


def test_in_a_browser(address, index, browse):
    page = browse(f"{address}/?q={urllib.parse.quote('кошка')}")
    assert page.count("<figure>") == len(index) == 10
    assert "10 closest images" in page
    assert "below/&lt;b&gt;&amp;.jpg" in page  # a file's name is text, not markup
    first = index.search("кошка", 1)[0]
    assert page.index(f'src="/picture/{first.index}"') == page.index('src="/picture/')
