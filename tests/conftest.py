"""Fixtures for all tests, and how tests are distributed over workers (``pytest -n``)."""

import gc
import html
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest

from tests.forking import ForkServer
from tests.slurm_cluster import slurm_cluster  # noqa: F401  # a fixture

if TYPE_CHECKING:
    from tests.faults.tiny_run import TinyPool

# torch reads this when it is imported later, so every test process computes on one thread.
os.environ.setdefault("OMP_NUM_THREADS", "1")

Ranks = Callable[..., subprocess.CompletedProcess[str]]


SLURM_S = 900
"""Tests on the Slurm cluster often wait for its scheduler."""
LONGEST_FIRST = (
    "slurm",
    "tests/training/test_faults.py",
    "tests/training/test_cli_train.py",
    "tests/tuning/test_tune.py",
    "tests/training/test_train_less.py",
    "tests/training/test_zero.py",
    "tests/kernels/test_triton_interpreter.py",
    "tests/quickstart/test_quickstart_run.py",
)
"""Groups that take long are started first, so that no worker is left with one of them at the end."""


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep a module's tests on one worker because of its fixtures, and likewise all tests of the one Slurm cluster."""
    for item in filter(_uses_slurm, items):
        item.add_marker(pytest.mark.timeout(SLURM_S), append=False)
    if not hasattr(config, "workerinput"):
        return
    groups = {item: "slurm" if _uses_slurm(item) else item.nodeid.partition("::")[0] for item in items}
    for item, group in groups.items():
        item.add_marker(pytest.mark.xdist_group(group))
    places = {group: place for place, group in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: places.get(groups[item], len(places)))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Refuse to run in parallel without the groups, which a pytest that pytest-xdist does not know loses silently."""
    if hasattr(session.config, "workerinput") and session.items and "@" not in session.items[0].nodeid:
        raise pytest.UsageError("pytest-xdist did not group the tests; install the versions of pyproject.toml")
    gc.freeze()  # what the test modules have imported stays, and every collection would look at all of it


def pytest_sessionfinish() -> None:
    """Let the interpreter end as always."""
    gc.unfreeze()


def _uses_slurm(item: pytest.Item) -> bool:
    return "slurm_cluster" in getattr(item, "fixturenames", ())


@pytest.fixture(scope="session")
def open_clip() -> ModuleType:
    """open_clip, imported the way the product imports it."""
    from mc2_hpc.conversion.peers import import_open_clip

    return import_open_clip()


@pytest.fixture(scope="session")
def transformers() -> ModuleType:
    """transformers, imported the way the product imports it."""
    from mc2_hpc.conversion.peers import import_transformers

    return import_transformers()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real data that some machines have beside the checkout; elsewhere, tests that need it are skipped."""
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
    """``parse_page(html)``: a parsed page; fails if it is not well formed or an id occurs twice."""

    def parse(page: str) -> ParsedPage:
        parsed = ParsedPage(page)
        ids = parsed.attributes("id")
        assert len(set(ids)) == len(ids)
        return parsed

    return parse


@pytest.fixture
def examples(monkeypatch) -> Path:
    """The folder of examples, whose modules can be imported."""
    folder = Path(__file__).resolve().parents[1] / "examples"
    monkeypatch.syspath_prepend(str(folder))
    return folder


@pytest.fixture
def module_of(tmp_path, monkeypatch) -> Callable[[str], str]:
    """``module_of(code)``: the name of a user's module in the test's folder, which this process alone searches."""

    def write(code: str) -> str:
        name = f"module_of_{tmp_path.name}"
        (tmp_path / f"{name}.py").write_text(code, encoding="utf-8")
        monkeypatch.syspath_prepend(str(tmp_path))
        return name

    return write


@pytest.fixture(scope="session")
def outputs() -> Callable[[Path], dict[str, bytes]]:
    """``outputs(folder)``: the bytes of every file below it by relative path, without logs and hidden files."""

    def read(folder: Path) -> dict[str, bytes]:
        files = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
        files = (path for path in files if "logs" not in path.relative_to(folder).parts)
        return {str(path.relative_to(folder)): path.read_bytes() for path in files}

    return read


@pytest.fixture
def browse(tmp_path) -> Callable[..., str]:
    """``browse(address, width=1400)``: the HTML of a page after a real browser has run it."""
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


@pytest.fixture(scope="session")
def fork_server() -> Iterator[ForkServer]:
    """Runs ``[sys.executable, ...]`` in processes that do not have to import torch and DeepSpeed again."""
    server = ForkServer()
    yield server
    server.close()


@pytest.fixture(scope="session")
def ranks_of(fork_server) -> Ranks:
    """``ranks_of(processes, *arguments, check=True)``: ``python arguments...`` on several gloo ranks, forked."""

    def run(processes: int, *arguments: str | Path, check: bool = True, timeout: float = 240):
        result = fork_server.run_ranks(processes, arguments, timeout=timeout)
        if check and result.returncode:
            pytest.fail(f"exit code {result.returncode}\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}")
        return result

    return run


@pytest.fixture(scope="session")
def tiny_pool(tmp_path_factory) -> "TinyPool":
    """Shared and read-only: tests that damage shards copy them first."""
    from tests.faults.tiny_run import write_pool

    return write_pool(tmp_path_factory.mktemp("pool"))


@pytest.fixture(scope="module")
def module_config(tiny_pool, tmp_path_factory) -> Path:
    """An fp32 run on the tiny pool."""
    from tests.faults.tiny_run import write_config

    folder = tmp_path_factory.mktemp("config")
    values = {"steps": 12, "log_every": 2, "checkpoint": {"every": 6, "keep": 2}}
    return write_config(folder / "tiny.yaml", tiny_pool, output=str(folder / "run"), **values)
