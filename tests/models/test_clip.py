"""The dual encoder: pooling, padding, construction, attention backends, operation counts."""

import logging
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mc2_hpc.errors import UserError
from mc2_hpc.models.clip import CLIP, build_clip, flops_per_pair
from mc2_hpc.models.fused import QuickGELU
from mc2_hpc.models.layers import ATTENTION_BACKENDS, AttentionBackend, resolve_attention
from mc2_hpc.models.packed_attention import packed_by
from mc2_hpc.models.presets import PRESETS, ClipArchitecture, TextArchitecture, VisionArchitecture

ARCH = ClipArchitecture(
    embed_dim=24,
    quick_gelu=False,
    vision=VisionArchitecture(image_size=24, patch_size=8, width=32, layers=2, head_width=16, mlp_width=72),
    text=TextArchitecture(vocab_size=50, context_length=16, eos_id=2, width=24, layers=2, heads=3),
)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def model() -> CLIP:
    return build_clip(ARCH, seed=0).eval()


def rows(lengths: list[int], pad: int = 1) -> torch.Tensor:
    """Random captions of these lengths, EOS included."""
    tokens = torch.randint(4, 50, (len(lengths), 16), generator=torch.Generator().manual_seed(0))
    for row, length in enumerate(lengths):
        tokens[row, length - 1] = 2
        tokens[row, length:] = pad
    return tokens


@torch.no_grad()
def test_rows_cut_after_their_eos_give_the_same_embeddings(model: CLIP) -> None:
    tokens = rows([3, 9, 7, 1])
    padded = model.encode_text(tokens)
    for width in (9, 12, 15):
        torch.testing.assert_close(model.encode_text(tokens[:, :width]), padded, atol=1e-5, rtol=0)


@torch.no_grad()
def test_what_follows_the_first_eos_is_not_seen(model: CLIP) -> None:
    expected = model.encode_text(rows([3, 9]))
    torch.testing.assert_close(model.encode_text(rows([3, 9], pad=7)), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(model.encode_text(rows([3, 9], pad=2)), expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_every_token_up_to_the_eos_is_seen(model: CLIP) -> None:
    tokens = rows([6])
    expected = model.encode_text(tokens)
    for position in range(5):
        changed = tokens.clone()
        changed[0, position] = (changed[0, position] - 3) % 46 + 4
        assert (model.encode_text(changed) - expected).abs().max() > 1e-3


@torch.no_grad()
def test_every_pixel_is_seen_in_its_place(model: CLIP) -> None:
    image = torch.randn(1, 3, 24, 24)
    expected = model.encode_image(image)
    for changed in (image.flip(1), image.flip(2), image.flip(3), image.transpose(2, 3), image.roll(8, 2)):
        assert (model.encode_image(changed) - expected).abs().max() > 1e-3


@torch.no_grad()
def test_forward_gives_unit_vectors_and_the_scale_in_fp32(model: CLIP) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        image, text, scale = model(torch.randn(2, 3, 24, 24), rows([3, 4, 5]))
    assert (image.shape, text.shape, scale.shape) == ((2, 24), (3, 24), ())
    assert image.dtype == text.dtype == scale.dtype == torch.float32
    torch.testing.assert_close(image.norm(dim=1), torch.ones(2))
    torch.testing.assert_close(text.norm(dim=1), torch.ones(3))
    assert scale.exp().item() == pytest.approx(1 / 0.07)
    plain = model(torch.zeros(2, 3, 24, 24), rows([3, 4, 5]))[1]
    assert (text @ plain.T).diagonal().min() > 0.999  # bf16 arithmetic, same model


def test_wrong_shapes_are_named(model: CLIP) -> None:
    with pytest.raises(ValueError, match=r"images of shape \(2, 3, 24, 32\): this model takes \(batch, 3, 24, 24\)"):
        model.encode_image(torch.zeros(2, 3, 24, 32))
    with pytest.raises(ValueError, match="17 tokens per row: this model takes 16"):
        model.encode_text(torch.zeros(1, 17, dtype=torch.long))


def test_meta_construction_leaves_nothing_behind() -> None:
    with torch.device("meta"):
        model = CLIP(PRESETS["ViT-H-14-worldwide-quickgelu"])
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}
    assert not list(model.buffers())
    numbers = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    assert round(numbers["vision"] / 1e6) == 632
    assert round(numbers["text"] / 1e6) == 1227  # 923 million of them in the token table
    assert sum(p.numel() for p in model.parameters()) == 1_858_783_745


def test_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = build_clip(ARCH, seed=7).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    second, other = build_clip(ARCH, seed=7).state_dict(), build_clip(ARCH, seed=8).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["vision.projection"], other["vision.projection"])
    assert all(torch.isfinite(tensor).all() for tensor in first.values())


