"""Importing the libraries that exported models are made for: open_clip, transformers and onnxruntime.

The first two import torchvision, whose PyPI wheels contain operators compiled for CUDA. With a CPU build of torch those
operators do not load, and torchvision fails at the first use of their names. Our code never reaches them (they are for
object detection), so declaring their schemas is enough for the import to succeed.
"""

import importlib
import logging
import sys
from types import ModuleType

import torch

from mc2_hpc.errors import UserError
from mc2_hpc.models.float8 import quieten_torchao

logger = logging.getLogger(__name__)

_MISSING_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)

# A schema lives as long as the Library object that defined it.
_schema_libraries: list[torch.library.Library] = []


def import_open_clip() -> ModuleType:
    """The ``open_clip`` module.

    Raises:
        UserError: open_clip or torchvision is not installed.
    """
    import_torchvision()
    quieten_torchao()
    return _import("open_clip")


def import_transformers() -> ModuleType:
    """The ``transformers`` module, with torchvision importable for the classes it loads lazily.

    Raises:
        UserError: transformers or torchvision is not installed.
    """
    import_torchvision()
    quieten_torchao()
    return _import("transformers")


def import_torchvision() -> ModuleType:
    """The ``torchvision`` module; if its compiled operators cannot load, their schemas are declared and this is logged.

    Raises:
        UserError: torchvision is not installed.
    """
    try:
        return _import("torchvision")
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        logger.info("torchvision's compiled operators do not load with this torch (%s): declaring their schemas", error)
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "DEF")
    for schema in _MISSING_SCHEMAS:
        library.define(schema)
    _schema_libraries.append(library)
    return _import("torchvision")


def import_onnx() -> None:
    """Check that models can be exported to ONNX and quantised.

    Raises:
        UserError: onnx, onnxscript or onnxruntime is not installed.
    """
    for name in ("onnx", "onnxscript", "onnxruntime"):
        _import(name, extra="onnx")


def _import(name: str, *, extra: str = "eval") -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise UserError(f"{name} cannot be imported ({error}): pip install 'mc2_hpc[{extra}]'") from None
