"""``mc2 convert``: convert a model between three formats, or export it to ONNX, completely or not at all."""

import dataclasses
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import torch

from mc2_hpc.conversion import huggingface, onnx, open_clip
from mc2_hpc.conversion.model_card import write_model_card
from mc2_hpc.conversion.model_folder import DTYPES, read_model, write_model
from mc2_hpc.conversion.provenance import Score, find_provenance, read_scores, write_provenance
from mc2_hpc.errors import UserError
from mc2_hpc.models.formats import Format, detect_format
from mc2_hpc.models.positions import IMAGE_POSITIONS, describe_resizing, image_positions, num_image_positions
from mc2_hpc.models.weights import read_card, resolve_checkpoint
from mc2_hpc.storage import atomic_folder

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
    results: Path | None = None,
    ema: bool = False,
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
        results: ``results.json`` of ``mc2 eval`` for the model card; None: the run's own evaluation, if there is one.
        ema: take the moving average of the weights, which only checkpoints of ours may have.

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
    if ema and kind != Format.OURS:
        raise UserError(f"{source}: is in the format {kind}, which has no moving average of weights; leave out --ema")
    adapted = kind == Format.OURS and read_card(resolve_checkpoint(source)).lora is not None
    if kind == to and image_size is None and dtype is None and not ema and not adapted:
        raise UserError(f"{source}: is already in the format {to}; choose another --to, an --image-size or a --dtype")
    scores = read_scores(results) if results is not None else None
    with atomic_folder(out) as partial:
        _write(
            source, kind, to, partial, image_size=image_size, dtype=dtype or "fp32", int8=int8, scores=scores, ema=ema
        )
    logger.info("converted %s (%s) to %s (%s)", source, kind, out, to)
    return out


def _write(
    source: Path,
    kind: str,
    to: str,
    out: Path,
    *,
    image_size: int | None,
    dtype: str,
    int8: bool,
    scores: list[Score] | None,
    ema: bool,
) -> None:
    scratch = out / "scratch"
    scratch.mkdir()
    ours = resolve_checkpoint(source) if kind == Format.OURS else scratch / "imported"
    found = find_provenance(source if kind != Format.OURS else ours, ema=ema)
    if kind != Format.OURS:
        ours.mkdir()
        IMPORTERS[kind](source, ours)
    if ema or read_card(ours).lora is not None:
        ours = _plain(ours, scratch / "plain", ema=ema)
    if image_size is not None:
        before = read_card(ours).arch.vision.image_size
        ours = _resize(ours, image_size, scratch / "resized")
        trained = found.trained_size or before
        # The scores were another model's.
        found = msgspec.structs.replace(found, scores=[], trained_size=trained if trained != image_size else None)
    if scores is not None:
        found = msgspec.structs.replace(found, scores=scores)
    card = read_card(ours)
    if to == Format.OURS:
        for path in ours.iterdir():
            path.rename(out / path.name)
    elif to == Format.ONNX:
        onnx.export(ours, out, int8=int8)
    else:
        EXPORTERS[to](ours, out, DTYPES[dtype])
    write_provenance(out, found)
    if to != Format.OURS:
        write_model_card(out, Format(to), card, found, weights="int8" if int8 else dtype)
    shutil.rmtree(scratch)


def _plain(source: Path, out: Path, *, ema: bool) -> Path:
    """The weights of a checkpoint or their moving average, with adapters folded, as a model folder."""
    card, files, tokenizer = read_model(source, ema=ema)
    out.mkdir()
    write_model(out, card, ((name, files.get_fp32(name)) for name in files.names()), tokenizer)
    return out


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
