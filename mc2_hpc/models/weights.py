"""A model on disk: ``model.json`` describes it, ``model.*.safetensors`` hold its weights, beside a tokenizer file.

Training, import, evaluation and conversion share this part of the checkpoint format. Weights are fp32 and named as in
``CLIP.state_dict()``; each is stored complete in one of the files, whatever the number of ranks that wrote them. A run
that trains adapters (:mod:`mc2_hpc.models.lora`) stores them beside its weights.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import torch
from safetensors.torch import save_file
from torch import Tensor

from mc2_hpc.errors import UserError
from mc2_hpc.models.average import weight_files
from mc2_hpc.models.clip import CLIP
from mc2_hpc.models.lora import Adapters, AdaptersFile
from mc2_hpc.models.presets import ClipArchitecture, TextArchitecture, VisionArchitecture
from mc2_hpc.models.tensor_files import TensorFiles
from mc2_hpc.reading.files import read_text
from mc2_hpc.reading.json_file import Count, File, Name, Size, read_json
from mc2_hpc.storage import atomic_path, write_json

CARD_FILE, TOKENIZER_FILE = "model.json", "tokenizer.model"
BEST = "best.json"
"""In a run's checkpoints folder: names the best checkpoint according to evaluation."""


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """Contents of ``model.json``."""

    arch: ClipArchitecture
    tokenizer_style: str
    """``xlmv``, ``mt5`` or ``gemma`` (see ``mc2_hpc.data.tokenizer``); the model file is ``tokenizer.model``."""
    lora: Adapters | None = None
    """Adapters beside the weights; the file leaves it out if there are none."""


class _Vision(File):
    image_size: Size
    patch_size: Size
    width: Size
    layers: Size
    head_width: Size
    mlp_width: Size


class _Text(File):
    vocab_size: Size
    context_length: Size
    eos_id: Count
    width: Size
    layers: Size
    heads: Size


class _Architecture(File):
    embed_dim: Size
    quick_gelu: bool
    vision: _Vision
    text: _Text
    eval_resize: Literal["shortest", "squash"] = "shortest"
    logit_bias: bool = False


class _Card(File):
    """``model.json``."""

    arch: _Architecture
    tokenizer_style: Literal["xlmv", "mt5", "gemma"]
    lora: AdaptersFile | None = None


class _Best(File):
    """``best.json``."""

    checkpoint: Name
    metric: Annotated[str, msgspec.Meta(max_length=1000)]
    value: float


def write_card(folder: Path, card: ModelCard) -> None:
    """Write ``model.json`` into ``folder``."""
    values = dataclasses.asdict(card)
    if card.lora is None:
        del values["lora"]
    write_json(folder / CARD_FILE, values)


def read_card(folder: Path) -> ModelCard:
    """Read ``model.json`` of ``folder``.

    Raises:
        UserError: the file is missing or does not describe a model of this program.
    """
    path = folder / CARD_FILE
    if not path.is_file():
        raise UserError(f"{folder}: no model.json there; name a checkpoint folder (runs/<name>/checkpoints/step-...)")
    card = read_json(path, _Card, what="a model description of this program")
    sizes = msgspec.structs.asdict(card.arch)
    try:
        arch = ClipArchitecture(
            **{
                **sizes,
                "vision": VisionArchitecture(**msgspec.structs.asdict(card.arch.vision)),
                "text": TextArchitecture(**msgspec.structs.asdict(card.arch.text)),
            }
        )
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    lora = None if card.lora is None else card.lora.adapters()
    return ModelCard(arch=arch, tokenizer_style=card.tokenizer_style, lora=lora)


def resolve_checkpoint(path: str | Path) -> Path:
    """The folder that holds ``model.json``: ``path`` itself; the folder named by ``latest`` in ``path`` or its
    ``checkpoints`` (so a run folder works); or, if ``path`` is a run's ``best.json``, the folder named there.

    Raises:
        UserError: there is no checkpoint.
    """
    found = _find_checkpoint(Path(path))
    if found is None:
        raise UserError(f"{path}: no checkpoint there (looked for model.json, latest, checkpoints/latest)")
    return found


def is_checkpoint(path: str | Path) -> bool:
    """Whether :func:`resolve_checkpoint` finds a checkpoint of ours at ``path``."""
    return _find_checkpoint(Path(path)) is not None


def _find_checkpoint(path: Path) -> Path | None:
    # Only names, not paths: the contents of a file must not lead out of the folder.
    if path.name == BEST and path.is_file():
        return path.parent / Path(read_best(path)[0]).name
    for folder in (path, path / "checkpoints"):
        if (folder / CARD_FILE).is_file():
            return folder
        if (folder / "latest").is_file():
            return folder / read_latest(folder)
    return None


def read_latest(folder: Path) -> str:
    """The checkpoint that ``latest`` of ``folder`` names; of a path, only the last part.

    Raises:
        UserError: the file is missing or does not contain a name.
    """
    name = Path(read_text(folder / "latest", most=4096).strip()).name
    if not name.isprintable() or not 0 < len(name.encode()) < 256:
        raise UserError(
            f"{folder / 'latest'}: does not name a checkpoint, so there is no model.json there; "
            f"name the checkpoint folder itself"
        )
    return name


def read_best(path: Path) -> tuple[str, str, float]:
    """Contents of a ``best.json``: a checkpoint's name, a metric, and its value.

    Raises:
        UserError: the file is missing or has other contents.
    """
    best = read_json(path, _Best, cure="name the checkpoint folder itself")
    return best.checkpoint, best.metric, best.value


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write one safetensors file atomically; an empty mapping gives a valid file without tensors."""
    with atomic_path(path) as temporary:
        # transformers refuses a file whose metadata does not name the framework.
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata={"format": "pt"})


def check_names(source: str, found: Iterable[str], expected: Mapping[str, torch.Size], files: TensorFiles) -> None:
    """Compare names and shapes with those that the model needs.

    Raises:
        UserError: a tensor is missing, unexpected, or has another shape; the message names the first one.
    """
    missing, extra = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing or extra:
        what = f"lacks {missing[0]!r}" if missing else f"has {extra[0]!r}"
        raise UserError(
            f"{source}: checkpoint of another model: it {what} ({len(missing)} missing, {len(extra)} unexpected)"
        )
    for name, shape in expected.items():
        actual = files.shape(name)
        if actual != tuple(shape):
            raise UserError(
                f"{source}: checkpoint of another model: {name} is {actual}, the config needs {tuple(shape)}"
            )


def load_clip(folder: str | Path, arch: ClipArchitecture | None = None, *, ema: bool = False) -> tuple[CLIP, ModelCard]:
    """Load a model through a memory map, on the CPU, in eval mode; wrappers' prefixes in names are removed, and
    adapters are folded.

    Args:
        folder: a checkpoint, or a run folder (its latest checkpoint).
        arch: the expected architecture; ``None`` uses that of ``model.json``.
        ema: load the moving average of the weights.

    Raises:
        UserError: no checkpoint, no average, a damaged file, or weights that do not fit ``arch`` or are not
            floating-point numbers.
    """
    folder = resolve_checkpoint(folder)
    card = read_card(folder)
    with torch.device("meta"):
        model = CLIP(arch or card.arch)
    files = weight_files(folder, ema=ema)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    check_names(str(folder), files.names(), shapes, files)
    model.load_state_dict({name: files.get_fp32(name) for name in files.names()}, assign=True)
    return model.eval(), dataclasses.replace(card, lora=None)
