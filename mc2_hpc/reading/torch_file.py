"""Weights in a file that ``torch.save`` wrote: named tensors, and nothing else.

Such a file is a zip archive: a pickle that describes the tensors, and their bytes. ``torch.load(weights_only=True)``
reads it without running code from the file. Before that, the archive is checked: nothing in it is compressed, so it
cannot expand, and tensors are views of the mapped file.
"""

import re
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from mc2_hpc.errors import UserError
from mc2_hpc.reading.files import open_regular, shown

_MOST_PICKLE_BYTES = 64 << 20  # of names and shapes: about 200 bytes per tensor
_MOST_TENSORS = 1_000_000
_WEIGHTS = "state_dict"
"""Where training programs (open_clip's, MetaCLIP's) keep the weights, beside an optimizer's state."""
_CURE = "if you trust the file, save its weights with safetensors.torch.save_file"


def read_torch_file(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a file by name, as views of its memory map on the CPU: the whole file, or its ``state_dict``.

    Raises:
        UserError: not a regular file, not in PyTorch's zip format (since 1.6), damaged, anything but named dense
            tensors in it, or something that only its own code could read (the message has the name of that code).
    """
    _check_archive(path)
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # damaged archives and pickles raise errors of many types
        raise UserError(f"{shown(path)}: {_reason(error)}") from None
    if isinstance(found, dict) and isinstance(found.get(_WEIGHTS), dict):
        found = found[_WEIGHTS]
    if not isinstance(found, dict) or len(found) > _MOST_TENSORS:
        raise UserError(f"{shown(path)}: has no named tensors, but {_kind(found)}")
    for name, tensor in found.items():
        _check(path, name, tensor)
    return {name: tensor.detach() for name, tensor in found.items()}


def _check_archive(path: str | Path) -> None:
    with open_regular(path) as stream:
        size = stream.seek(0, 2)
        try:
            entries = zipfile.ZipFile(stream).infolist()
        except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError) as error:
            raise UserError(f"{shown(path)}: damaged, or not in PyTorch's zip format ({error}); {_CURE}") from None
    if sum(entry.file_size for entry in entries) > size or any(entry.compress_type for entry in entries):
        raise UserError(f"{shown(path)}: a compressed archive (TorchScript?), which torch.save does not write; {_CURE}")
    pickles = [entry.file_size for entry in entries if entry.filename.endswith("/data.pkl")]
    if len(pickles) != 1 or pickles[0] > _MOST_PICKLE_BYTES:
        raise UserError(f"{shown(path)}: an archive without weights; torch.save writes one data.pkl")


def _check(path: str | Path, name: object, tensor: object) -> None:
    if not isinstance(name, str) or not name.isprintable() or not 0 < len(name) <= 1000:
        raise UserError(f"{shown(path)}: has a tensor without a name, under {shown(repr(name)[:40])}")
    if not isinstance(tensor, Tensor):
        raise UserError(f"{shown(path)}: {name!r} is not a tensor, but {_kind(tensor)}")
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
        raise UserError(f"{shown(path)}: {name!r} is not a dense tensor in the file; {_CURE}")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise UserError(f"{shown(path)}: {name!r} has more elements than the file has numbers for it")


def _kind(value: object) -> str:
    return f"a value of type {type(value).__name__}"


def _reason(error: Exception) -> str:
    text = str(error)
    code = re.search(r"(?:GLOBAL|Unsupported (?:global|class)|class) (\S+)", text)
    if "Weights only load failed" in text and code:
        return f"not read: it needs {shown(code[1])[:200]}, which would run code of the file; {_CURE}"
    lines = text.strip().splitlines() or [type(error).__name__]
    return f"damaged file of weights ({shown(lines[0])[:200]})"
