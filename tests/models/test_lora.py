"""Low-rank adapters: where they are, what they cost, and that a folded model is the same function."""

import json

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mc2_hpc.errors import UserError
from mc2_hpc.models.average import weight_files
from mc2_hpc.models.clip import CLIP, build_clip, flops_per_pair
from mc2_hpc.models.lora import AdaptedLinear, Adapters, add_adapters, init_adapters, is_adapter
from mc2_hpc.models.presets import resolve
from mc2_hpc.models.weights import ModelCard, load_clip, read_card, write_card, write_tensors
from mc2_hpc.training.freezing import freeze
from tests.training import zero_worker

BOTH = Adapters(rank=3, alpha=5.0, vision=True, text=True)


def adapted(adapters: Adapters = BOTH) -> CLIP:
    """A small model whose adapters are all random."""
    clip = build_clip(resolve(zero_worker.run_config(0).model), seed=0)
    add_adapters(clip, adapters)
    init_adapters(clip, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in clip.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_(std=0.1, generator=generator)
    return clip


@pytest.fixture
def folder(tmp_path):
    """A checkpoint of an adapted model."""
    clip = adapted()
    write_card(tmp_path, ModelCard(arch=clip.arch, tokenizer_style="xlmv", lora=BOTH))
    write_tensors(tmp_path / "model.0.safetensors", clip.state_dict())
    return tmp_path


def logits(clip: CLIP) -> torch.Tensor:
    images, tokens = zero_worker.batches()[0]
    with torch.no_grad():
        image, text, scale = clip(images / 255, tokens)
    return scale.exp() * image @ text.T


def test_they_begin_as_the_model_that_they_adapt():
    plain = build_clip(resolve(zero_worker.run_config(0).model), seed=0)
    expected, names = logits(plain), set(plain.state_dict())
    add_adapters(plain, BOTH)
    init_adapters(plain, seed=1)
    assert torch.equal(logits(plain), expected)
    added = set(plain.state_dict()) - names
    assert names < set(plain.state_dict()) and all(is_adapter(name) for name in added)
    layers = len(plain.vision.transformer.blocks) + len(plain.text.transformer.blocks)
    assert len(added) == 2 * 4 * layers
    again = build_clip(plain.arch, seed=3)
    add_adapters(again, BOTH)
    init_adapters(again, seed=1)
    assert all(torch.equal(again.state_dict()[name], plain.state_dict()[name]) for name in added)


def test_only_the_named_towers_are_adapted():
    clip = adapted(Adapters(rank=2, alpha=1, vision=False, text=True))
    assert {name.partition(".")[0] for name in clip.state_dict() if is_adapter(name)} == {"text"}


def test_the_folded_model_is_the_same_function(folder):
    found, card = load_clip(folder)
    assert card.lora is None and read_card(folder).lora == BOTH
    assert not any(isinstance(layer, AdaptedLinear) for layer in found.modules())
    expected = logits(adapted())
    assert (logits(found) - expected).abs().max() <= 1e-6 * expected.abs().max()
    assert (logits(build_clip(found.arch, seed=0)) - expected).abs().max() > 1e-2


def test_the_average_is_folded_with_its_own_adapters(folder):
    state = {name: 2 * tensor for name, tensor in adapted().state_dict().items() if is_adapter(name)}
    write_tensors(folder / "ema.0.safetensors", state)
    name = "text.transformer.blocks.1.fc"
    files, weights = weight_files(folder, ema=True), adapted().state_dict()
    product = state[f"{name}.lora_B"].double() @ state[f"{name}.lora_A"].double()
    expected = weights[f"{name}.weight"].double() + 5 / 3 * product
    assert (files.get_fp32(f"{name}.weight").double() - expected).abs().max() < 1e-7
    assert not torch.equal(files.get_fp32(f"{name}.weight"), weight_files(folder).get_fp32(f"{name}.weight"))
    assert files.names() == weight_files(folder).names() and files.shape(f"{name}.weight") == tuple(expected.shape)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"lora": None}, "it has adapters, but model.json does not describe them"),
        ({"lora": {"rank": 4, "alpha": 5.0, "vision": True, "text": True}}, "is not an adapter of the rank that"),
        ({"lora": {"rank": 3}}, "model.json: "),
    ],
)
def test_adapters_that_do_not_fit_the_card_are_refused(folder, change, words):
    card = json.loads((folder / "model.json").read_text())
    (folder / "model.json").write_text(json.dumps({**card, **change}))
    with pytest.raises(UserError) as error:
        weight_files(folder)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("half, words", [("lora_A", "has no other half"), ("lora_B", "but no ")])
def test_half_an_adapter_is_refused(folder, half, words):
    state = adapted().state_dict()
    del state[f"vision.transformer.blocks.0.proj.{half}"]
    write_tensors(folder / "model.0.safetensors", state)
    with pytest.raises(
        UserError, match=f"damaged checkpoint: it has .*vision.transformer.blocks.0.proj.*{words}|{words}"
    ):
        weight_files(folder)


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_changes_no_bit(recompute):
    images, tokens = zero_worker.batches()[0]
    found = []
    for name in ("none", recompute):
        clip = adapted()
        freeze(clip, zero_worker.run_config(0).freeze)
        clip.set_recompute(name)
        image, text, _ = clip(images / 255, tokens)
        (image @ text.T).square().sum().backward()
        found.append({name: p.grad for name, p in clip.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() == {name for name in adapted().state_dict() if is_adapter(name)}
    assert all(torch.equal(found[1][name], gradient) for name, gradient in found[0].items())


def test_selective_recomputation_repeats_no_large_product():
    """The backward pass of an adapted block computes again only the adapters' own products, which are narrow."""
    counted = []
    for name in ("none", "selective"):
        clip = adapted()
        freeze(clip, zero_worker.run_config(0).freeze)
        clip.set_recompute(name)
        with FlopCounterMode(display=False) as counter:
            clip.encode_image(zero_worker.batches()[0][0] / 255).sum().backward()
        counted.append(counter.get_total_flops())
    width, mlp, tokens = 64, 256, zero_worker.BATCH * 5
    narrow = 2 * (2 * tokens * 3 * (4 * width + (width + mlp) + (mlp + width)))
    assert narrow < 2 * tokens * width * mlp
    assert counted[0] < counted[1] <= counted[0] + narrow


def test_operation_count_is_what_torch_counts():
    clip = adapted()
    freeze(clip, zero_worker.run_config(0).freeze)
    length, embed = 10, clip.arch.embed_dim
    tokens = torch.randint(3, 90, (1, length))
    tokens[:, -1] = 2
    # Of the fused kernels on the CPU the counter knows no operations.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        image, text = clip.encode_image(zero_worker.batches()[0][0][:1] / 255), clip.encode_text(tokens)
        (image @ text.T).sum().backward()
    loss = 3 * 2 * embed
    assert flops_per_pair(clip.arch, length, ranks={"vision": 3, "text": 3}) == counter.get_total_flops() - loss
