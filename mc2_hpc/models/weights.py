"""A model on disk: ``model.json`` describes it, ``model.*.safetensors`` hold its weights, beside a tokenizer file.

Training, import, evaluation and conversion share this part of the checkpoint format. Weights are fp32 and named as in
``CLIP.state_dict()``; each is stored complete in one of the files, whatever the number of ranks that wrote them.
"""

import dataclasses
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mc2_hpc.errors import UserError
from mc2_hpc.models.clip import CLIP
from mc2_hpc.models.presets import ClipArchitecture, TextArchitecture, VisionArchitecture
from mc2_hpc.reading.files import read_text
from mc2_hpc.reading.json_file import Count, File, Name, Size, read_json
from mc2_hpc.reading.tensors import TensorInfo, read_header
from mc2_hpc.reading.torch_file import read_torch_file
from mc2_hpc.storage import atomic_path, write_json

logger = logging.getLogger(__name__)

CARD_FILE, TOKENIZER_FILE = "model.json", "tokenizer.model"
BEST = "best.json"
"""In a run's checkpoints folder: names the best checkpoint according to evaluation."""


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """Contents of ``model.json``."""

    arch: ClipArchitecture
    tokenizer_style: str
    """``xlmv``, ``mt5`` or ``gemma`` (see ``mc2_hpc.data.tokenizer``); the model file is ``tokenizer.model``."""


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


class _Card(File):
    """``model.json``."""

    arch: _Architecture
    tokenizer_style: Literal["xlmv", "mt5", "gemma"]


class _Best(File):
    """``best.json``."""

    checkpoint: Name
    metric: Annotated[str, msgspec.Meta(max_length=1000)]
    value: float


def write_card(folder: Path, card: ModelCard) -> None:
    """Write ``model.json`` into ``folder``."""
    write_json(folder / CARD_FILE, dataclasses.asdict(card))


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
    return ModelCard(arch=arch, tokenizer_style=card.tokenizer_style)


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


class TensorFiles:
    """Named tensors spread over files of a folder, read one at a time through a memory map."""

    def __init__(self, folder: Path, source: str | Sequence[Path]) -> None:
        """Index ``<source>.*.safetensors`` of ``folder`` or, if ``source`` is a list, these files of ``torch.save``.

        Raises:
            UserError: no such file, or one is damaged.
        """
        self.folder = folder
        self._info: dict[str, TensorInfo] = {}
        self._mapped: dict[str, Tensor] = {}
        self._cast: set[str] = set()
        paths = sorted(folder.glob(f"{source}.*safetensors")) if isinstance(source, str) else source
        for path in paths:
            header = read_header(path) if isinstance(source, str) else self._map(path)
            for name in header.keys() & self._info.keys():
                raise UserError(f"{path}: has {name!r}, which is also in {self._info[name].path.name}; remove one")
            self._info |= header
        if not self._info:
            shown = f"{source}.*.safetensors" if isinstance(source, str) else "tensors"
            raise UserError(f"{folder}: no {shown} there")

    def _map(self, path: Path) -> dict[str, TensorInfo]:
        tensors = read_torch_file(path)
        self._mapped |= tensors
        return {
            name: TensorInfo(path, _STORED.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape))
            for name, tensor in tensors.items()
        }

    def names(self) -> list[str]:
        """Sorted tensor names."""
        return sorted(self._info)

    def __contains__(self, name: str) -> bool:
        return name in self._info

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, from the header of its file."""
        return self._info[name].shape

    def stored_type(self, name: str) -> str:
        """A tensor's type in its file, such as ``F32``."""
        return self._info[name].dtype

    def get(self, name: str) -> Tensor:
        """One tensor, backed by the file's memory map.

        Raises:
            UserError: its file was damaged after the header was read.
        """
        if name in self._mapped:
            return self._mapped[name]
        path = self._info[name].path
        try:
            with safe_open(path, framework="pt") as file:
                return file.get_tensor(name)
        except (SafetensorError, OSError, RuntimeError) as error:
            raise UserError(f"{path}: damaged safetensors file ({str(error).splitlines()[0]})") from None

    def get_fp32(self, name: str) -> Tensor:
        """One tensor as fp32: half precision is widened exactly, and fp64 is rounded; logged once per type.

        Raises:
            UserError: it does not hold floating-point numbers.
        """
        tensor = self.get(name)
        if tensor.dtype not in _STORED:
            raise UserError(f"{self.folder}: {name} is {tensor.dtype}; convert weights of fp32, fp16 or bf16")
        kind = self.stored_type(name)
        if kind != "F32" and kind not in self._cast:
            self._cast.add(kind)
            logger.info("%s: weights of type %s (such as %s) are used as fp32", self.folder, kind, name)
        return tensor.float()


_STORED = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
"""Floating-point types, in safetensors' notation."""


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


def load_clip(folder: str | Path, arch: ClipArchitecture | None = None) -> tuple[CLIP, ModelCard]:
    """Load a model through a memory map, on the CPU, in eval mode.

    Args:
        folder: a checkpoint, or a run folder (its latest checkpoint).
        arch: the expected architecture; ``None`` uses that of ``model.json``.

    Raises:
        UserError: no checkpoint, a damaged file, or weights that do not fit ``arch`` or are not floating-point numbers.
    """
    folder = resolve_checkpoint(folder)
    card = read_card(folder)
    with torch.device("meta"):
        model = CLIP(arch or card.arch)
    files = TensorFiles(folder, "model")
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    check_names(str(folder), files.names(), shapes, files)
    model.load_state_dict({name: files.get_fp32(name) for name in files.names()}, assign=True)
    return model.eval(), card
