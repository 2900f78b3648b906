"""Folders that ``open_clip.create_model_and_transforms("local-dir:DIR")`` and ``get_tokenizer`` load."""

from pathlib import Path
from typing import Any

import torch

from mc2_hpc.conversion.find_tokenizer import find_tokenizer
from mc2_hpc.conversion.keys import from_peer, open_clip_entries, peer_shapes, to_peer
from mc2_hpc.conversion.model_folder import check_sizes, read_model, rounded, saved_weights, write_model
from mc2_hpc.conversion.tokenizer_files import write_tokenizer
from mc2_hpc.data.normalise import MEAN, STD
from mc2_hpc.errors import UserError
from mc2_hpc.models.clip import SIGMOID_BIAS_INIT
from mc2_hpc.models.formats import OPEN_CLIP_CONFIG
from mc2_hpc.models.presets import ClipArchitecture, TextArchitecture, VisionArchitecture
from mc2_hpc.models.weights import ModelCard, check_names, write_tensors
from mc2_hpc.models.wrapped import UnwrappedTensorFiles
from mc2_hpc.reading.json_file import ANYTHING, Foreign, as_type, read_json
from mc2_hpc.storage import write_json

# In open_clip's own order of preference.
_WEIGHTS = ("open_clip_model", "open_clip_pytorch_model", "model")

# Used only if a config is loaded by name: open_clip then gets them from the Hub. A local folder uses its own files.
_HUB_TOKENIZERS = {("xlmv", 901_629): "facebook/xlm-v-base", ("mt5", 250_100): "google/mt5-base"}

# Sizes that differ between models, with open_clip's defaults.
_TOP = {
    "embed_dim": None, "vision_cfg": None, "text_cfg": None, "quick_gelu": False, "custom_text": False,
    "init_logit_bias": None,
}  # fmt: skip
_VISION = {"image_size": 224, "patch_size": 16, "width": 768, "layers": 12, "head_width": 64, "mlp_ratio": 4.0}
_TEXT = {"context_length": 77, "vocab_size": 49_408, "width": 512, "heads": 8, "layers": 12, "eos_id": 2}
# Values that every model of the family has, and keys that do not affect a trained model's output. Any other key that is
# set belongs to a model that this program does not support.
_FIXED: dict[str, dict[str, Any]] = {
    "": {},
    "vision_cfg": {"pool_type": "tok", "pos_embed_type": "learnable"},
    "text_cfg": {"pool_type": "eos", "proj_type": "linear", "mlp_ratio": 4.0},
}
_WITHOUT_EFFECT = {
    "": {"init_logit_scale", "output_dict"},
    "vision_cfg": {"patch_dropout", "attn_pooler_queries", "attn_pooler_heads"},
    "text_cfg": {"hf_tokenizer_name", "tokenizer_kwargs", "tokenizer_mode", "pad_id"},
}


_MOST_RATIO = 1000


class _Preprocessing(Foreign):
    """``preprocess_cfg`` of ``open_clip_config.json``."""

    mean: list[float] | None = None
    std: list[float] | None = None
    interpolation: str | None = None
    resize_mode: str = "shortest"


