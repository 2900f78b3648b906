"""The family has the recipe's sizes, and inconsistent configs raise errors."""

import dataclasses

import pytest

from mc2_hpc.config import ModelConfig, TextOverrides, VisionOverrides
from mc2_hpc.errors import UserError
from mc2_hpc.models.presets import PRESETS, ClipArchitecture, resolve

# patch, vision (layers, width, head width, MLP width), text (layers, width, heads), embedding; from the recipe's table.
RECIPE = {
    "ViT-S-16": (16, (12, 384, 64, 1536), (12, 384, 6), 384),
    "ViT-M-16": (16, (12, 512, 64, 2048), (12, 512, 8), 512),
    "ViT-B-32": (32, (12, 768, 64, 3072), (12, 512, 8), 512),
    "ViT-B-16": (16, (12, 768, 64, 3072), (12, 512, 8), 512),
    "ViT-L-14": (14, (24, 1024, 64, 4096), (12, 768, 12), 768),
    "ViT-H-14": (14, (32, 1280, 80, 5120), (24, 1024, 16), 1024),
    "ViT-bigG-14": (14, (48, 1664, 104, 8192), (32, 1280, 20), 1280),
}
RESOLUTIONS = {"16": (224, 384), "32": (224, 384), "14": (224, 378)}


def numbers(arch: ClipArchitecture) -> tuple[object, ...]:
    v, t = arch.vision, arch.text
    vision = (v.layers, v.width, v.head_width, v.mlp_width)
    return v.patch_size, vision, (t.layers, t.width, t.heads), arch.embed_dim


@pytest.mark.parametrize("size", RECIPE)
@pytest.mark.parametrize(("suffix", "vocabulary"), [("", (901_629, 2)), ("-mt5", (250_100, 1))])
def test_the_family(size: str, suffix: str, vocabulary: tuple[int, int]) -> None:
    for resolution in RESOLUTIONS[size.rpartition("-")[2]]:
        arch = PRESETS[f"{size}-worldwide{suffix}" + ("" if resolution == 224 else f"-{resolution}")]
        assert numbers(arch) == RECIPE[size]
        assert arch.vision.image_size == resolution
        assert (arch.text.vocab_size, arch.text.eos_id) == vocabulary
        assert arch.text.context_length == 77
        assert not arch.quick_gelu
        assert arch.eval_resize == ("squash" if resolution == 378 else "shortest")


def test_the_released_mt5_models_leave_out_the_sentinels() -> None:
    found = {name for name, arch in PRESETS.items() if arch.text.vocab_size == 250_000}
    assert found == {f"ViT-{s}-worldwide-mt5-250k{r}" for s in ("S-16", "M-16", "B-16", "B-32") for r in ("", "-384")}
    for name in found:
        base = PRESETS[name.replace("-250k", "")]
        assert PRESETS[name] == dataclasses.replace(base, text=dataclasses.replace(base.text, vocab_size=250_000))


def test_only_the_released_h14_is_quick_gelu() -> None:
    assert [name for name, arch in PRESETS.items() if arch.quick_gelu] == ["ViT-H-14-worldwide-quickgelu"]
    h14 = PRESETS["ViT-H-14-worldwide"]
    assert PRESETS["ViT-H-14-worldwide-quickgelu"] == dataclasses.replace(h14, quick_gelu=True)
    assert PRESETS["ViT-bigG-14-worldwide-392"].vision.image_size == 392


def test_overrides_take_the_place_of_the_presets_numbers() -> None:
    config = ModelConfig(
        preset="ViT-B-16-worldwide",
        embed_dim=96,
        quick_gelu=True,
        vision=VisionOverrides(image_size=48, layers=2),
        text=TextOverrides(vocab_size=1000, context_length=20, width=64, heads=4),
    )
    arch = resolve(config)
    base = PRESETS["ViT-B-16-worldwide"]
    assert arch == dataclasses.replace(
        base,
        embed_dim=96,
        quick_gelu=True,
        vision=dataclasses.replace(base.vision, image_size=48, layers=2),
        text=dataclasses.replace(base.text, vocab_size=1000, context_length=20, width=64, heads=4),
    )
    assert resolve(ModelConfig(preset="ViT-B-16-worldwide")) == base


def test_a_new_width_keeps_the_ratio_of_the_mlp() -> None:
    assert resolve(ModelConfig(vision=VisionOverrides(width=128))).vision.mlp_width == 512
    assert resolve(ModelConfig(vision=VisionOverrides(width=128, mlp_width=99))).vision.mlp_width == 99
    config = ModelConfig(preset="ViT-bigG-14-worldwide", vision=VisionOverrides(width=416))
    assert resolve(config).vision.mlp_width == 2048


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            ModelConfig(preset="ViT-H14-worldwide"),
            "model.preset='ViT-H14-worldwide': no such preset; nearest is 'ViT-H-14-worldwide'",
        ),
        (
            ModelConfig(vision=VisionOverrides(image_size=225)),
            "model.vision.image_size=225 is not a multiple of patch_size=32: choose 224 or 256",
        ),
        (
            ModelConfig(vision=VisionOverrides(head_width=60)),
            "model.vision.width=768 is not a multiple of head_width=60",
        ),
        (ModelConfig(text=TextOverrides(heads=7)), "model.text.width=512 is not a multiple of heads=7"),
        (ModelConfig(text=TextOverrides(vocab_size=2)), "model.text.eos_id=2 lies outside vocab_size=2"),
        (ModelConfig(text=TextOverrides(eos_id=-1)), "model.text.eos_id=-1 lies outside vocab_size=901629"),
        (ModelConfig(vision=VisionOverrides(patch_size=0)), "model.vision.patch_size=0: must be at least 1"),
        (ModelConfig(text=TextOverrides(layers=-2)), "model.text.layers=-2: must be at least 1"),
        (ModelConfig(embed_dim=0), "model.embed_dim=0: must be at least 1"),
    ],
)
def test_what_does_not_fit_is_one_line(config: ModelConfig, message: str) -> None:
    with pytest.raises(UserError) as error:
        resolve(config)
    assert str(error.value) == message
