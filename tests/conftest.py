"""Fixtures that every test may use."""

import html
import importlib.util
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from mc2_hpc.peers import import_open_clip, import_transformers

# Tests are no package, so the file beside this one is loaded by its path.
_spec = importlib.util.spec_from_file_location("slurm_cluster", Path(__file__).with_name("slurm_cluster.py"))
_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_module)
slurm_cluster = _module.slurm_cluster


@pytest.fixture(scope="session")
def open_clip() -> ModuleType:
    """open_clip, imported the way the product imports it."""
    return import_open_clip()


@pytest.fixture(scope="session")
def transformers() -> ModuleType:
    """transformers, imported the way the product imports it."""
    return import_transformers()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real data that lies beside a checkout on some machines; tests that need it skip elsewhere."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real data beside the checkout ({folder.name} folder of shared is missing)")
    return folder


class ParsedPage(HTMLParser):
    """An HTML page's elements with their attributes, and its text; asserts that every element is closed in order."""

    _VOID = frozenset({"meta", "img", "input", "br"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(page)
        self.close()
        assert not self._open, f"left open: {self._open}"

    def attributes(self, name: str) -> list[str | None]:
        """Values of an attribute, in order."""
        return [attributes[name] for _, attributes in self.tags if name in attributes]

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self._VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open and self._open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="session")
def parse_page() -> Callable[[str], ParsedPage]:
    """``parse_page(html)``: a page taken apart; fails where it is not well formed or an id stands there twice."""

    def parse(page: str) -> ParsedPage:
        parsed = ParsedPage(page)
        ids = parsed.attributes("id")
        assert len(set(ids)) == len(ids)
        return parsed

    return parse


@pytest.fixture
def browse(tmp_path) -> Callable[..., str]:
    """``browse(address, width=1400)``: what a page has become once a real browser has run it, as HTML."""
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium on this machine (apt-get install chromium)")
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    flags += " --disable-component-update --disable-sync --virtual-time-budget=20000 --dump-dom"

    def dump(address: str, width: int = 1400) -> str:
        command = [chromium, *flags.split(), f"--window-size={width},2000", f"--user-data-dir={tmp_path / 'profile'}"]
        result = subprocess.run([*command, address], capture_output=True, text=True, timeout=180)
        assert "</html>" in result.stdout, result.stderr[-2000:]
        return result.stdout

    return dump


@pytest.fixture
def measure(browse, tmp_path) -> Callable[..., Any]:
    """``measure(page, script, width)``: the value of a JavaScript expression once a page of that width is laid out."""

    def run(page: str, script: str, width: int = 1400) -> Any:
        path = tmp_path / "measured.html"
        note = f"<script>document.title = JSON.stringify({script})</script>"
        path.write_text(page.replace("</body>", f"{note}</body>"), encoding="utf-8")
        title = re.search(r"<title>(.*?)</title>", browse(path.as_uri(), width), re.S)
        assert title is not None
        return json.loads(html.unescape(title[1]))

    return run
