"""A web server on 127.0.0.1 for tests of fetching: each path is one way in which servers behave."""

import asyncio
import gzip
import io
import ssl
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image

Handler = Callable[["Request"], Awaitable[None]]


def encoded(kind: str = "JPEG", size: tuple[int, int] = (48, 32), seed: int = 0, mode: str = "RGB", **options) -> bytes:
    """A small image of noise."""
    rng = np.random.default_rng(seed)
    channels = {"RGB": (3,), "RGBA": (4,), "L": (), "CMYK": (4,)}[mode]
    pixels = rng.integers(0, 256, (size[1], size[0], *channels), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels, mode).save(file, kind, **options)
    return file.getvalue()


class Request:
    """A request, and ways to answer it."""

    def __init__(self, path: str, headers: dict[str, str], writer: asyncio.StreamWriter) -> None:
        self.path = path
        self.headers = headers
        self.writer = writer

    def start(self, status: int, headers: dict[str, object]) -> None:
        lines = [f"HTTP/1.1 {status} x", "Connection: close", *(f"{name}: {value}" for name, value in headers.items())]
        self.writer.write(("\r\n".join(lines) + "\r\n\r\n").encode())

    async def answer(self, status: int, body: bytes = b"", **headers: object) -> None:
        self.start(status, {"Content-Length": len(body), **{k.replace("_", "-"): v for k, v in headers.items()}})
        self.writer.write(body)
        await self.writer.drain()


class ImageServer:
    """Serves the paths in :attr:`handlers`; others are 404."""

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self.tls = tls
        self.handlers: dict[str, Handler] = {}
        self.requests: Counter[str] = Counter()
        self.times: list[float] = []
        self.seen: dict[str, dict[str, str]] = {}
        """The headers of the last request to a path."""
        self.num_open = 0
        self.most_open = 0
        self.port = 0

    def url(self, path: str, host: str = "127.0.0.1") -> str:
        return f"{'https' if self.tls else 'http'}://{host}:{self.port}{path}"

    def add(self, path: str, handler: Handler) -> str:
        self.handlers[path] = handler
        return self.url(path)

    def image(self, path: str, body: bytes, status: int = 200, **headers: object) -> str:
        """A path that answers with ``body``."""
        return self.add(path, lambda request: request.answer(status, body, **headers))

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_open += 1
        self.most_open = max(self.most_open, self.num_open)
        try:
            first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            path = first.split()[1]
            headers = dict(line.lower().split(": ", 1) for line in lines if line)
            self.requests[path] += 1
            self.times.append(time.monotonic())
            self.seen[path] = headers
            handler = self.handlers.get(path, lambda request: request.answer(404))
            await handler(Request(path, headers, writer))
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self.num_open -= 1
            writer.close()


@contextmanager
def running(server: ImageServer) -> Iterator[ImageServer]:
    """Serve from a thread until the end of the block."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    starting = asyncio.start_server(server.serve, "127.0.0.1", 0, ssl=server.tls)
    listening = asyncio.run_coroutine_threadsafe(starting, loop).result(10)
    server.port = listening.sockets[0].getsockname()[1]
    try:
        yield server
    finally:

        async def end() -> None:
            listening.close()
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(end(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


def bad_behaviours(server: ImageServer) -> dict[str, tuple[str, str]]:
    """Paths that misbehave: by name, the address and the reason under which fetching it must end."""
    good = encoded(size=(64, 64))

    async def slow(request: Request) -> None:
        request.start(200, {"Content-Length": len(good)})
        for byte in good:
            request.writer.write(bytes([byte]))
            await request.writer.drain()
            await asyncio.sleep(0.05)

    async def silent(request: Request) -> None:
        await asyncio.sleep(600)

    async def endless(request: Request) -> None:
        request.start(200, {"Transfer-Encoding": "chunked"})
        while True:
            request.writer.write(b"10000\r\n" + b"\xff" * 0x10000 + b"\r\n")
            await request.writer.drain()

    async def cut(request: Request) -> None:
        request.start(200, {"Content-Length": len(good)})
        request.writer.write(good[: len(good) // 2])
        await request.writer.drain()

    async def not_http(request: Request) -> None:
        request.writer.write(b"SSH-2.0-OpenSSH_9.2\r\n")
        await request.writer.drain()

    def redirect(to: str) -> Handler:
        return lambda request: request.answer(302, Location=to)

    return {
        "gone": (server.url("/gone"), "http_404"),
        "gone for good": (server.image("/410", b"", 410), "http_404"),
        "forbidden": (server.image("/403", b"", 403), "http_error"),
        "fault": (server.image("/500", b"", 500), "http_error"),
        "slow": (server.add("/slow", slow), "timeout"),
        "silent": (server.add("/silent", silent), "timeout"),
        "endless": (server.add("/endless", endless), "too_large"),
        "large": (server.image("/large", b"", Content_Length=1 << 40), "too_large"),
        "cut": (server.add("/cut", cut), "response_broken"),
        "too long": (server.image("/long", good, Content_Length=len(good) + 10), "response_broken"),
        "too short": (server.image("/short", good, Content_Length=len(good) - 40), "response_broken"),
        "ends early": (server.image("/early", good[:-40]), "image_truncated"),
        "not http": (server.add("/ssh", not_http), "response_broken"),
        "loop": (server.add("/loop", redirect("/loop")), "too_many_redirects"),
        "to a file": (server.add("/file", redirect("file:///etc/passwd")), "url_not_http"),
        "to nowhere": (server.add("/nowhere", redirect("")), "url_missing"),
        "to private": (server.add("/private", redirect(server.url("/", "127.0.0.2"))), "address_refused"),
        "page": (server.image("/page", b"<!doctype html><p>no", Content_Type="image/jpeg"), "not_an_image"),
        "empty": (server.image("/empty", b""), "not_an_image"),
        "drawing": (server.image("/svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>"), "image_unsupported"),
        "gzip bomb": (server.image("/bomb", gzip.compress(bytes(1 << 26)), Content_Encoding="gzip"), "too_large"),
        "gzip cut": (server.image("/gz", gzip.compress(good)[:-9], Content_Encoding="gzip"), "response_broken"),
        "pixel bomb": (server.image("/pixels", png_of(60_000, 60_000)), "image_too_large"),
        "png cut": (server.image("/png", encoded("PNG")[:-30]), "image_undecodable"),
        "opted out": (server.image("/noai", good, X_Robots_Tag="noarchive, NoAI"), "opted_out"),
        "busy": (server.image("/busy", b"", 429, Retry_After=0), "http_busy"),
        # Another name for the server, because a host that asks for so long gets no more requests.
        "busy for long": (
            server.image("/later", b"", 503, Retry_After=9999).replace("127.0.0.1", "localhost"),
            "http_busy",
        ),
    }


def png_of(width: int, height: int) -> bytes:
    """A small PNG whose header promises so many pixels."""
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(9))) + chunk(b"IEND", b"")
