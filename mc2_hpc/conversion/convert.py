"""``mc2 convert``: a model from one of three formats to another, whole or not at all."""

import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from mc2_hpc.conversion import huggingface, open_clip
from mc2_hpc.conversion.model_folder import is_pickle, refused_pickle
from mc2_hpc.errors import UserError
from mc2_hpc.models.weights import resolve_checkpoint
from mc2_hpc.reading.json_file import Foreign, read_json
from mc2_hpc.storage import fsync_folder, remove_folder

logger = logging.getLogger(__name__)

OURS = "mc2"
EXPORTERS: dict[str, Callable[[Path, Path], None]] = {"open_clip": open_clip.export, "hf": huggingface.export}
IMPORTERS: dict[str, Callable[[Path, Path], None]] = {
    "open_clip": open_clip.import_model,
    "hf": huggingface.import_model,
}
FORMATS = (*EXPORTERS, OURS)


def convert(source: str | Path, to: str, out: str | Path) -> Path:
    """Convert the model at ``source`` to the format ``to`` and write it as the folder ``out``, which it returns.

    The folder appears complete: everything is written to a hidden folder beside it and renamed.

    Args:
        source: a checkpoint or run folder of ours, an open_clip folder, or a transformers MetaClip2 folder.
        to: ``open_clip``, ``hf`` or ``mc2`` (ours).
        out: a folder that does not exist or is empty.

    Raises:
        UserError: unknown format or source, ``out`` is in use, or a model that does not fit (see the converters).
    """
    source, out = Path(source), Path(out)
    if to not in FORMATS:
        raise UserError(f"--to {to!r}: choose one of {', '.join(FORMATS)}")
    kind = detect(source)
    if kind == to:
        raise UserError(f"{source}: is in the format {to} already; choose another --to")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists and is not an empty folder; choose another --out or remove it")
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.absolute().name}.", dir=out.absolute().parent))
    try:
        _write(source, kind, to, partial)
        umask = os.umask(0)
        os.umask(umask)
        partial.chmod(0o777 & ~umask)  # mkdtemp creates 0700
        if out.exists():
            out.rmdir()
        os.replace(partial, out)
        fsync_folder(out.absolute().parent)
    except BaseException:
        remove_folder(partial)
        raise
    logger.info("converted %s (%s) to %s (%s)", source, kind, out, to)
    return out


def detect(source: Path) -> str:
    """The format of ``source``: ``mc2``, ``open_clip`` or ``hf``.

    Raises:
        UserError: nothing there, or none of these.
    """
    if not source.exists():
        raise UserError(f"{source}: no such folder")
    if source.is_file():
        if is_pickle(source):
            raise refused_pickle(source)
        raise UserError(f"{source}: is a file; name the folder that holds the model")
    if (source / open_clip.CONFIG_FILE).is_file():
        return "open_clip"
    if _is_huggingface(source):
        return "hf"
    if _is_ours(source):
        return OURS
    raise UserError(
        f"{source}: no model there (looked for model.json, latest, checkpoints/latest of a run, "
        f"{open_clip.CONFIG_FILE}, and {huggingface.CONFIG_FILE} of transformers)"
    )


def _is_ours(source: Path) -> bool:
    return any(
        (folder / name).is_file() for folder in (source, source / "checkpoints") for name in ("model.json", "latest")
    )


def _is_huggingface(source: Path) -> bool:
    path = source / huggingface.CONFIG_FILE
    return path.is_file() and read_json(path, _AnyConfig).model_type is not msgspec.UNSET


class _AnyConfig(Foreign):
    """A ``config.json`` of anybody's: transformers' names a type of model."""

    model_type: Any = msgspec.UNSET


def _write(source: Path, kind: str, to: str, out: Path) -> None:
    if kind == OURS:
        EXPORTERS[to](resolve_checkpoint(source), out)
    elif to == OURS:
        IMPORTERS[kind](source, out)
    else:
        ours = out / "ours"
        ours.mkdir()
        IMPORTERS[kind](source, ours)
        EXPORTERS[to](ours, out)
        shutil.rmtree(ours)
