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


def open_dual_encoder(source: str | Path, device: torch.device, *, eval_resize: str | None = None) -> DualEncoder:
    """The model at ``source``: our checkpoint or run folder, a folder of open_clip or transformers, or an ONNX export.

    Args:
        eval_resize: one of ``RESIZES``; None is the model's own.

    Raises:
        UserError: there is no model, its library is not installed or cannot load it, or it does not support the resize.
    """
    if eval_resize is not None and eval_resize not in RESIZES:
        raise UserError(f"eval_resize={eval_resize}: choose one of {', '.join(RESIZES)}")
    source = Path(source)
    return _LOADERS[detect_format(source)](source, device, eval_resize)
