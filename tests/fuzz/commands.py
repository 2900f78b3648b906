"""The commands that the fuzz lane runs, and what of their input it may damage."""

from dataclasses import dataclass, field
from pathlib import Path

from mc2_hpc.reading.settings import typed
from mc2_hpc.reading.yaml_file import read_yaml


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command on the valid world, and what may be damaged (``commands.yaml``)."""

    words: str
    files: dict[str, str]
    """File pattern to kind, a key of ``mutations.BY_KIND``."""
    flags: list[str] = field(default_factory=list)
    overrides: bool = False
    scores: bool = False
    often: int = 1


@dataclass(frozen=True, kw_only=True)
class _Commands:
    commands: dict[str, Command]


_SETS = {
    "xm3600": {"xm3600/captions.jsonl": "json"},
    "lines": {"lines/*.txt": "text"},
    "coco": {"coco.json": "json"},
    "folders": {"folders/*/*": "image"},
    "labelled": {"labelled.parquet": "parquet"},
    "clip": {"clip/test/0.tar": "tar", "clip/test/nshards.txt": "text", "clip/*.txt": "text"},
    "cvqa": {"cvqa/test-0.parquet": "parquet"},
    "street": {"street/*.csv": "text"},
    "geode": {"geode/index.csv": "text"},
    "gldv2": {"gldv2/*.csv": "text"},
}
"""Evaluation sets, with their files below ``sets``."""


def _commands() -> dict[str, Command]:
    tree = read_yaml(Path(__file__).with_name("commands.yaml"), "table of commands")
    found = dict(typed(_Commands, {"commands": tree}, source="commands.yaml").commands)
    for name, files in _SETS.items():
        found[f"eval, {name}"] = Command(
            words=f"eval run --suite suite-{name}.yaml",
            files={**{f"sets/{pattern}": kind for pattern, kind in files.items()}, f"suite-{name}.yaml": "yaml"},
            flags=["--batch"],
            overrides=True,
            scores=True,
        )
    return found


COMMANDS = _commands()
