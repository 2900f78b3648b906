"""A run that trains adapters, from the command line: resumes bitwise, and every reader of models gets it folded."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file

import mc2_hpc
from mc2_hpc.conversion.convert import convert
from mc2_hpc.models.clip import CLIP
from mc2_hpc.models.lora import add_adapters, is_adapter
from mc2_hpc.models.weights import load_clip, read_card
from tests.faults.tiny_run import write_config
from tests.training.test_adapting import write_suite
from tests.training.test_cli_train import tensors

pytestmark = pytest.mark.timeout(300)
LORA = ["lora={rank: 4, alpha: 8}", "freeze.logit_scale=true", "optim.ema_decay=0.5", "optim.lr=0.1", "optim.warmup=0"]


@pytest.fixture(scope="module")
def trained(tiny_pool, tmp_path_factory, fork_server, ranks_of):
    """The folder of ``base``, a model of random weights, and of ``run``, which adapted it for 4 steps on two ranks."""
    folder = tmp_path_factory.mktemp("lora")
    config = write_config(folder / "run.yaml", tiny_pool)
    write_suite(folder)
    mc2 = [sys.executable, "-m", "mc2_hpc.cli", "train", str(config)]
    assert fork_server.run([*mc2, f"output={folder}/base", "steps=1", "optim.lr=0"]).returncode == 0
    evaluation = [f"eval.suite={folder}/suite.yaml", "eval.every=4"]
    for run, steps, stage in (("run", 4, 2), ("halves", 2, 2), ("halves", 4, 2)):
        options = [f"output={folder}/{run}", f"model.init_from={folder}/base", *LORA, "optim.schedule=constant"]
        ranks_of(
            2, "-m", "mc2_hpc.cli", "train", config, *options, f"steps={steps}", f"zero.stage={stage}", *evaluation
        )
    return folder


def checkpoint(run):
    return run / "checkpoints" / "step-00000004"


def test_only_the_adapters_change(trained):
    base, run = (
        tensors(path, "model") for path in (trained / "base/checkpoints/step-00000001", checkpoint(trained / "run"))
    )
    assert all(torch.equal(run[name], weight) for name, weight in base.items())
    adapters = {name for name in run if is_adapter(name)}
    assert set(run) == set(base) | adapters and all(run[name].any() for name in adapters)
    moments = set(tensors(checkpoint(trained / "run"), "optimizer"))
    assert moments == {f"{name}.{moment}" for name in adapters for moment in ("exp_avg", "exp_avg_sq")}
    assert set(tensors(checkpoint(trained / "run"), "ema")) == adapters


def test_it_resumes_bitwise(trained):
    for prefix in ("model", "optimizer", "ema"):
        whole, halves = (tensors(checkpoint(trained / run), prefix) for run in ("run", "halves"))
        assert whole.keys() == halves.keys()
        assert all(torch.equal(halves[name], tensor) for name, tensor in whole.items())


def unfolded(folder, ema):
    """The model as it was trained."""
    card = read_card(folder)
    with torch.device("meta"):
        model = CLIP(card.arch)
        add_adapters(model, card.lora)
    state = tensors(folder, "model")
    model.load_state_dict(state | (tensors(folder, "ema") if ema else {}), assign=True)
    return model


@pytest.mark.parametrize("ema", [False, True])
def test_every_format_is_the_same_function(trained, tmp_path, open_clip, ema):
    """Logits to 1e-6 of what was trained, through open_clip, transformers, our own format, and ``mc2_hpc.load``."""
    source = checkpoint(trained / "run")
    model = unfolded(source, ema)
    images = torch.randn(3, 3, model.arch.vision.image_size, model.arch.vision.image_size)
    tokens = torch.tensor([[5, 9, 2, 1], [7, 8, 11, 2], [6, 2, 1, 1]])
    with torch.no_grad():
        image, text, scale = model(images, tokens)
        expected = image @ text.T
    folders = {to: convert(source, to, tmp_path / to, ema=ema) for to in ("mc2", "open_clip", "hf")}
    assert read_card(folders["mc2"]).lora is None and set(tensors(folders["mc2"], "model")) == {
        name for name in model.state_dict() if not is_adapter(name)
    }
    back = convert(folders["hf"], "mc2", tmp_path / "back")
    for folder in (folders["mc2"], back):
        with torch.no_grad():
            image, text, _ = load_clip(folder)[0](images, tokens)
        assert (image @ text.T - expected).abs().max() <= 1e-6
    theirs = open_clip.create_model(f"local-dir:{folders['open_clip']}").eval()
    with torch.no_grad():
        found = theirs.encode_image(images, normalize=True)
    assert (found - image).abs().max() <= 1e-6
    words = ["a red house", "ein rotes Haus"]
    loaded = [mc2_hpc.load(folder, device="cpu").encode_text(words) for folder in folders.values()]
    direct = mc2_hpc.load(source, device="cpu", ema=ema).encode_text(words)
    assert all((each - direct).abs().max() <= 1e-6 for each in loaded)


def test_evaluation_scores_the_adapted_model(trained, fork_server):
    mc2 = [sys.executable, "-m", "mc2_hpc.cli", "eval", str(trained / "run"), "--suite", str(trained / "suite.yaml")]
    result = fork_server.run([*mc2, "--out", str(trained / "scores")])
    assert result.returncode == 0, result.stderr
    scored = json.loads((trained / "scores/results.json").read_text())
    (during,) = map(json.loads, (trained / "run/evaluations.jsonl").read_text().splitlines())
    assert scored["sets"]["pets"]["mean"] == during["sets"]["pets"]["mean"]


def test_a_new_run_starts_from_the_folded_weights(trained, fork_server):
    mc2 = [sys.executable, "-m", "mc2_hpc.cli", "train", str(trained / "run.yaml"), "steps=1", "optim.lr=0"]
    result = fork_server.run([*mc2, f"output={trained}/next", f"model.init_from={trained}/run"])
    assert result.returncode == 0, result.stderr
    (file,) = (trained / "next/checkpoints/step-00000001").glob("model.*.safetensors")
    folded = load_clip(checkpoint(trained / "run"))[0].state_dict()
    assert all(torch.equal(tensor, folded[name]) for name, tensor in load_file(file).items())


def test_another_rank_is_refused_in_one_line(trained, fork_server):
    mc2 = [sys.executable, "-m", "mc2_hpc.cli", "train", str(trained / "run.yaml"), "steps=5", *LORA[1:]]
    options = [f"output={trained}/run", f"model.init_from={trained}/base"]
    result = fork_server.run([*mc2, *options, "lora.rank=100"])
    assert result.returncode == 2 and "lora.rank=100: the vision tower is only" in result.stderr
    result = fork_server.run([*mc2, *options, "lora.rank=3"])
    assert result.returncode == 2 and "now it is lora={rank: 3," in result.stderr
