"""A run's initial model: every format, its architecture and tokenizer, weights of wrapped models."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file, save_file

from mc2_hpc.config import load_config
from mc2_hpc.conversion.convert import convert
from mc2_hpc.data.tokenizer import train_tokenizer
from mc2_hpc.distributed import process_group
from mc2_hpc.errors import UserError
from mc2_hpc.models.clip import build_clip
from mc2_hpc.models.presets import PRESETS, resolve
from mc2_hpc.models.weights import TOKENIZER_FILE, ModelCard, load_clip, write_card, write_tensors
from mc2_hpc.models.wrapped import UnwrappedTensorFiles
from mc2_hpc.training.checkpoint import Checkpoint, load_weights
from mc2_hpc.training.initial import architecture, initial_source, load_initial_weights, tokenizer
from tests.conversion.test_find_tokenizer import with_sentinels
from tests.faults.tiny_run import write_config


@pytest.fixture
def config(tiny_pool, tmp_path):
    """``config(*overrides, **model)``: a run into ``tmp_path / "run"`` whose model section is just ``model``."""

    def load(*overrides, **model):
        path = write_config(tmp_path / "new.yaml", tiny_pool, output=str(tmp_path / "run"), model=model)
        return load_config(path, list(overrides))

    return load


@pytest.fixture
def trained(tiny_pool, tmp_path):
    """A model folder in our format with quick GELU, which no preset of its size has, and its model."""
    arch = resolve(load_config(write_config(tmp_path / "old.yaml", tiny_pool)).model)
    arch = dataclasses.replace(arch, quick_gelu=True)
    clip = build_clip(arch, seed=5)
    folder = tmp_path / "trained"
    folder.mkdir()
    write_tensors(folder / "model.00000.safetensors", clip.state_dict())
    write_card(folder, ModelCard(arch=arch, tokenizer_style="xlmv"))
    (folder / TOKENIZER_FILE).write_bytes(tiny_pool.tokenizer.read_bytes())
    return folder, clip


def same_weights(found, expected):
    found, expected = found.state_dict(), expected.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("kind", ["mc2", "open_clip", "hf"])
def test_every_format_brings_architecture_tokenizer_and_weights(config, trained, tiny_pool, tmp_path, kind):
    folder, clip = trained
    source = folder if kind == "mc2" else convert(folder, kind, tmp_path / kind)
    run = config("data.tokenizer=", init_from=str(source))
    with process_group() as ranks, initial_source(run, None, ranks) as found:
        arch = architecture(run, found)
        assert arch == clip.arch
        ours = build_clip(arch, seed=0)
        load_initial_weights(ours, found)
        theirs = tokenizer(run, found, arch, ranks)
    same_weights(ours, clip)
    assert theirs.style == "xlmv" and theirs.model_file == tmp_path / "run" / TOKENIZER_FILE
    assert theirs.model_file.read_bytes() == tiny_pool.tokenizer.read_bytes()
    assert [path.name for path in (tmp_path / "run").iterdir()] == [TOKENIZER_FILE]  # no converted copy is left


def test_the_config_refines_the_source_and_a_preset_takes_its_place(config, trained):
    folder, clip = trained
    with process_group() as ranks:
        run = config(init_from=str(folder), quick_gelu=False)
        with initial_source(run, None, ranks) as found:
            assert architecture(run, found) == dataclasses.replace(clip.arch, quick_gelu=False)
        run = config(init_from=str(folder), preset="ViT-S-16-worldwide")
        with initial_source(run, None, ranks) as found:
            assert architecture(run, found) == PRESETS["ViT-S-16-worldwide"]
        with initial_source(config(), None, ranks) as found:
            assert found is None and architecture(config(), None) == PRESETS["ViT-B-32-worldwide"]


def started(run):
    """The model that the run starts with."""
    with process_group() as ranks, initial_source(run, None, ranks) as found:
        clip = build_clip(architecture(run, found), seed=0)
        load_initial_weights(clip, found)
    return clip.eval()


@torch.no_grad()
@pytest.mark.parametrize("side", [48, 64, 16])
def test_another_resolution_is_open_clips(config, trained, tmp_path, open_clip, caplog, side):
    """The exported model's logits are those of the source that open_clip itself resized."""
    folder, _ = trained
    source = convert(folder, "open_clip", tmp_path / "source")
    with caplog.at_level("INFO"):
        clip = started(config(init_from=str(source), vision={"image_size": side}, text={"context_length": 40}))
    patches = f"image positions: 32 px (2 x 2 patches) to {side} px ({side // 16} x {side // 16})"
    assert f"{patches}; text positions: 24 to 40 tokens" in caplog.text
    assert not [row for row in caplog.records if row.levelname == "WARNING"]
    resized = tmp_path / "resized"
    write_tensors(resized / "model.safetensors", clip.state_dict())
    write_card(resized, ModelCard(arch=clip.arch, tokenizer_style="xlmv"))
    (resized / TOKENIZER_FILE).write_bytes((folder / TOKENIZER_FILE).read_bytes())
    exported = open_clip.create_model(f"local-dir:{convert(resized, 'open_clip', tmp_path / 'exported')}")
    theirs = open_clip.create_model(f"local-dir:{source}", force_image_size=side, force_context_length=40)
    images, tokens = torch.randn(3, 3, side, side), torch.tensor([[0, 5, 9, 11, 2] + [1] * 35] * 3)
    tokens[1, 2:4] = torch.tensor([7, 2])
    logits = [scale * image @ text.T for image, text, scale in (m.eval()(images, tokens) for m in (exported, theirs))]
    torch.testing.assert_close(logits[0], logits[1], atol=1e-5, rtol=0)
    image, text, scale = clip(images, tokens)
    torch.testing.assert_close(logits[0], scale.exp() * image @ text.T, atol=1e-5, rtol=0)


