"""Every parameter has a depth, in the order in which the towers compute."""

import torch

from mc2_hpc.models.clip import CLIP
from mc2_hpc.models.depth import depth_of, num_layers, tower_of
from mc2_hpc.models.presets import PRESETS


def test_depths_of_every_parameter():
    arch = PRESETS["ViT-S-16-worldwide"]
    with torch.device("meta"):
        names = [name for name, _ in CLIP(arch).named_parameters()]
    found: dict[tuple[str, int], set[str]] = {}
    for name in names:
        tower = tower_of(name)
        if tower is None:
            assert name == "logit_scale"
            continue
        found.setdefault((tower, depth_of(name, num_layers(arch, tower))), set()).add(name.split(".")[1])
    for tower, layers in (("vision", arch.vision.layers), ("text", arch.text.layers)):
        assert [depth for each, depth in sorted(found) if each == tower] == list(range(layers + 2))
        assert all(found[tower, depth] == {"transformer"} for depth in range(1, layers + 1))
    assert found["vision", 0] == {"patch_embedding", "class_embedding", "positional_embedding", "norm_pre"}
    assert found["text", 0] == {"token_embedding", "positional_embedding"}
    assert found["vision", arch.vision.layers + 1] == {"norm_post", "projection"}
    assert found["text", arch.text.layers + 1] == {"norm_final", "projection"}