def export(checkpoint: Path, out: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write the model of a checkpoint or run folder into ``out``, an existing empty folder, with weights of ``dtype``.

    Raises:
        UserError: no checkpoint there, a tokenizer that cannot be exported, or a weight too large for ``dtype``.
    """
    card, files, tokenizer_file = read_model(checkpoint)
    write_json(out / OPEN_CLIP_CONFIG, config(card))
    write_tokenizer(tokenizer_file, card.tokenizer_style, card.arch.text.context_length, out)
    tensors = to_peer(open_clip_entries(card.arch), rounded(files, dtype))
    write_tensors(out / "open_clip_model.safetensors", dict(tensors))


def import_model(source: Path, out: Path) -> None:
    """Write the model of an open_clip folder into ``out``, an existing empty folder, in our format.

    Raises:
        UserError: damaged weights, a model of another kind, or no tokenizer of a kind that can be read.
    """
    path = source / OPEN_CLIP_CONFIG
    arch, text_prefix = architecture(read_json(path, ANYTHING), str(path))
    files = _weights(source)
    entries = open_clip_entries(arch, text_prefix)
    check_names(str(source), files.names(), peer_shapes(entries, arch), files)
    tokenizer_file, style = find_tokenizer(source, arch.text.eos_id, arch.text.vocab_size, out)
    tensors = from_peer(entries, files.get_fp32)
    write_model(out, ModelCard(arch=arch, tokenizer_style=style), tensors, tokenizer_file)


def config(card: ModelCard) -> dict[str, Any]:
    """Contents of ``open_clip_config.json``."""
    arch, vision, text = card.arch, card.arch.vision, card.arch.text
    return {
        "model_cfg": {
            "embed_dim": arch.embed_dim,
            "quick_gelu": arch.quick_gelu,
            # open_clip's models have a bias if its initial value is set.
            **({"init_logit_bias": SIGMOID_BIAS_INIT} if arch.logit_bias else {}),
            "vision_cfg": {
                "image_size": vision.image_size,
                "patch_size": vision.patch_size,
                "width": vision.width,
                "layers": vision.layers,
                "head_width": vision.head_width,
                "mlp_ratio": mlp_ratio(vision.width, vision.mlp_width),
            },
            "text_cfg": {
                "context_length": text.context_length,
                "vocab_size": text.vocab_size,
                "width": text.width,
                "heads": text.heads,
                "layers": text.layers,
                "pool_type": "eos",
                "eos_id": text.eos_id,
                # Any value makes open_clip load the tokenizer files of a local folder.
                "hf_tokenizer_name": _HUB_TOKENIZERS.get((card.tokenizer_style, text.vocab_size), "local-dir"),
            },
        },
        "preprocess_cfg": {
            "mean": list(MEAN),
            "std": list(STD),
            "interpolation": "bicubic",
            "resize_mode": arch.eval_resize,
        },
    }


def mlp_ratio(width: int, mlp_width: int) -> float:
    """A ratio with ``int(width * ratio) == mlp_width``, as open_clip computes it; rounded to 4 digits if possible."""
    short = round(mlp_width / width, 4)
    return short if int(width * short) == mlp_width else (mlp_width + 0.5) / width


def architecture(values: Any, source: str) -> tuple[ClipArchitecture, str]:
    """The architecture from a parsed ``open_clip_config.json``, and the prefix of its text tower's weights.

    Raises:
        UserError: not an open_clip config, or a model that differs from ours in more than sizes.
    """
    if not isinstance(values, dict) or not isinstance(values.get("model_cfg"), dict):
        raise UserError(f"{source}: no model_cfg there; not an open_clip config")
    model = values["model_cfg"]
    top = _take(model, "", _TOP, source)
    vision = _take(top["vision_cfg"], "vision_cfg", _VISION, source)
    text = _take(top["text_cfg"], "text_cfg", _TEXT, source)
    if top["text_cfg"].get("pool_type") != "eos":
        raise UserError(f"{source}: text_cfg.pool_type is not 'eos': not a model of the worldwide family")
    ratio = vision.pop("mlp_ratio")
    check_sizes(source, {"embed_dim": top["embed_dim"]})
    check_sizes(source, {f"vision_cfg.{key}": value for key, value in vision.items()})
    check_sizes(source, {f"text_cfg.{key}": value for key, value in text.items()})
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio <= _MOST_RATIO:
        raise UserError(f"{source}: vision_cfg.mlp_ratio={str(ratio)[:40]!r}: must be a positive number")
    for key in ("quick_gelu", "custom_text"):
        if not isinstance(top[key], bool):
            raise UserError(f"{source}: model_cfg.{key}={top[key]!r}: must be true or false")
    bias = top["init_logit_bias"]
    if bias is not None and (isinstance(bias, bool) or not isinstance(bias, int | float)):
        raise UserError(f"{source}: model_cfg.init_logit_bias={str(bias)[:40]!r}: must be a number or null")
    arch = ClipArchitecture(
        embed_dim=top["embed_dim"],
        quick_gelu=top["quick_gelu"],
        vision=VisionArchitecture(**vision, mlp_width=int(vision["width"] * ratio)),
        text=TextArchitecture(**text),
        eval_resize=_eval_resize(as_type(values.get("preprocess_cfg") or {}, _Preprocessing, source), source),
        logit_bias=bias is not None,
    )
    return arch, "text." if top["custom_text"] else ""


def _take(values: Any, section: str, sizes: dict[str, Any], source: str) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise UserError(f"{source}: {section} is missing; not an open_clip config")
    fixed = _FIXED[section]
    for key, value in values.items():
        if key in fixed and value != fixed[key] or key not in {*fixed, *sizes, *_WITHOUT_EFFECT[section]} and value:
            raise UserError(f"{source}: {section or 'model_cfg'}.{key}={value!r}: not a model of the worldwide family")
    return {key: values.get(key, default) for key, default in sizes.items()}


def _eval_resize(preprocess: _Preprocessing, source: str) -> str:
    ours = {"mean": list(MEAN), "std": list(STD), "interpolation": "bicubic"}
    for key, value in ours.items():
        found = getattr(preprocess, key)
        if found is not None and found != value:
            raise UserError(f"{source}: preprocess_cfg.{key}={found}: models here use {value}")
    if preprocess.resize_mode not in ("shortest", "squash"):
        raise UserError(
            f"{source}: preprocess_cfg.resize_mode={preprocess.resize_mode!r}: models here use shortest or squash"
        )
    return preprocess.resize_mode


def _weights(folder: Path) -> UnwrappedTensorFiles:
    for prefix in _WEIGHTS:
        if (folder / f"{prefix}.safetensors").is_file():
            return UnwrappedTensorFiles(folder, prefix)
    if saved := saved_weights(folder, ("open_clip_pytorch_model.bin",)):
        return UnwrappedTensorFiles(folder, saved)
    looked_for = [f"{prefix}.safetensors" for prefix in _WEIGHTS]
    raise UserError(f"{folder}: no weights there (looked for {', '.join(looked_for)}, .bin and .pt)")