def test_back_at_the_old_resolution(config, trained, tmp_path):
    """The way up and back is close, but not the same: interpolation is lossy, most of all for random tables."""
    folder, clip = trained
    large = started(config(init_from=str(folder), vision={"image_size": 64}))
    write_tensors(tmp_path / "large/model.safetensors", large.state_dict())
    write_card(tmp_path / "large", ModelCard(arch=large.arch, tokenizer_style="xlmv"))
    back = started(config(init_from=str(tmp_path / "large"), vision={"image_size": 32}))
    assert back.arch == clip.arch
    old, new = (model.vision.positional_embedding for model in (clip, back))
    assert 0 < (new - old).norm() < 0.3 * old.norm()
    assert torch.equal(back.text.positional_embedding, clip.text.positional_embedding)


def test_only_positions_are_resized(config, trained, caplog):
    folder, _ = trained
    for changes, words in (
        ({"vision": {"patch_size": 8}}, "vision.patch_embedding.weight is "),
        ({"vision": {"layers": 3}}, "lacks 'vision.transformer.blocks.2"),
        ({"text": {"width": 96}}, "text.token_embedding.weight is |text.positional_embedding is "),
    ):
        with pytest.raises(UserError, match=f"trained: checkpoint of another model: (it )?({words})"):
            started(config(init_from=str(folder), **changes))
    with pytest.raises(UserError, match="image_size=40 is not a multiple of patch_size=16: choose 32 or 48"):
        started(config(init_from=str(folder), vision={"image_size": 40}))
    started(config(init_from=str(folder), quick_gelu=False))
    assert "was trained with QuickGELU, and this run computes GELU: set model.quick_gelu=true" in caplog.text


def test_a_resumed_run_has_its_checkpoints_model(config, trained):
    """The source may no longer exist then."""
    folder, clip = trained
    run = config(init_from="/nowhere/model")
    with process_group() as ranks:
        with initial_source(run, Checkpoint(folder=folder, trainer={"step": 3}), ranks) as found:
            assert found.resumed and architecture(run, found) == clip.arch
        with pytest.raises(UserError, match="/nowhere/model: no checkpoint there"):
            with initial_source(run, None, ranks):
                pass


