"""Changes of the mix between two starts, one line each."""

from typing import Any

import pytest

from mc2_hpc.training.resume_sources import source_changes


def source(name: str, **changes: Any) -> dict[str, Any]:
    return {"name": name, "path": f"/{name}", "weight": 1.0, "balance": None, "captions": {}, **changes}


@pytest.mark.parametrize(
    "before, now, lines",
    [
        ("/a", ["/a", "/b"], ["data.train /a -> ['/a', '/b']"]),
        ("/a", [source("x"), source("y")], ["data.train /a -> the sources x, y, each from its start"]),
        ([source("x")], "/a", ["data.train the sources x -> /a, from its start"]),
        (
            [source("x"), source("y")],
            [source("y"), source("z")],
            ["data.train: no source x any more", "data.train: new source z, from its start"],
        ),
        ([source("x"), source("y")], [source("y"), source("x")], []),
        (
            [source("x", captions={"txt": 1.0})],
            [source("x", weight=2.0, balance="/b", path="/c")],
            [
                "data.train: source x: path /x -> /c",
                "data.train: source x: weight 1.0 -> 2.0",
                "data.train: source x: balance None -> /b",
                "data.train: source x: captions {'txt': 1.0} -> {}",
            ],
        ),
    ],
)
def test_each_change_is_a_line(before: Any, now: Any, lines: list[str]) -> None:
    assert source_changes(before, now) == lines
