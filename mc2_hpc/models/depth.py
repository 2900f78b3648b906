"""How deep in its tower a parameter is: the order in which towers are frozen and learning rates decay.

0                                the embeddings, and the image tower's norm before the blocks
1 .. layers                      the blocks
layers + 1                       the final norm and the projection
"""

import re

from mc2_hpc.models.presets import ClipArchitecture

_BLOCK = re.compile(r"\.transformer\.blocks\.([0-9]+)\.")
_AFTER_BLOCKS = ("norm_post", "norm_final", "projection")


def tower_of(name: str) -> str | None:
    """``vision`` or ``text``, by a parameter's name in ``CLIP.state_dict()``; None for ``logit_scale``
    and ``logit_bias``."""
    tower, dot, _ = name.partition(".")
    return tower if dot else None


def depth_of(name: str, layers: int) -> int:
    """The depth of a tower's parameter, by its name in ``CLIP.state_dict()``; the tower has ``layers`` blocks."""
    if block := _BLOCK.search(name):
        return int(block[1]) + 1
    return layers + 1 if name.split(".")[1] in _AFTER_BLOCKS else 0


def num_layers(arch: ClipArchitecture, tower: str) -> int:
    """Blocks of ``vision`` or ``text``."""
    return (arch.vision if tower == "vision" else arch.text).layers
