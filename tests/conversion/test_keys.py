"""The key maps: complete, one to one, and bit-exact both ways."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mc2_hpc.conversion.keys import (
    Entry,
    PatchKernel,
    QkvSplit,
    Same,
    Transposed,
    from_peer,
    huggingface_entries,
    open_clip_entries,
    our_shapes,
    peer_shapes,
    to_peer,
)
from mc2_hpc.models.presets import ClipArchitecture, TextArchitecture, VisionArchitecture


@st.composite
def architectures(draw: st.DrawFn) -> ClipArchitecture:
    heads, head_width, patch = draw(st.integers(1, 3)), draw(st.integers(1, 5)), draw(st.integers(1, 3))
    text_heads = draw(st.integers(1, 3))
    return ClipArchitecture(
        embed_dim=draw(st.integers(1, 7)),
        quick_gelu=draw(st.booleans()),
        vision=VisionArchitecture(
            image_size=patch * draw(st.integers(1, 3)),
            patch_size=patch,
            width=heads * head_width,
            layers=draw(st.integers(1, 3)),
            head_width=head_width,
            mlp_width=draw(st.integers(1, 9)),
        ),
        text=TextArchitecture(
            vocab_size=draw(st.integers(3, 9)),
            context_length=draw(st.integers(1, 5)),
            eos_id=2,
            width=text_heads * draw(st.integers(1, 5)),
            layers=draw(st.integers(1, 3)),
            heads=text_heads,
        ),
    )


def random_bits(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Every bit pattern of fp32, NaNs, infinities and denormals among them."""
    return torch.randint(-(2**31), 2**31, shape, generator=generator).to(torch.int32).view(torch.float32)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype == torch.float32 and torch.equal(a.view(torch.int32), b.view(torch.int32))


MAPS = {
    "open_clip": open_clip_entries,
    "open_clip custom text": lambda arch: open_clip_entries(arch, "text."),
    "transformers": huggingface_entries,
}


@pytest.mark.parametrize("peer", MAPS)
@given(arch=architectures(), seed=st.integers(0, 2**16))
@settings(max_examples=25, deadline=None)
def test_there_and_back_is_the_same_bits(peer: str, arch: ClipArchitecture, seed: int) -> None:
    entries = MAPS[peer](arch)
    generator = torch.Generator().manual_seed(seed)
    ours = {name: random_bits(shape, generator) for name, shape in our_shapes(arch).items()}
    theirs = dict(to_peer(entries, ours.__getitem__))
    back = dict(from_peer(entries, theirs.__getitem__))
    assert back.keys() == ours.keys()
    assert all(same_bits(back[name], ours[name]) for name in ours)


@pytest.mark.parametrize("peer", MAPS)
@given(arch=architectures(), seed=st.integers(0, 2**16))
@settings(max_examples=25, deadline=None)
def test_back_and_there_is_the_same_bits(peer: str, arch: ClipArchitecture, seed: int) -> None:
    entries = MAPS[peer](arch)
    generator = torch.Generator().manual_seed(seed)
    theirs = {name: random_bits(shape, generator) for name, shape in peer_shapes(entries, arch).items()}
    ours = dict(from_peer(entries, theirs.__getitem__))
    assert {name: tensor.shape for name, tensor in ours.items()} == our_shapes(arch)
    back = dict(to_peer(entries, ours.__getitem__))
    assert all(same_bits(back[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("peer", MAPS)
@given(arch=architectures())
@settings(max_examples=10, deadline=None)
def test_the_map_is_one_to_one(peer: str, arch: ClipArchitecture) -> None:
    entries = MAPS[peer](arch)
    theirs = [name for entry in entries for name in entry.theirs]
    assert len(set(theirs)) == len(theirs)
    assert sorted(entry.ours for entry in entries) == sorted(our_shapes(arch))


def test_layouts_literally() -> None:
    x = torch.arange(12.0)
    assert Same().forward(x)[0] is x
    kernel = PatchKernel(2).forward(x.view(1, 12))[0]
    assert kernel.shape == (1, 3, 2, 2) and kernel[0, 1, 1, 0] == 6  # colour, row, column
    assert torch.equal(Transposed().forward(x.view(3, 4))[0], x.view(3, 4).T)
    q, k, v = QkvSplit().forward(x.view(6, 2))
    assert (q[0, 0], k[0, 0], v[0, 0]) == (0, 4, 8)


def test_a_layout_that_yields_another_number_of_tensors_is_a_bug() -> None:
    with pytest.raises(ValueError, match="zip"):
        dict(to_peer([Entry("x", ("a", "b"))], {"x": torch.zeros(3)}.__getitem__))