def test_quick_gelu_is_its_formula() -> None:
    x = torch.linspace(-5, 5, 101, dtype=torch.float64)
    torch.testing.assert_close(QuickGELU()(x), x / (1 + torch.exp(-1.702 * x)))


def test_recompute_changes_no_gradient() -> None:
    images, tokens = torch.randn(2, 3, 24, 24), rows([3, 9])
    gradients = []
    for recompute in ("none", "selective", "full"):
        model = build_clip(ARCH, seed=0)
        model.set_recompute(recompute)
        image, text, scale = model(images, tokens)
        (scale.exp() * image @ text.T).diagonal().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert all(gradient is not None for gradient in gradients[0].values())
    for name, gradient in gradients[0].items():
        assert torch.equal(gradients[1][name], gradient) and torch.equal(gradients[2][name], gradient), name


def test_attention_backends_are_chosen_aloud(caplog: pytest.LogCaptureFixture, model: CLIP) -> None:
    caplog.set_level(logging.INFO)
    model.set_attention("auto", "cpu")
    assert "attention: sdpa (auto: the default on cpu)" in caplog.text
    with pytest.raises(UserError, match="^model.attention='flash': choose one of auto, sdpa, xformers$"):
        resolve_attention("flash", "cpu")


def test_a_backend_that_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xformers", None)
    monkeypatch.setitem(sys.modules, "xformers.ops", None)
    with pytest.raises(UserError, match="^model.attention='xformers': .* install xformers>=0.0.35 or set .*=sdpa$"):
        resolve_attention("xformers", "cuda")


def test_xformers_without_a_kernel_for_the_device_is_an_error_at_the_start() -> None:
    """Of the real package, whose kernels are for GPUs: it imports, and fails at the first call."""
    with pytest.raises(UserError, match="^model.attention=.xformers.: .*cannot compute it on cpu") as found:
        resolve_attention("xformers", "cpu")
    assert "\n" not in str(found.value)


@torch.no_grad()
def test_another_attention_function_is_used_by_every_block(model: CLIP, monkeypatch: pytest.MonkeyPatch) -> None:
    images, tokens = torch.randn(2, 3, 24, 24), rows([3, 9])
    expected = model(images, tokens)
    calls = []

    def explicit(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool) -> torch.Tensor:
        calls.append(causal)
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        if causal:
            scores += torch.full(scores.shape[-2:], float("-inf")).triu(1)
        return scores.softmax(-1) @ v

    backend = AttentionBackend(explicit, packed_by(explicit))
    monkeypatch.setitem(ATTENTION_BACKENDS, "explicit", lambda device_type: backend)
    model.set_attention("explicit", "cpu")
    for found, wanted in zip(model(images, tokens), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    assert calls == [False, False, True, True]


@pytest.mark.parametrize("arch", [ARCH, PRESETS["ViT-S-16-worldwide"]])
def test_operation_count_is_what_torch_counts(arch: ClipArchitecture) -> None:
    length = 10
    with torch.device("meta"):
        model = CLIP(arch)
        images = torch.empty(1, 3, arch.vision.image_size, arch.vision.image_size)
    with FlopCounterMode(display=False) as counter:
        model.encode_image(images)
        # The EOS cannot be found on meta; only the blocks matter here.
        rows = torch.empty(1, length, arch.text.width, device="meta")
        model.text.transformer(rows, pooled_B=torch.zeros(1, dtype=torch.int64, device="meta"))
    counted = counter.get_total_flops() + 2 * arch.text.width * arch.embed_dim
    assert flops_per_pair(arch, length) == 3 * counted


def test_frozen_parts_count_once() -> None:
    """A frozen depth costs a third of a trained one, so freezing block by block saves the same each time, but for the
    last block, which is mostly of one row."""
    arch, length = PRESETS["ViT-S-16-worldwide"], 10
    layers = arch.vision.layers
    counts = [flops_per_pair(arch, length, {"vision": depth, "text": -1}) for depth in range(-1, layers + 2)]
    assert counts[0] == flops_per_pair(arch, length)
    saved = [before - after for before, after in zip(counts, counts[1:], strict=False)]
    assert len(set(saved[1:-2])) == 1 and 0 < saved[-2] < saved[1] / 2
    frozen = flops_per_pair(arch, length, {"vision": layers + 1, "text": arch.text.layers + 1})
    assert 3 * frozen == counts[0]
    # Without images, what is left is the text tower's.
    assert (
        flops_per_pair(arch, length) - flops_per_pair(arch, length, num_patches=0) == 3 * (counts[0] - counts[-1]) // 2
    )
