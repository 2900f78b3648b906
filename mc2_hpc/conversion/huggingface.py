"""Folders that ``transformers.MetaClip2Model.from_pretrained``, ``AutoTokenizer`` and ``AutoProcessor`` load."""

from pathlib import Path
from typing import Any

import torch

from mc2_hpc.conversion.find_tokenizer import find_tokenizer
from mc2_hpc.conversion.keys import from_peer, huggingface_entries, peer_shapes, to_peer
from mc2_hpc.conversion.model_folder import check_sizes, read_model, rounded, saved_weights, write_model
from mc2_hpc.conversion.tokenizer_files import write_tokenizer
from mc2_hpc.data.normalise import MEAN, STD
from mc2_hpc.data.tokenizer import STYLES
from mc2_hpc.errors import UserError
from mc2_hpc.models.clip import LOGIT_SCALE_INIT
from mc2_hpc.models.formats import TRANSFORMERS_CONFIG
from mc2_hpc.models.presets import ClipArchitecture, TextArchitecture, VisionArchitecture
from mc2_hpc.models.weights import ModelCard, check_names, write_tensors
from mc2_hpc.models.wrapped import UnwrappedTensorFiles
from mc2_hpc.reading.json_file import Foreign, as_type, read_json
from mc2_hpc.storage import write_json

PREPROCESSOR_FILE = "preprocessor_config.json"
PROCESSOR_FILE = "processor_config.json"
"""Where transformers 5 saves the image processor, inside the processor for images and texts."""
MODEL_TYPE = "metaclip_2"

