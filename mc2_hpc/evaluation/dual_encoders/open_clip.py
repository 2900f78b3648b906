"""Any open_clip model, from a folder as open_clip saves it: ``open_clip_config.json``, weights, tokenizer files.

The library itself builds the model, the image transform and the tokenizer. It reads them from a folder, so it gets a
folder of links to the files, with a config that prevents network access and running code from the folder.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from mc2_hpc.conversion.peers import import_open_clip
from mc2_hpc.data.crop import Encoded
from mc2_hpc.data.decode import decode_pil
from mc2_hpc.data.normalise import normalise
from mc2_hpc.errors import UserError
from mc2_hpc.evaluation.dual_encoders.protocol import (
    ModelFacts,
    cannot_load,
    check_weight_files,
    count_parameters,
    folder_files,
    hash_files,
)
from mc2_hpc.models.formats import OPEN_CLIP_CONFIG
from mc2_hpc.reading.json_file import Foreign, as_type, read_json
from mc2_hpc.storage import write_json

_TEXT_FOLDER = "text_tower"
"""In the folder of links: the config of a text tower from transformers."""
_WEIGHTS = (".safetensors", ".bin", ".pth")  # what open_clip looks for; it loads pickles as weights only
_ROBERTA: dict[str, Any] = {
    "model_type": "xlm-roberta",
    "vocab_size": 250_002,
    "max_position_embeddings": 514,
    "type_vocab_size": 1,
    "layer_norm_eps": 1e-5,
    "hidden_act": "gelu",
    "bos_token_id": 0,
    "pad_token_id": 1,
    "eos_token_id": 2,
}
TEXT_TOWERS: dict[str, dict[str, Any]] = {
    "xlm-roberta-base": {
        **_ROBERTA,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
    },
    "xlm-roberta-large": {
        **_ROBERTA,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
    },
}
"""Configs of text towers that open_clip would otherwise read from the Hub by name."""


class OpenClipCaptions:
    """Token ids alone, in rows of a fixed width. Another process reads the tokenizer from the folder again."""

    pads = (0,)

    def __init__(self, source: Path, tokenizer: Any = None) -> None:
        self._source = source
        self._tokenizer = _load_tokenizer(source) if tokenizer is None else tokenizer

    def __reduce__(self) -> tuple[type, tuple[Path]]:
        return OpenClipCaptions, (self._source,)

    def __call__(self, texts: Sequence[str]) -> Tensor:
        return self._tokenizer(list(texts))[:, None]


class OpenClipEncoder:
    """An open_clip model; preprocessed images are float32 (3, S, S), normalised."""

    def __init__(self, source: Path, device: torch.device, eval_resize: str | None) -> None:
        """
        Raises:
            UserError: open_clip is not installed, or it cannot load the folder.
        """
        open_clip = import_open_clip()
        config = _config(source)
        check_weight_files(source)
        with tempfile.TemporaryDirectory() as scratch:
            name = f"local-dir:{_linked(source, config, Path(scratch))}"
            try:
                model, transform = open_clip.create_model_from_pretrained(
                    name, device=device, image_resize_mode=eval_resize
                )
            except Exception as error:  # a bad folder can cause many kinds of errors
                raise cannot_load(source, "open_clip", error) from None
        self.model: nn.Module = model.eval()
        self.tokenizer = _load_tokenizer(source)
        self._source = source
        self._transform = transform
        self.device = device
        self.identity = hash_files(folder_files(source), open_clip.__version__, eval_resize)
        self.facts = _facts(model, self.tokenizer)

    def preprocess(self, image: Encoded | Image.Image) -> Tensor:
        return self.transform(image if isinstance(image, Image.Image) else decode_pil(image))

    def transform(self, image: Image.Image) -> Tensor:
        return self._transform(image.convert("RGB"))

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        return self.tokenizer(list(texts))

    def encode_images(self, images: Sequence[Tensor]) -> Tensor:
        return self._of_images(torch.stack(list(images)).to(self.device))

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        preprocess: Any = self.model.visual.preprocess_cfg  # type: ignore[union-attr]
        mean, std = (tuple(preprocess[name]) for name in ("mean", "std"))
        return self._of_images(normalise(pixels, mean=mean, std=std))

    def _of_images(self, images: Tensor) -> Tensor:
        return F.normalize(self.model.encode_image(images).float(), dim=-1)  # type: ignore[operator]

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        return self.encode_tokens(self.captions(texts).to(self.device))

    @property
    def captions(self) -> OpenClipCaptions:
        return OpenClipCaptions(self._source, self.tokenizer)

    def encode_tokens(self, tokens: Tensor) -> Tensor:
        return F.normalize(self.model.encode_text(tokens[:, 0]).float(), dim=-1)  # type: ignore[operator]

    def logits(self) -> tuple[float, float]:
        scale, bias = self.model.logit_scale, getattr(self.model, "logit_bias", None)
        assert isinstance(scale, Tensor)
        return float(scale.detach().float().exp()), 0.0 if bias is None else float(bias.detach().float())


def _load_tokenizer(source: Path) -> Any:
    open_clip = import_open_clip()
    with tempfile.TemporaryDirectory() as scratch:
        try:
            return open_clip.get_tokenizer(f"local-dir:{_linked(source, _config(source), Path(scratch))}")
        except UserError:
            raise
        except Exception as error:  # a bad folder can cause many kinds of errors
            raise cannot_load(source, "open_clip", error) from None


_Positive = Annotated[float, msgspec.Meta(gt=0)]


class _TextConfig(Foreign):
    hf_tokenizer_name: str | None = None
    hf_model_name: str | None = None
    tokenizer_kwargs: dict[str, Any] | None = None


class _ModelConfig(Foreign):
    text_cfg: _TextConfig


class _Preprocess(Foreign):
    mean: tuple[float, float, float] | None = None
    std: tuple[_Positive, _Positive, _Positive] | None = None


class _Config(Foreign):
    model_cfg: _ModelConfig
    preprocess_cfg: _Preprocess | None = None


def _config(source: Path) -> dict[str, Any]:
    """The parsed config, changed so that loading it needs no network and runs no code."""
    path = source / OPEN_CLIP_CONFIG
    values = read_json(path, dict[str, Any], what="an open_clip config")
    text = as_type(values, _Config, str(path), what="an open_clip config").model_cfg.text_cfg
    if not any(entry.suffix in _WEIGHTS for entry in source.iterdir()):
        raise UserError(f"{source}: no weights (open_clip_model.safetensors)")
    if text.hf_tokenizer_name:
        kwargs = {**(text.tokenizer_kwargs or {}), "trust_remote_code": False}
        values["model_cfg"]["text_cfg"]["tokenizer_kwargs"] = kwargs
    return values


def _linked(source: Path, config: dict[str, Any], scratch: Path) -> Path:
    """``scratch`` with links to the files of ``source`` and with ``config`` in place of its config."""
    for entry in source.iterdir():
        if entry.name != OPEN_CLIP_CONFIG:
            (scratch / entry.name).symlink_to(entry.absolute())
    text = config["model_cfg"]["text_cfg"]
    tower = text.get("hf_model_name")
    if tower:
        text["hf_model_name"] = str(_text_tower(source, tower, scratch))
    write_json(scratch / OPEN_CLIP_CONFIG, config)
    return scratch


def _text_tower(source: Path, name: str, scratch: Path) -> Path:
    """A folder with the config of the text tower ``name``: from the model's own folder, or from the table.

    Raises:
        UserError: it is in neither.
    """
    if (source / Path(name).name / "config.json").is_file():
        return source / Path(name).name
    if name not in TEXT_TOWERS:
        raise UserError(
            f"{source}: its text tower {name!r} is from transformers, and its config is missing: put it into "
            f"{source / Path(name).name / 'config.json'} (not needed for {', '.join(TEXT_TOWERS)})"
        )
    (scratch / _TEXT_FOLDER).mkdir()
    write_json(scratch / _TEXT_FOLDER / "config.json", TEXT_TOWERS[name])
    return scratch / _TEXT_FOLDER


def _facts(model: Any, tokenizer: Any) -> ModelFacts:
    preprocess, visual = model.visual.preprocess_cfg, model.visual
    size = preprocess["size"]
    trunk = getattr(visual, "trunk", None)  # from timm
    patch = getattr(getattr(trunk, "patch_embed", None), "patch_size", None) or getattr(visual, "patch_size", None)
    width = getattr(trunk, "embed_dim", None) or getattr(getattr(visual, "transformer", None), "width", None)
    return ModelFacts(
        format="open_clip",
        image_size=int(size[0] if isinstance(size, tuple | list) else size),
        resize=preprocess["resize_mode"],
        context_length=int(tokenizer.context_length),
        parameters=count_parameters(model),
        vision_width=width,
        patch_size=int(patch[0]) if isinstance(patch, tuple | list) else patch,
    )
