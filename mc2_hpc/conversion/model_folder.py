"""Reading and writing our model folders for conversion, with one tensor in memory at a time."""

import dataclasses
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mc2_hpc.conversion.keys import our_shapes
from mc2_hpc.data.card_tokenizer import tokenizer_file
from mc2_hpc.errors import UserError
from mc2_hpc.models.average import weight_files
from mc2_hpc.models.tensor_files import TensorFiles
from mc2_hpc.models.weights import (
    TOKENIZER_FILE,
    ModelCard,
    check_names,
    read_card,
    resolve_checkpoint,
    write_card,
    write_tensors,
)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Types that exported weights may have, by their names in ``--dtype``."""

_FILE_BYTES = 1 << 30
_MOST_SIZE = 10**9
_SAVED = (".bin", ".pt", ".pth", ".ckpt")


def read_model(source: Path, *, ema: bool = False) -> tuple[ModelCard, TensorFiles, Path]:
    """The card, the memory-mapped weights (or their moving average) with adapters folded, and the tokenizer file of a
    checkpoint or run folder.

    Raises:
        UserError: no checkpoint or average there, no tokenizer beside it, or weights that do not fit ``model.json``.
    """
    folder = resolve_checkpoint(source)
    card = read_card(folder)
    files = weight_files(folder, ema=ema)
    check_names(str(folder), files.names(), our_shapes(card.arch), files)
    return dataclasses.replace(card, lora=None), files, tokenizer_file(folder)


def rounded(files: TensorFiles, dtype: torch.dtype) -> Callable[[str], Tensor]:
    """A function that gets a tensor by name, rounded to ``dtype``.

    ``logit_scale`` and ``logit_bias`` stay fp32: the first is an exponent, and bf16 would change logits by up to a per
    cent.

    Raises:
        UserError: (the function) a weight is too large for ``dtype``, or :meth:`TensorFiles.get_fp32` fails.
    """

    def get(name: str) -> Tensor:
        weight = files.get_fp32(name)
        if dtype == torch.float32 or name in ("logit_scale", "logit_bias"):
            return weight
        half = weight.to(dtype)
        if not torch.isfinite(half).all():
            raise UserError(f"{files.folder}: {name} has values too large for {dtype}; choose --dtype bf16 or fp32")
        return half

    return get


def write_model(out: Path, card: ModelCard, tensors: Iterable[tuple[str, Tensor]], tokenizer: Path) -> None:
    """Write a model folder: weights in files of about 1 GiB, the tokenizer, and ``model.json`` last."""
    pending: dict[str, Tensor] = {}
    pending_bytes = number = 0
    for name, tensor in tensors:
        if pending and pending_bytes + tensor.nbytes > _FILE_BYTES:
            write_tensors(out / f"model.{number:05d}.safetensors", pending)
            pending, pending_bytes, number = {}, 0, number + 1
        pending[name] = tensor
        pending_bytes += tensor.nbytes
    write_tensors(out / f"model.{number:05d}.safetensors", pending)
    if tokenizer != out / TOKENIZER_FILE:
        shutil.copyfile(tokenizer, out / TOKENIZER_FILE)
    write_card(out, card)


def check_sizes(source: str, sizes: Mapping[str, Any]) -> None:
    """Check the sizes that a config file states.

    Raises:
        UserError: one is not a whole number of at least 1; the message names it.
    """
    for key, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UserError(f"{source}: {key}={_brief(value)}: must be a whole number of at least 1")
        if value > _MOST_SIZE:
            raise UserError(f"{source}: {key} has {len(str(value))} digits: no model is that large")


def _brief(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def saved_weights(folder: Path, names: Sequence[str]) -> list[Path]:
    """The files of a folder in which ``torch.save`` wrote its weights: those called ``names`` (patterns), or else the
    only one there; empty if there are none.

    Raises:
        UserError: several files, and none of them is called so.
    """
    for name in names:
        if found := sorted(folder.glob(name)):
            return found
    found = sorted(path for path in folder.iterdir() if path.suffix in _SAVED)
    if len(found) > 1:
        raise UserError(f"{folder}: {found[0].name} or {found[1].name}? Keep only the file that has the weights")
    return found