# config.json omits defaults: these are the ones of MetaClip2TextConfig and MetaClip2VisionConfig.
TEXT_DEFAULTS: dict[str, Any] = {
    "vocab_size": 49_408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "eos_token_id": 49_407,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
VISION_DEFAULTS: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
PROJECTION_DIM_DEFAULT = 512

_ACTIVATIONS = {"quick_gelu": True, "gelu": False}
_BICUBIC = 3  # PIL's constant


def export(checkpoint: Path, out: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write the model of a checkpoint or run folder into ``out``, an existing empty folder, with weights of ``dtype``.

    Raises:
        UserError: no checkpoint there, a model with a logit bias, a tokenizer that cannot be exported, or a weight too
            large for ``dtype``.
    """
    card, files, tokenizer_file = read_model(checkpoint)
    if card.arch.logit_bias:
        raise UserError(f"{checkpoint}: has a logit_bias, which MetaClip2Model has no place for; choose --to open_clip")
    write_json(out / TRANSFORMERS_CONFIG, config(card, dtype))
    write_json(out / PREPROCESSOR_FILE, preprocessor_config(card.arch))
    write_tokenizer(tokenizer_file, card.tokenizer_style, card.arch.text.context_length, out)
    tensors = to_peer(huggingface_entries(card.arch), rounded(files, dtype))
    write_tensors(out / "model.safetensors", dict(tensors))


def import_model(source: Path, out: Path) -> None:
    """Write the model of a transformers folder into ``out``, an existing empty folder, in our format.

    Raises:
        UserError: damaged weights, a model of another kind, or no tokenizer of a kind that can be read.
    """
    path = source / TRANSFORMERS_CONFIG
    arch = architecture(read_json(path, dict[str, Any]), _preprocessor(source), str(path))
    files = _weights(source)
    entries = huggingface_entries(arch)
    # Older versions of transformers stored these buffers with the weights.
    names = [name for name in files.names() if not name.endswith(".position_ids")]
    check_names(str(source), names, peer_shapes(entries, arch), files)
    tokenizer_file, style = find_tokenizer(source, arch.text.eos_id, arch.text.vocab_size, out)
    tensors = from_peer(entries, files.get_fp32)
    write_model(out, ModelCard(arch=arch, tokenizer_style=style), tensors, tokenizer_file)


def _preprocessor(folder: Path) -> "Preprocessor":
    """A folder's image processor settings, from transformers 5's file or else transformers 4's; empty without either.

    Raises:
        UserError: a file is not in the form that transformers writes.
    """
    for name, key in ((PROCESSOR_FILE, "image_processor"), (PREPROCESSOR_FILE, None)):
        path = folder / name
        if not path.is_file():
            continue
        values = read_json(path, dict[str, Any], what="an image processor's description")
        if key is not None and key not in values:
            continue  # this processor has no image processor of its own; the other file has it
        found = values[key] if key is not None else values
        return as_type(found, Preprocessor, str(path), what="an image processor's description")
    return Preprocessor()


def config(card: ModelCard, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Contents of ``config.json`` (``MetaClip2Config``), which transformers loads as ``dtype``."""
    arch, vision, text = card.arch, card.arch.vision, card.arch.text
    layout = STYLES[card.tokenizer_style]
    common = {
        "projection_dim": arch.embed_dim,
        "hidden_act": "quick_gelu" if arch.quick_gelu else "gelu",
        "layer_norm_eps": 1e-5,
        "attention_dropout": 0.0,
    }
    return {
        "architectures": ["MetaClip2Model"],
        "model_type": MODEL_TYPE,
        "dtype": str(dtype).removeprefix("torch."),
        "projection_dim": arch.embed_dim,
        "logit_scale_init_value": LOGIT_SCALE_INIT,
        "text_config": {
            **common,
            "model_type": "metaclip_2_text_model",
            "vocab_size": text.vocab_size,
            "max_position_embeddings": text.context_length,
            "hidden_size": text.width,
            "intermediate_size": 4 * text.width,
            "num_hidden_layers": text.layers,
            "num_attention_heads": text.heads,
            "bos_token_id": layout.prefix[0] if layout.prefix else None,
            "pad_token_id": layout.pad,
            "eos_token_id": text.eos_id,
        },
        "vision_config": {
            **common,
            "model_type": "metaclip_2_vision_model",
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "num_channels": 3,
            "hidden_size": vision.width,
            "intermediate_size": vision.mlp_width,
            "num_hidden_layers": vision.layers,
            "num_attention_heads": vision.width // vision.head_width,
        },
    }


def preprocessor_config(arch: ClipArchitecture) -> dict[str, Any]:
    """Contents of ``preprocessor_config.json`` (``CLIPImageProcessor``)."""
    side = arch.vision.image_size
    square = {"height": side, "width": side}
    squash = arch.eval_resize == "squash"
    return {
        "image_processor_type": "CLIPImageProcessor",
        "processor_class": "CLIPProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": square if squash else {"shortest_edge": side},
        "resample": _BICUBIC,
        "do_center_crop": not squash,
        "crop_size": square,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(MEAN),
        "image_std": list(STD),
    }


class Preprocessor(Foreign):
    """The fields of ``preprocessor_config.json`` that determine a model's input."""

    image_mean: list[float] | None = None
    image_std: list[float] | None = None
    size: dict[str, Any] | int | None = None


class _Config(Foreign):
    """``config.json`` without the sizes of its towers."""

    text_config: dict[str, Any] | None = None
    vision_config: dict[str, Any] | None = None


def architecture(values: Any, preprocessor: Preprocessor, source: str) -> ClipArchitecture:
    """The architecture from a parsed ``config.json`` and ``preprocessor_config.json`` (may be empty).

    Raises:
        UserError: not a MetaClip2 config, or a model that differs from ours in more than sizes.
    """
    if not isinstance(values, dict) or values.get("model_type") != MODEL_TYPE:
        found = values.get("model_type") if isinstance(values, dict) else None
        raise UserError(f"{source}: model_type is {found!r}; only {MODEL_TYPE} models can be imported")
    sections = as_type(values, _Config, source)
    text = {**TEXT_DEFAULTS, **(sections.text_config or {})}
    vision = {**VISION_DEFAULTS, **(sections.vision_config or {})}
    embed_dim = values.get("projection_dim", PROJECTION_DIM_DEFAULT)
    check_sizes(source, {"projection_dim": embed_dim})
    _check_family(text, vision, source)
    return ClipArchitecture(
        embed_dim=embed_dim,
        quick_gelu=_ACTIVATIONS[text["hidden_act"]],
        vision=VisionArchitecture(
            image_size=vision["image_size"],
            patch_size=vision["patch_size"],
            width=vision["hidden_size"],
            layers=vision["num_hidden_layers"],
            head_width=vision["hidden_size"] // vision["num_attention_heads"],
            mlp_width=vision["intermediate_size"],
        ),
        text=TextArchitecture(
            vocab_size=text["vocab_size"],
            context_length=text["max_position_embeddings"],
            eos_id=text["eos_token_id"],
            width=text["hidden_size"],
            layers=text["num_hidden_layers"],
            heads=text["num_attention_heads"],
        ),
        eval_resize=_eval_resize(preprocessor, source),
    )


def _check_family(text: dict[str, Any], vision: dict[str, Any], source: str) -> None:
    for section, found, defaults in (("text_config", text, TEXT_DEFAULTS), ("vision_config", vision, VISION_DEFAULTS)):
        numbers = [key for key, default in defaults.items() if isinstance(default, int)]
        check_sizes(source, {f"{section}.{key}": found[key] for key in numbers})
        if found["hidden_size"] % found["num_attention_heads"]:
            raise UserError(f"{source}: {section}.hidden_size is not a multiple of num_attention_heads")
    if not isinstance(text["hidden_act"], str) or text["hidden_act"] not in _ACTIVATIONS:
        raise UserError(f"{source}: hidden_act={text['hidden_act']!r}: models here have {' or '.join(_ACTIVATIONS)}")
    required = {
        "vision_config.hidden_act": (vision["hidden_act"], text["hidden_act"]),
        "vision_config.layer_norm_eps": (vision["layer_norm_eps"], 1e-5),
        "vision_config.num_channels": (vision["num_channels"], 3),
        "text_config.layer_norm_eps": (text["layer_norm_eps"], 1e-5),
        "text_config.intermediate_size": (text["intermediate_size"], 4 * text["hidden_size"]),
    }
    for key, (found, wanted) in required.items():
        if found != wanted:
            raise UserError(f"{source}: {key}={found!r}: models here have {wanted!r}")


def _eval_resize(preprocessor: Preprocessor, source: str) -> str:
    for key, wanted in (("image_mean", MEAN), ("image_std", STD)):
        found = getattr(preprocessor, key) or wanted
        # transformers' constants are the same or, in some versions, one digit shorter.
        if len(found) != 3 or any(abs(a - b) > 1e-6 for a, b in zip(found, wanted, strict=True)):
            raise UserError(f"{source}: the image processor's {key}={found[:4]}: models here use {wanted}")
    return "squash" if isinstance(preprocessor.size, dict) and "height" in preprocessor.size else "shortest"


def _weights(folder: Path) -> UnwrappedTensorFiles:
    if (folder / "model.safetensors.index.json").is_file():
        return UnwrappedTensorFiles(folder, "model-*")
    if (folder / "model.safetensors").is_file():
        return UnwrappedTensorFiles(folder, "model")
    if saved := saved_weights(folder, ("pytorch_model.bin", "pytorch_model-*-of-*.bin")):
        return UnwrappedTensorFiles(folder, saved)
    raise UserError(f"{folder}: no weights there (looked for model.safetensors, model.safetensors.index.json, .bin)")
