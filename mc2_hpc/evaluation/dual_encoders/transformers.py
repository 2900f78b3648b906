"""CLIP, SigLIP, SigLIP 2 and MetaClip2 from folders saved by transformers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from mc2_hpc.conversion.peers import import_transformers
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
from mc2_hpc.models.formats import TRANSFORMERS_CONFIG
from mc2_hpc.reading.json_file import Foreign, read_json


@dataclass(frozen=True)
class _Family:
    """How to call a family's processor if its files do not say."""

    padding: str
    """Of texts: to the ``longest`` in a batch, or to ``max_length``, as in SigLIP's training."""
    inputs: tuple[str, ...]
    """Of the text tower, as far as the tokenizer gives them. SigLIP attends to the padding, so it takes no mask."""


_CLIP = _Family("longest", ("input_ids", "attention_mask"))
_SIGLIP = _Family("max_length", ("input_ids",))
FAMILIES = {"clip": _CLIP, "metaclip_2": _CLIP, "siglip": _SIGLIP, "siglip2": _SIGLIP}
"""By ``model_type``. SigLIP 2 with a fixed size is ``siglip``; ``siglip2`` takes images in their own shape."""


class _Config(Foreign):
    model_type: str


class TransformersCaptions:
    """The inputs of the family's text tower. Another process reads the tokenizer from the folder again."""

    def __init__(self, source: Path, family: _Family, context_length: int, tokenizer: Any = None) -> None:
        self._known = source, family, context_length
        self._family, self._context_length = family, context_length
        if tokenizer is None:
            tokenizer = _loaded(import_transformers().AutoTokenizer, source)
        self._tokenizer = tokenizer
        self.inputs = [name for name in family.inputs if name in tokenizer.model_input_names]
        """Names of the text tower's."""
        fill = {"input_ids": int(tokenizer.pad_token_id or 0), "attention_mask": 0}
        self.pads = [fill[name] for name in self.inputs]

    def __reduce__(self) -> tuple[type, tuple[Path, _Family, int]]:
        return TransformersCaptions, self._known

    def by_name(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """(len(texts), width) each."""
        tokens = self._tokenizer(
            list(texts),
            padding=self._family.padding,
            truncation=True,
            max_length=self._context_length,
            return_tensors="pt",
        )
        return {name: tokens[name] for name in self.inputs}

    def __call__(self, texts: Sequence[str]) -> Tensor:
        return torch.stack(list(self.by_name(texts).values()), dim=1)


class TransformersEncoder:
    """A transformers model; preprocessed images are the image processor's tensors by name, without a batch."""

    def __init__(self, source: Path, device: torch.device, eval_resize: str | None) -> None:
        """
        Raises:
            UserError: transformers is not installed, the model is of another family, or the folder is incomplete.
        """
        kind = read_json(source / TRANSFORMERS_CONFIG, _Config, what="a config of transformers").model_type
        if kind not in FAMILIES:
            raise UserError(
                f"{source / TRANSFORMERS_CONFIG}: model_type is {kind!r}; supported transformers models are "
                f"{', '.join(FAMILIES)}"
            )
        self._family = FAMILIES[kind]
        check_weight_files(source)
        transformers = import_transformers()
        self.model: nn.Module = _loaded(transformers.AutoModel, source, dtype=torch.float32).to(device).eval()
        self.tokenizer = _loaded(transformers.AutoTokenizer, source)
        self._processor = _loaded(transformers.AutoImageProcessor, source)
        self.device = device
        config: Any = self.model.config
        self._context_length = int(config.text_config.max_position_embeddings)
        self.captions = TransformersCaptions(source, self._family, self._context_length, self.tokenizer)
        self._options = _resize_options(source, self._processor, _image_size(config, self._processor), eval_resize)
        self.identity = hash_files(folder_files(source), transformers.__version__, eval_resize)
        self.facts = ModelFacts(
            format="hf",
            image_size=_image_size(config, self._processor),
            resize=eval_resize or _own_resize(self._processor),
            context_length=self._context_length,
            parameters=count_parameters(self.model),
            vision_width=config.vision_config.hidden_size,
            patch_size=config.vision_config.patch_size,
        )

    def preprocess(self, image: Encoded | Image.Image) -> dict[str, Tensor]:
        return self.transform(image if isinstance(image, Image.Image) else decode_pil(image))

    def transform(self, image: Image.Image) -> dict[str, Tensor]:
        inputs = self._processor(images=image.convert("RGB"), return_tensors="pt", **self._options)
        return {name: tensor[0] for name, tensor in inputs.items()}

    def tokenize(self, texts: Sequence[str]) -> dict[str, Tensor]:
        return self.captions.by_name(texts)

    def encode_images(self, images: Sequence[dict[str, Tensor]]) -> Tensor:
        inputs = {name: torch.stack([image[name] for image in images]).to(self.device) for name in images[0]}
        return _unit(self.model.get_image_features, inputs)  # type: ignore[arg-type]

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        mean, std = (tuple(map(float, values)) for values in (self._processor.image_mean, self._processor.image_std))
        return _unit(self.model.get_image_features, {"pixel_values": normalise(pixels, mean=mean, std=std)})  # type: ignore[arg-type]

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        return self.encode_tokens(self.captions(texts).to(self.device))

    def encode_tokens(self, tokens: Tensor) -> Tensor:
        inputs = dict(zip(self.captions.inputs, tokens.unbind(1), strict=True))
        return _unit(self.model.get_text_features, inputs)  # type: ignore[arg-type]

    def logits(self) -> tuple[float, float]:
        scale, bias = self.model.logit_scale, getattr(self.model, "logit_bias", None)
        assert isinstance(scale, Tensor)
        return float(scale.detach().exp()), 0.0 if bias is None else float(bias.detach())


def _loaded(kind: Any, source: Path, **options: Any) -> Any:
    try:
        return kind.from_pretrained(str(source), local_files_only=True, trust_remote_code=False, **options)
    except Exception as error:  # a bad folder can cause many kinds of errors
        raise cannot_load(source, "transformers", error) from None


def _unit(encode: Callable[..., Any], inputs: dict[str, Tensor]) -> Tensor:
    return F.normalize(encode(**inputs).pooler_output.float(), dim=-1)


def _image_size(config: Any, processor: Any) -> int:
    """The side of the square input; for a model of free shapes, of a square with the same number of patches."""
    if hasattr(processor, "max_num_patches"):
        return round(processor.max_num_patches**0.5) * processor.patch_size
    return int(config.vision_config.image_size)


def _own_resize(processor: Any) -> str:
    if hasattr(processor, "max_num_patches"):
        return "patches"
    return "shortest" if getattr(processor, "do_center_crop", None) else "squash"


def _resize_options(source: Path, processor: Any, side: int, eval_resize: str | None) -> dict[str, Any]:
    """Options that make the image processor resize in another way than its default."""
    if eval_resize is None:
        return {}
    square = {"height": side, "width": side}
    options: dict[str, dict[str, Any]] = {
        "squash": {"size": square, "do_center_crop": False},
        "shortest": {"size": {"shortest_edge": side}, "do_center_crop": True, "crop_size": square},
    }
    if eval_resize not in options or hasattr(processor, "max_num_patches"):
        raise UserError(f"eval_resize={eval_resize}: not supported by the image processor of {source}; leave it out")
    return options[eval_resize]
