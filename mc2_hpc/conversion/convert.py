"""``mc2 convert``: convert a model between three formats, or export it to ONNX, completely or not at all."""

import dataclasses
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from mc2_hpc.conversion import huggingface, onnx, open_clip
from mc2_hpc.conversion.model_folder import DTYPES, read_model, write_model
from mc2_hpc.errors import UserError
from mc2_hpc.models.formats import Format, detect_format
from mc2_hpc.models.positions import IMAGE_POSITIONS, describe_resizing, image_positions, num_image_positions
from mc2_hpc.models.weights import resolve_checkpoint
from mc2_hpc.storage import fsync_folder, remove_folder

logger = logging.getLogger(__name__)

EXPORTERS: dict[str, Callable[[Path, Path, torch.dtype], None]] = {
    Format.OPEN_CLIP: open_clip.export,
    Format.TRANSFORMERS: huggingface.export,
}
IMPORTERS: dict[str, Callable[[Path, Path], None]] = {
    Format.OPEN_CLIP: open_clip.import_model,
    Format.TRANSFORMERS: huggingface.import_model,
}
FORMATS = (*EXPORTERS, Format.OURS, Format.ONNX)


def convert(
    source: str | Path,
    to: str,
    out: str | Path,
    *,
    image_size: int | None = None,
    dtype: str | None = None,
    int8: bool = False,
) -> Path:
    """Convert the model at ``source`` to the format ``to``, write it to the folder ``out`` and return ``out``.

    The conversion is atomic: everything is written to a hidden folder beside ``out``, which is then renamed.

    Args:
        source: a checkpoint or run folder of ours, an open_clip folder, or a transformers MetaClip2 folder.
        to: ``open_clip``, ``hf``, ``mc2`` (ours) or ``onnx``.
        out: a folder that does not exist or is empty.
        image_size: side in pixels of the images that the new model takes: its table of positions is interpolated
            (:mod:`mc2_hpc.models.positions`); None keeps the source's.
        dtype: ``fp32``, ``bf16`` or ``fp16``, of the weights of an open_clip or transformers folder; None is fp32.
        int8: quantise an ONNX model's weights to 8 bits.

    Raises:
        UserError: unknown format or source, ``out`` is not empty, the patch size does not divide ``image_size``, or the
            model does not fit (see the converters).
    """
    source, out = Path(source), Path(out)
    if to not in FORMATS:
        raise UserError(f"--to {to!r}: choose one of {', '.join(FORMATS)}")
    if dtype is not None and (to not in EXPORTERS or dtype not in DTYPES):
        raise UserError(f"--dtype {dtype} --to {to}: choose {', '.join(DTYPES)}, with --to {' or '.join(EXPORTERS)}")
    if int8 and to != Format.ONNX:
        raise UserError(f"--int8: quantises ONNX models, not --to {to}; leave it out or choose --to onnx")
    kind = detect_format(source)
    if kind == Format.ONNX:
        raise UserError(f"{source}: an ONNX export cannot be converted; name the model that it was made from")
    if kind == to and image_size is None and dtype is None:
        raise UserError(f"{source}: is already in the format {to}; choose another --to, an --image-size or a --dtype")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists and is not an empty folder; choose another --out or remove it")
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.absolute().name}.", dir=out.absolute().parent))
    try:
        _write(source, kind, to, partial, image_size=image_size, dtype=DTYPES[dtype or "fp32"], int8=int8)
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


def _write(
    source: Path, kind: str, to: str, out: Path, *, image_size: int | None, dtype: torch.dtype, int8: bool
) -> None:
    scratch = out / "scratch"
    scratch.mkdir()
    ours = resolve_checkpoint(source) if kind == Format.OURS else scratch / "imported"
    if kind != Format.OURS:
        ours.mkdir()
        IMPORTERS[kind](source, ours)
    if image_size is not None:
        ours = _resize(ours, image_size, scratch / "resized")
    if to == Format.OURS:
        for path in ours.iterdir():
            path.rename(out / path.name)
    elif to == Format.ONNX:
        onnx.export(ours, out, int8=int8)
    else:
        EXPORTERS[to](ours, out, dtype)
    shutil.rmtree(scratch)


def _resize(source: Path, image_size: int, out: Path) -> Path:
    card, files, tokenizer = read_model(source)
    vision = dataclasses.replace(card.arch.vision, image_size=image_size)
    arch = dataclasses.replace(card.arch, vision=vision)
    rows = num_image_positions(arch)
    weights = ((name, files.get_fp32(name)) for name in files.names())
    resized = ((name, image_positions(w, rows) if name == IMAGE_POSITIONS else w) for name, w in weights)
    out.mkdir()
    write_model(out, dataclasses.replace(card, arch=arch), resized, tokenizer)
    logger.info("%s", "; ".join([f"resized {source}", *describe_resizing(card.arch, arch)]))
    return out
