"""A model on disk: ``model.json`` says what it is, ``model.*.safetensors`` hold its weights, beside a tokenizer file.

Training checkpoints, imported models and everything that evaluates or converts share this part of the format. Weights
are fp32, named as in ``CLIP.state_dict()``, each whole in one of the files, whatever the number of ranks that wrote
them. Nothing is unpickled.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mc2_hpc.errors import UserError
from mc2_hpc.models.clip import CLIP
from mc2_hpc.models.presets import ClipArchitecture, TextArchitecture, VisionArchitecture
from mc2_hpc.storage import atomic_path, read_json, write_json

CARD_FILE, TOKENIZER_FILE = "model.json", "tokenizer.model"
BEST = "best.json"
"""In a run's checkpoints folder: which of them an evaluation found to be the best."""


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """What ``model.json`` says."""

    arch: ClipArchitecture
    tokenizer_style: str
    """``xlmv``, ``mt5`` or ``gemma`` (see ``mc2_hpc.data.tokenizer``); the model file is ``tokenizer.model``."""


def write_card(folder: Path, card: ModelCard) -> None:
    """Write ``model.json`` into ``folder``."""
    write_json(folder / CARD_FILE, dataclasses.asdict(card))


def read_card(folder: Path) -> ModelCard:
    """Read ``model.json`` of ``folder``.

    Raises:
        UserError: the file is missing or describes no model of this program.
    """
    path = folder / CARD_FILE
    if not path.is_file():
        raise UserError(f"{folder}: no model.json there; name a checkpoint folder (runs/<name>/checkpoints/step-...)")
    values = read_json(path)
    try:
        arch = dict(values["arch"])
        vision = VisionArchitecture(**arch.pop("vision"))
        text = TextArchitecture(**arch.pop("text"))
        return ModelCard(
            arch=ClipArchitecture(vision=vision, text=text, **arch), tokenizer_style=values["tokenizer_style"]
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a model description of this program ({error})") from None


def resolve_checkpoint(path: str | Path) -> Path:
    """The folder that holds ``model.json``: ``path`` itself, or what the ``latest`` file in it (or below it in
    ``checkpoints``) names, so a run folder will do; or what ``path`` names, if it is a run's ``best.json``.

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
    # Names, not paths: what a file says must not lead out of the folder.
    if path.name == BEST and path.is_file():
        return path.parent / Path(read_best(path)[0]).name
    for folder in (path, path / "checkpoints"):
        if (folder / CARD_FILE).is_file():
            return folder
        if (folder / "latest").is_file():
            return folder / Path((folder / "latest").read_text(encoding="utf-8").strip()).name
    return None


def read_best(path: Path) -> tuple[str, str, float]:
    """What a ``best.json`` says: a checkpoint's name, a metric, and its value.

    Raises:
        UserError: the file is missing or says something else.
    """
    values = read_json(path)
    try:
        return str(values["checkpoint"]), str(values["metric"]), float(values["value"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: does not name a checkpoint ({error!r}); name the checkpoint folder itself") from None


class TensorFiles:
    """Named tensors spread over the safetensors files of a folder, read one at a time by memory map."""

    def __init__(self, folder: Path, prefix: str) -> None:
        """Index ``<prefix>.*.safetensors`` of ``folder``.

        Raises:
            UserError: no such file, or one is damaged.
        """
        self.folder = folder
        self._file_of: dict[str, Path] = {}
        for path in sorted(folder.glob(f"{prefix}.*safetensors")):
            try:
                with safe_open(path, framework="pt") as file:
                    self._file_of.update(dict.fromkeys(file.keys(), path))
            except SafetensorError as error:
                raise UserError(f"{path}: damaged safetensors file ({error})") from None
        if not self._file_of:
            raise UserError(f"{folder}: no {prefix}.*.safetensors there")

    def names(self) -> list[str]:
        """Sorted tensor names."""
        return sorted(self._file_of)

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def get(self, name: str) -> Tensor:
        """One tensor, backed by the file's memory map."""
        with safe_open(self._file_of[name], framework="pt") as file:
            return file.get_tensor(name)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write one safetensors file atomically; an empty mapping writes an empty file of the format."""
    with atomic_path(path) as temporary:
        # transformers refuses a file that does not name the library it was written from.
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata={"format": "pt"})


def check_names(source: str, found: Iterable[str], expected: Mapping[str, torch.Size], files: TensorFiles) -> None:
    """Compare names and shapes with what the model needs.

    Raises:
        UserError: a tensor is missing, superfluous, or of another shape; the first is named.
    """
    missing, extra = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing or extra:
        what = f"lacks {missing[0]!r}" if missing else f"has {extra[0]!r}"
        raise UserError(
            f"{source}: checkpoint of another model: it {what} ({len(missing)} missing, {len(extra)} extra)"
        )
    for name, shape in expected.items():
        actual = files.get(name).shape
        if actual != shape:
            raise UserError(
                f"{source}: checkpoint of another model: {name} is {tuple(actual)}, the config wants {tuple(shape)}"
            )


def load_clip(folder: str | Path, arch: ClipArchitecture | None = None) -> tuple[CLIP, ModelCard]:
    """Load a model by memory map, on the CPU, in eval mode.

    Args:
        folder: a checkpoint, or a run folder (its latest checkpoint).
        arch: what the caller expects; ``None`` takes what ``model.json`` says.

    Raises:
        UserError: no checkpoint, a damaged file, or weights that do not fit ``arch``.
    """
    folder = resolve_checkpoint(folder)
    card = read_card(folder)
    with torch.device("meta"):
        model = CLIP(arch or card.arch)
    files = TensorFiles(folder, "model")
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    check_names(str(folder), files.names(), shapes, files)
    model.load_state_dict({name: files.get(name) for name in files.names()}, assign=True)
    return model.eval(), card