def test_another_tokenizer_must_be_allowed(config, trained, tmp_path):
    folder, _ = trained
    other = train_tokenizer(["a lime dune"] * 9, tmp_path / "other.model", vocab_size=20, style="xlmv").model_file
    with process_group() as ranks:
        run = config(f"data.tokenizer={other}", init_from=str(folder))
        with initial_source(run, None, ranks) as found:
            with pytest.raises(UserError, match="not the tokenizer that the weights of .* were trained with"):
                tokenizer(run, found, architecture(run, found), ranks)
        run = config(f"data.tokenizer={other}", init_from=str(folder), new_tokenizer=True)
        with initial_source(run, None, ranks) as found:
            assert tokenizer(run, found, architecture(run, found), ranks).model_file == other
        with pytest.raises(UserError, match="data.tokenizer is not set"):
            run = config("data.tokenizer=")
            tokenizer(run, None, architecture(run, None), ranks)


def test_a_token_table_without_rows_for_sentinels(config, tmp_path):
    """As the presets ``-mt5-250k`` have for mT5's 250,100 pieces."""
    texts = ["a lime dune", "a red square"] * 9
    mt5 = train_tokenizer(texts, tmp_path / "mt5.model", vocab_size=24, style="mt5")
    full = with_sentinels(mt5, tmp_path / "full.model", 10)
    sizes = {"vocab_size": mt5.vocab_size, "eos_id": 1}
    run = config(f"data.tokenizer={full.model_file}", "data.tokenizer_style=mt5", text=sizes)
    with process_group() as ranks:
        for _ in range(2):  # the second start, too
            found = tokenizer(run, None, architecture(run, None), ranks)
            assert found.model_file == tmp_path / "run" / TOKENIZER_FILE and found.vocab_size == mt5.vocab_size
            assert torch.equal(found.encode(texts), mt5.encode(texts))
        run = config(f"data.tokenizer={full.model_file}", "data.tokenizer_style=mt5", text={**sizes, "vocab_size": 12})
        with pytest.raises(UserError, match=f"{full.vocab_size} token ids, but model.text.vocab_size=12: raise it"):
            tokenizer(run, None, architecture(run, None), ranks)


def wrap(path, prefix):
    """Save the weights as those of a wrapped model, with a one-element scale."""
    weights = load_file(path)
    weights["logit_scale"] = weights["logit_scale"].reshape(1)
    save_file({prefix(name): tensor for name, tensor in weights.items()}, path)


WRAPPERS = {
    "distributed": lambda name: f"module.{name}",
    "compiled": lambda name: f"_orig_mod.{name}",
    "both": lambda name: f"module._orig_mod.{name}",
    "compiled blocks": lambda name: name.replace("blocks.1.", "blocks.1._orig_mod."),
}


@pytest.mark.parametrize("prefix", WRAPPERS.values(), ids=WRAPPERS)
def test_weights_of_wrapped_models(trained, tmp_path, prefix):
    folder, clip = trained
    exported = {kind: convert(folder, kind, tmp_path / kind) for kind in ("open_clip", "hf")}
    wrap(exported["open_clip"] / "open_clip_model.safetensors", prefix)
    wrap(exported["hf"] / "model.safetensors", prefix)
    for kind, source in exported.items():
        same_weights(load_clip(convert(source, "mc2", tmp_path / f"{kind}_back"))[0], clip)
    wrap(folder / "model.00000.safetensors", prefix)
    ours = build_clip(clip.arch, seed=0)
    load_weights(ours, folder)
    same_weights(ours, clip)


def test_one_weight_twice_is_refused(tmp_path):
    save_file({"a.b": torch.zeros(1), "module.a.b": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="'a.b' and 'module.a.b' are the same weight"):
        UnwrappedTensorFiles(tmp_path, "model")
