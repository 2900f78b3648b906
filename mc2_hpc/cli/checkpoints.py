"""Checkpoints of others, for the commands that take them as well as ours."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def as_ours(source: Path) -> Iterator[Path]:
    """The checkpoint itself, or, while the context lasts, a copy in our format of an open_clip or transformers folder.

    Raises:
        UserError: a model that conversion does not know.
    """
    if not any((source / name).is_file() for name in ("open_clip_config.json", "config.json")):
        yield source
        return
    from mc2_hpc.conversion.convert import convert

    with tempfile.TemporaryDirectory() as scratch:
        convert(source, "mc2", Path(scratch) / "model")
        yield Path(scratch) / "model"
