"""CLIP models of four libraries behind one protocol (:mod:`mc2_hpc.evaluation.dual_encoders.protocol`)."""

from collections.abc import Callable
from pathlib import Path

import torch

from mc2_hpc.errors import UserError
from mc2_hpc.evaluation.dual_encoders.onnx import OnnxEncoder
from mc2_hpc.evaluation.dual_encoders.open_clip import OpenClipEncoder
from mc2_hpc.evaluation.dual_encoders.ours import OurEncoder
from mc2_hpc.evaluation.dual_encoders.protocol import RESIZES, DualEncoder
from mc2_hpc.evaluation.dual_encoders.transformers import TransformersEncoder
from mc2_hpc.models.formats import Format, detect_format

_LOADERS: dict[Format, Callable[[Path, torch.device, str | None], DualEncoder]] = {
    Format.OURS: OurEncoder.load,
    Format.OPEN_CLIP: OpenClipEncoder,
    Format.TRANSFORMERS: TransformersEncoder,
    Format.ONNX: OnnxEncoder,
}


def open_dual_encoder(
    source: str | Path, device: torch.device, *, eval_resize: str | None = None, ema: bool = False
) -> DualEncoder:
    """The model at ``source``: our checkpoint or run folder, a folder of open_clip or transformers, or an ONNX export.

    Args:
        eval_resize: one of ``RESIZES``; None is the model's own.
        ema: take the moving average of the weights, which only checkpoints of ours may have.

    Raises:
        UserError: there is no model or no average, its library is not installed or cannot load it, or it does not
            support the resize.
    """
    if eval_resize is not None and eval_resize not in RESIZES:
        raise UserError(f"eval_resize={eval_resize}: choose one of {', '.join(RESIZES)}")
    source = Path(source)
    kind = detect_format(source)
    if not ema:
        return _LOADERS[kind](source, device, eval_resize)
    if kind != Format.OURS:
        raise UserError(f"{source}: is in the format {kind}, which has no moving average of weights; leave out --ema")
    return OurEncoder.load(source, device, eval_resize, ema=True)
