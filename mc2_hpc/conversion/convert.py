"""``mc2 convert``: convert a model between three formats, completely or not at all."""

import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from mc2_hpc.conversion import huggingface, open_clip
from mc2_hpc.errors import UserError
from mc2_hpc.models.formats import Format, detect_format
from mc2_hpc.models.weights import resolve_checkpoint
from mc2_hpc.storage import fsync_folder, remove_folder

logger = logging.getLogger(__name__)

EXPORTERS: dict[str, Callable[[Path, Path], None]] = {
    Format.OPEN_CLIP: open_clip.export,
    Format.TRANSFORMERS: huggingface.export,
}
IMPORTERS: dict[str, Callable[[Path, Path], None]] = {
    Format.OPEN_CLIP: open_clip.import_model,
    Format.TRANSFORMERS: huggingface.import_model,
}
FORMATS = (*EXPORTERS, Format.OURS)


def convert(source: str | Path, to: str, out: str | Path) -> Path:
    """Convert the model at ``source`` to the format ``to``, write it to the folder ``out`` and return ``out``.

    The conversion is atomic: everything is written to a hidden folder beside ``out``, which is then renamed.

    Args:
        source: a checkpoint or run folder of ours, an open_clip folder, or a transformers MetaClip2 folder.
        to: ``open_clip``, ``hf`` or ``mc2`` (ours).
        out: a folder that does not exist or is empty.

    Raises:
        UserError: unknown format or source, ``out`` is not empty, or the model does not fit (see the converters).
    """
    source, out = Path(source), Path(out)
    if to not in FORMATS:
        raise UserError(f"--to {to!r}: choose one of {', '.join(FORMATS)}")
    kind = detect_format(source)
    if kind == to:
        raise UserError(f"{source}: is already in the format {to}; choose another --to")
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


def _write(source: Path, kind: str, to: str, out: Path) -> None:
    if kind == Format.OURS:
        EXPORTERS[to](resolve_checkpoint(source), out)
    elif to == Format.OURS:
        IMPORTERS[kind](source, out)
    else:
        ours = out / "ours"
        ours.mkdir()
        IMPORTERS[kind](source, ours)
        EXPORTERS[to](ours, out)
        shutil.rmtree(ours)
