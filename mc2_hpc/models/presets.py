"""The recipe's model family as a table, and how a run's config overrides an entry.

Sizes are from Meta CLIP 2 (arXiv 2507.22062) and its released model configurations. Names end in ``-worldwide``;
``-quickgelu`` marks the different activation of the released H/14; ``-mt5`` marks mT5's vocabulary of 250,100 rows
(open_clip calls the L/14 with that vocabulary plain ``ViT-L-14-worldwide``), and ``-mt5-250k`` the released S, M and B
configurations, which leave out its last 100, the sentinels.
"""

import dataclasses
import difflib
from dataclasses import dataclass

from mc2_hpc.config import ModelConfig
from mc2_hpc.errors import UserError

_MOST = {"layers": 1 << 10, "vocab_size": 1 << 24, "context_length": 1 << 16, "image_size": 1 << 14}
_MOST_WIDTH = 1 << 17
_MOST_PARAMETERS = 10**12


@dataclass(frozen=True, kw_only=True)
class VisionArchitecture:
    """Sizes of the image tower."""

    image_size: int
    """Side length of the square input in pixels; a multiple of ``patch_size``."""
    patch_size: int
    width: int
    layers: int
    head_width: int
    """Channels per attention head; divides ``width``."""
    mlp_width: int

    @property
    def grid(self) -> int:
        """Patches along a side of an image."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        """Of an image."""
        return self.grid**2


@dataclass(frozen=True, kw_only=True)
class TextArchitecture:
    """Sizes of the causal text tower."""

    vocab_size: int
    context_length: int
    eos_id: int
    """The id whose first position in a row is pooled."""
    width: int
    layers: int
    heads: int


@dataclass(frozen=True, kw_only=True)
class ClipArchitecture:
    """Everything that determines the shapes and the arithmetic of a dual encoder."""

    embed_dim: int
    quick_gelu: bool
    vision: VisionArchitecture
    text: TextArchitecture
    eval_resize: str = "shortest"
    """How evaluation resizes: ``shortest`` side, then centre crop; or ``squash`` (the 378 px models)."""
    logit_bias: bool = False
    """Whether logits have a bias, as those of a model trained with the sigmoid loss do."""

    def __post_init__(self) -> None:
        vision, text = self.vision, self.text
        sizes = {"embed_dim": self.embed_dim}
        sizes |= {f"vision.{name}": size for name, size in vars(vision).items()}
        sizes |= {f"text.{name}": size for name, size in vars(text).items() if name != "eos_id"}
        for name, size in sizes.items():
            if size < 1:
                raise UserError(f"model.{name}={size}: must be at least 1")
            most = _MOST.get(name.rpartition(".")[2], _MOST_WIDTH)
            if size > most:
                raise UserError(f"model.{name}={size}: must be at most {most:,}")
        if vision.image_size % vision.patch_size:
            below = vision.image_size // vision.patch_size * vision.patch_size
            near = f"{below} or {below + vision.patch_size}" if below else f"{vision.patch_size}"
            raise UserError(
                f"model.vision.image_size={vision.image_size} is not a multiple of patch_size={vision.patch_size}: "
                f"choose {near}"
            )
        if vision.width % vision.head_width:
            raise UserError(f"model.vision.width={vision.width} is not a multiple of head_width={vision.head_width}")
        if text.width % text.heads:
            raise UserError(f"model.text.width={text.width} is not a multiple of heads={text.heads}")
        if not 0 <= text.eos_id < text.vocab_size:
            raise UserError(f"model.text.eos_id={text.eos_id} lies outside vocab_size={text.vocab_size}")
        if self.eval_resize not in ("shortest", "squash"):
            raise UserError(f"eval_resize={self.eval_resize!r}: must be shortest or squash")
        if num_parameters(self) > _MOST_PARAMETERS:
            raise UserError(f"a model of {num_parameters(self):,} parameters: at most {_MOST_PARAMETERS:,} are allowed")


def num_parameters(arch: ClipArchitecture) -> int:
    """Number of parameters of a model, from its sizes alone."""
    vision, text = arch.vision, arch.text

    def blocks(layers: int, width: int, mlp_width: int) -> int:
        """Per block: two norms, attention's 4 matrices and the MLP's 2, all with biases."""
        return layers * (4 * width + 4 * width * (width + 1) + width * mlp_width * 2 + mlp_width + width)

    image_tower = (3 * vision.patch_size**2 + 1 + vision.num_patches + 1 + 4 + arch.embed_dim) * vision.width
    text_tower = (text.vocab_size + text.context_length + 2 + arch.embed_dim) * text.width
    return (
        image_tower
        + blocks(vision.layers, vision.width, vision.mlp_width)
        + text_tower
        + blocks(text.layers, text.width, 4 * text.width)
        + 1  # logit_scale
        + arch.logit_bias
    )


@dataclass(frozen=True)
class _Size:
    patch: int
    vision: tuple[int, int, int]  # layers, width, head width
    text: tuple[int, int, int]  # layers, width, heads
    embed_dim: int
    resolutions: tuple[int, ...]
    mlp_width: int | None = None  # 4 x width unless given


_SIZES = {
    "ViT-S-16": _Size(16, (12, 384, 64), (12, 384, 6), 384, (224, 384)),
    "ViT-M-16": _Size(16, (12, 512, 64), (12, 512, 8), 512, (224, 384)),
    "ViT-B-32": _Size(32, (12, 768, 64), (12, 512, 8), 512, (224, 384)),
    "ViT-B-16": _Size(16, (12, 768, 64), (12, 512, 8), 512, (224, 384)),
    "ViT-L-14": _Size(14, (24, 1024, 64), (12, 768, 12), 768, (224, 378)),
    "ViT-H-14": _Size(14, (32, 1280, 80), (24, 1024, 16), 1024, (224, 378)),
    "ViT-bigG-14": _Size(14, (48, 1664, 104), (32, 1280, 20), 1280, (224, 378, 392), mlp_width=8192),
}

_VOCABULARIES = {"": (901_629, 2), "-mt5": (250_100, 1), "-mt5-250k": (250_000, 1)}  # suffix: rows, EOS id
_WITHOUT_SENTINELS = ("ViT-S-16", "ViT-M-16", "ViT-B-32", "ViT-B-16")


def _architecture(size: _Size, resolution: int, vocabulary: tuple[int, int], quick_gelu: bool) -> ClipArchitecture:
    vision_layers, vision_width, head_width = size.vision
    text_layers, text_width, heads = size.text
    return ClipArchitecture(
        embed_dim=size.embed_dim,
        quick_gelu=quick_gelu,
        vision=VisionArchitecture(
            image_size=resolution,
            patch_size=size.patch,
            width=vision_width,
            layers=vision_layers,
            head_width=head_width,
            mlp_width=size.mlp_width or 4 * vision_width,
        ),
        text=TextArchitecture(
            vocab_size=vocabulary[0],
            context_length=77,
            eos_id=vocabulary[1],
            width=text_width,
            layers=text_layers,
            heads=heads,
        ),
        eval_resize="squash" if resolution == 378 else "shortest",
    )


def _family() -> dict[str, ClipArchitecture]:
    presets = {}
    for name, size in _SIZES.items():
        for suffix, vocabulary in _VOCABULARIES.items():
            if suffix == "-mt5-250k" and name not in _WITHOUT_SENTINELS:
                continue
            for resolution in size.resolutions:
                tail = "" if resolution == 224 else f"-{resolution}"
                presets[f"{name}-worldwide{suffix}{tail}"] = _architecture(size, resolution, vocabulary, False)
    presets["ViT-H-14-worldwide-quickgelu"] = _architecture(_SIZES["ViT-H-14"], 224, _VOCABULARIES[""], True)
    return presets


PRESETS: dict[str, ClipArchitecture] = _family()
DEFAULT_PRESET = "ViT-B-32-worldwide"


def resolve(
    config: ModelConfig, initial: ClipArchitecture | None = None, *, logit_bias: bool = False
) -> ClipArchitecture:
    """The preset that ``config`` names, with the sizes that ``config`` overrides.

    A new vision width without a new MLP width keeps the preset's ratio of the two.

    Args:
        initial: architecture of the model that the run starts from, used if the config names no preset.
        logit_bias: whether the run's loss has a bias, whatever ``initial`` has.

    Raises:
        UserError: unknown preset (the message suggests the nearest name), or sizes that do not fit together.
    """
    if config.preset is not None and config.preset not in PRESETS:
        near = difflib.get_close_matches(config.preset, PRESETS, n=1, cutoff=0.0)[0]
        raise UserError(f"model.preset={config.preset!r}: no such preset; nearest is {near!r}")
    base = PRESETS[config.preset or DEFAULT_PRESET]
    if config.preset is None and initial is not None:
        base = initial
    vision = _set_fields(config.vision)
    if "width" in vision and "mlp_width" not in vision:
        vision["mlp_width"] = base.vision.mlp_width * vision["width"] // base.vision.width
    top = {name: getattr(config, name) for name in ("embed_dim", "quick_gelu") if getattr(config, name) is not None}
    return dataclasses.replace(
        base,
        vision=dataclasses.replace(base.vision, **vision),
        text=dataclasses.replace(base.text, **_set_fields(config.text)),
        logit_bias=logit_bias,
        **top,
    )


def _set_fields(overrides: object) -> dict[str, int]:
    return {k: v for k, v in vars(overrides).items() if v is not None}
