"""Search a folder of images with words in any language; also as a page in the browser.

index = ImageIndex(encoder, folder)
index.search("кошка", 10)
"""

import json
import threading
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import torch

from mc2_hpc.drops import Dropped
from mc2_hpc.evaluation.encoder import Encoder
from mc2_hpc.evaluation.images import ImageFiles
from mc2_hpc.evaluation.nearest import nearest
from mc2_hpc.evaluation.sets.files import images_below
from mc2_hpc.images import thumbnail
from mc2_hpc.pages import render

HOST = "127.0.0.1"
_THUMBNAIL = 320
_LONGEST_QUERY = 1_000
_SHOWN = 24


@dataclass(frozen=True)
class Hit:
    """An image found."""

    index: int
    """Position among the folder's images, ordered by name."""
    name: str
    """Path below the folder."""
    score: float
    """Cosine similarity of image and words."""


class ImageIndex:
    """The images in and below a folder, embedded once."""

    def __init__(self, encoder: Encoder, folder: Path, progress: Callable[[int, int], None] | None = None) -> None:
        """
        Raises:
            UserError: no such folder, or no image in it can be decoded.
        """
        self.images = ImageFiles(folder, images_below(folder))
        self._encoder = encoder
        found = encoder.images(self.images, progress)
        self._numbers = torch.nonzero(found.usable).flatten()
        self._features = found.features[self._numbers]
        self.skipped = found.skipped()
        self._one_at_a_time = threading.Lock()

    def __len__(self) -> int:
        return len(self._numbers)

    def search(self, query: str, count: int) -> list[Hit]:
        """The images closest to ``query``, best first; at most ``count``."""
        with self._one_at_a_time:
            words = self._encoder.texts([query])
        scores, places = nearest(words, self._features, min(count, len(self)))
        numbers = self._numbers[places[0]].tolist()
        return [
            Hit(number, self.images.name(number), score)
            for number, score in zip(numbers, scores[0].tolist(), strict=True)
        ]


def make_server(index: ImageIndex, port: int) -> ThreadingHTTPServer:
    """A server for the search page, reachable only from this machine; port 0 picks a free one. Run ``serve_forever``.

    Raises:
        OSError: the port is taken.
    """
    return ThreadingHTTPServer((HOST, port), type("Handler", (_Handler,), {"index": index}))


class _Handler(BaseHTTPRequestHandler):
    """``/`` is the page, ``/search?q=`` its JSON, ``/picture/<number>`` a thumbnail. No part of a request is a path."""

    index: ImageIndex
    timeout = 30

    def do_GET(self) -> None:
        address = urlsplit(self.path)
        if address.path == "/":
            page = render("mc2_hpc.evaluation", "search.html", {})
            self._send("text/html; charset=utf-8", page.encode())
        elif address.path == "/search":
            query = parse_qs(address.query).get("q", [""])[0].strip()[:_LONGEST_QUERY]
            hits = self.index.search(query, _SHOWN) if query else []
            found = [{"index": hit.index, "name": hit.name, "score": round(hit.score, 4)} for hit in hits]
            self._send("application/json", json.dumps(found).encode())
        elif address.path.startswith("/picture/"):
            self._image(address.path.removeprefix("/picture/"))
        else:
            self.send_error(HTTPStatus.NOT_FOUND)

    def _image(self, number: str) -> None:
        if not (number.isascii() and number.isdigit() and int(number) < len(self.index.images)):
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        try:
            small = thumbnail(self.index.images.read(int(number)), _THUMBNAIL)
        except (OSError, Dropped):  # gone or replaced since it was embedded
            self.send_error(HTTPStatus.GONE)
            return
        self._send("image/jpeg", small)

    def _send(self, kind: str, body: bytes) -> None:
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        """Do not log requests."""
