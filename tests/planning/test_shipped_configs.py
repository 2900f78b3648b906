"""By count, the shipped configs fit into the node of GPUs with 80 GB that their headers name."""

import re
from pathlib import Path

import pytest

from mc2_hpc.config import load_config
from mc2_hpc.planning.machines import read_gpu, read_network
from mc2_hpc.planning.plan import Assumptions, make_plans

CONFIGS = Path(__file__).parents[2] / "configs" / "train"
ONE_NODE = sorted(
    path
    for path in CONFIGS.glob("*.yaml")
    if re.search(r"^# Hardware: (one|1) node (of|x) 8 GPUs", path.read_text(), re.M)
)
GPUS = 8


def test_there_are_such_configs():
    assert len(ONE_NODE) > 10


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("path", ONE_NODE, ids=lambda path: path.stem)
def test_a_node_suffices(path):
    taught = "\ndistill:" in path.read_text()
    gpu = read_gpu("h100")
    (plan,), _ = make_plans(
        [load_config(path, ["distill.teacher=ViT-H-14-worldwide"] if taught else [])],
        gpus=GPUS,
        per_node=GPUS,
        gpu_name="h100",
        gpu=gpu,
        network_name=gpu.network,
        network=read_network(gpu.network),
        assumptions=Assumptions(),
    )
    assert plan.fits, plan.cure
