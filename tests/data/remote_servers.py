"""Servers that the remote tests run on this machine: S3 by moto, and HTTP that can fail on request."""

import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Web:
    """An HTTP server for ``files``.

    Attributes:
        files: content by path.
        faults: how many of the next GETs of a path fail.
        fault: how they fail: ``drop`` (connection closed after half the body), ``busy`` (503), or ``hang`` (no answer).
        ranges: whether it supports byte ranges.
        gets: GETs so far by path.
    """

    address: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    faults: Counter[str] = field(default_factory=Counter)
    fault: str = "drop"
    ranges: bool = True
    gets: Counter[str] = field(default_factory=Counter)
    release: threading.Event = field(default_factory=threading.Event)


@contextmanager
def http_server() -> Iterator[Web]:
    web = Web()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            if self.path not in web.files:
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(web.files[self.path])))
            self.send_header("ETag", f'"{hash(web.files[self.path])}"')
            self.end_headers()

        def do_GET(self) -> None:
            web.gets[self.path] += 1
            if self.path not in web.files:
                self.send_error(404)
                return
            body = web.files[self.path]
            asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            if asked and web.ranges:
                body = body[int(asked[1]) : int(asked[2]) + 1]
            faulty = web.faults[self.path] > 0
            if faulty:
                web.faults[self.path] -= 1
                if web.fault == "hang":
                    web.release.wait(60)
                    self.close_connection = True
                    return
                if web.fault == "busy":
                    self.send_error(503)
                    return
            self.send_response(206 if asked and web.ranges else 200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: len(body) // 2] if faulty else body)
            if faulty:
                self.close_connection = True

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    web.address = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield web
    finally:
        web.release.set()
        server.shutdown()
        server.server_close()
