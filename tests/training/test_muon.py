"""Muon for the matrices of the blocks, from the command line: what it trains, its checkpoints, and resuming.

``test_train_less.py`` compares it with plain PyTorch.
"""

import pytest
import torch

from mc2_hpc.models.clip import CLIP
from mc2_hpc.models.lora import Adapters, add_adapters
from mc2_hpc.models.presets import PRESETS
from mc2_hpc.models.weights import load_clip
from mc2_hpc.training.muon import is_muons
from tests.faults.tiny_run import write_config
from tests.training.test_cli_train import rows, tensors

pytestmark = pytest.mark.timeout(300)


def test_it_trains_the_matrices_of_the_blocks():
    with torch.device("meta"):
        clip = CLIP(PRESETS["ViT-S-16-worldwide"])
    found = {name for name in clip.state_dict() if is_muons(name)}
    blocks = [*clip.vision.transformer.blocks, *clip.text.transformer.blocks]
    assert len(found) == 4 * len(blocks)
    inside = sum(p.numel() for block in blocks for p in block.parameters() if p.ndim == 2)
    assert sum(clip.state_dict()[name].numel() for name in found) == inside
    add_adapters(clip, Adapters(rank=2, alpha=1, vision=True, text=True))
    assert {name for name in clip.state_dict() if is_muons(name)} == found


@pytest.fixture(scope="module")
def trained(ranks_of, tiny_pool, tmp_path_factory):
    """The folder of ``whole``, 6 steps, and of runs that were resumed after 3: ``same`` and, on three ranks at another
    stage, ``other``."""
    folder = tmp_path_factory.mktemp("muon")
    optim = {"matrices": "muon", "lr": 2e-3, "warmup": 2, "schedule": "constant", "ema_decay": 0.9}
    config = write_config(folder / "run.yaml", tiny_pool, optim=optim, log_every=1, micro_batch=8)
    for run, ranks, steps, stage in (
        ("whole", 2, 6, 2),
        ("same", 2, 3, 2),
        ("same", 2, 6, 2),
        ("other", 2, 3, 2),
        ("other", 3, 6, 1),
    ):
        options = [f"output={folder}/{run}", f"steps={steps}", f"zero.stage={stage}"]
        ranks_of(ranks, "-m", "mc2_hpc.cli", "train", config, *options)
    return folder


def last(run):
    return run / "checkpoints" / "step-00000006"


def test_a_checkpoint_has_its_state_by_name(trained):
    state, weights = (tensors(last(trained / "whole"), prefix) for prefix in ("optimizer", "model"))
    kinds = {name: {key.rpartition(".")[2] for key in state if key.startswith(f"{name}.")} for name in weights}
    for name, found in kinds.items():
        assert found == ({"momentum_buffer"} if is_muons(name) else {"exp_avg", "exp_avg_sq"}), name
    for key, tensor in state.items():
        assert tensor.shape == weights[key.rpartition(".")[0]].shape and tensor.any()
    assert tensors(last(trained / "whole"), "ema").keys() == weights.keys()
    load_clip(last(trained / "whole"), ema=True)


def test_it_resumes_bitwise(trained):
    for prefix in ("model", "optimizer", "ema"):
        whole, same = (tensors(last(trained / run), prefix) for run in ("whole", "same"))
        assert whole.keys() == same.keys()
        assert all(torch.equal(same[name], tensor) for name, tensor in whole.items())


def test_it_resumes_on_another_number_of_ranks(trained):
    """At another stage; and it learns."""
    whole, other = rows(trained / "whole"), rows(trained / "other")
    for step in range(4, 7):
        assert other[step]["loss"] == pytest.approx(whole[step]["loss"], rel=1e-2)
    assert other[4]["loss"] == pytest.approx(whole[4]["loss"], rel=1e-5)
    assert whole[6]["loss"] < whole[1]["loss"] - 0.1
