"""Folders that onnxruntime runs: a graph for each tower, the tokenizer, and the facts around them.

    image.onnx, image.onnx.data    normalised pixels to unit-length features
    text.onnx, text.onnx.data      token ids to unit-length features
    tokenizer.model                the sentencepiece model
    onnx_model.json                preprocessing, logit scale and bias (mc2_hpc.conversion.onnx_facts)

Batch size and number of tokens are dynamic. Weights lie beside the graphs, because a graph file has at most 2 GiB.
"""

import logging
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mc2_hpc.conversion.model_folder import read_model
from mc2_hpc.conversion.onnx_facts import OPSET, check_graphs, onnx_facts
from mc2_hpc.conversion.peers import import_onnx
from mc2_hpc.models.clip import CLIP
from mc2_hpc.models.formats import ONNX_CONFIG
from mc2_hpc.models.presets import num_parameters
from mc2_hpc.models.text import TextTower
from mc2_hpc.models.vision import VisionTower
from mc2_hpc.models.weights import load_clip
from mc2_hpc.storage import write_json


def export(checkpoint: Path, out: Path, *, int8: bool) -> None:
    """Write the model of a checkpoint or run folder into ``out``, an existing empty folder.

    Args:
        int8: quantise the weights of matrix products and the token table to 8 bits.

    Raises:
        UserError: no checkpoint there, or the packages of the extra ``onnx`` are not installed.
    """
    import_onnx()
    card, files, tokenizer_file = read_model(checkpoint)
    model, _ = load_clip(checkpoint)
    scale = float(files.get_fp32("logit_scale").exp())
    bias = float(files.get_fp32("logit_bias")) if card.arch.logit_bias else 0.0
    facts = onnx_facts(card, logit_scale=scale, logit_bias=bias, parameters=num_parameters(card.arch), int8=int8)
    plain = out / "fp32"
    plain.mkdir()
    export_image_tower(model, plain / facts.image.file, (facts.image.input, facts.image.output))
    export_text_tower(model, plain / facts.text.file, (facts.text.input, facts.text.output))
    if int8:
        for name in (facts.image.file, facts.text.file):
            quantise(plain / name, out / name)
    else:
        for path in plain.iterdir():
            path.rename(out / path.name)
    shutil.rmtree(plain)
    shutil.copyfile(tokenizer_file, out / facts.text.tokenizer.file)
    write_json(out / ONNX_CONFIG, msgspec.to_builtins(facts))
    check_graphs(out, facts)


class _UnitLength(nn.Module):
    """A tower whose embeddings have unit length."""

    def __init__(self, tower: VisionTower | TextTower) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, inputs: Tensor) -> Tensor:
        return F.normalize(self.tower(inputs), dim=-1)


def export_image_tower(model: CLIP, path: Path, names: tuple[str, str]) -> None:
    """Write the image tower's graph, and ``<path>.data`` with its weights.

    Args:
        names: of the graph's input, float32 (batch, 3, S, S), and output, float32 (batch, E).
    """
    side = model.arch.vision.image_size
    _export(model.vision, torch.zeros(2, 3, side, side), {0: torch.export.Dim("batch")}, path, names)


def export_text_tower(model: CLIP, path: Path, names: tuple[str, str]) -> None:
    """Write the text tower's graph, and ``<path>.data`` with its weights.

    Args:
        names: of the graph's input, int64 (batch, tokens), and output, float32 (batch, E).
    """
    longest = model.arch.text.context_length
    dimensions = {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens", max=longest)}
    ids = torch.full((2, min(longest, 8)), model.arch.text.eos_id)
    _export(model.text, ids, dimensions, path, names)


def _export(
    tower: VisionTower | TextTower, example: Tensor, dimensions: dict[int, Any], path: Path, names: tuple[str, str]
) -> None:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's, about itself
        program = torch.onnx.export(
            _UnitLength(tower).eval(),
            (example,),
            input_names=names[:1],
            output_names=names[1:],
            dynamic_shapes=(dimensions,),
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    graph = program.model.graph
    for node in graph:
        node.metadata_props.clear()  # where each line of code lies on this machine
    program.save(str(path), external_data=True)


def quantise(source: Path, target: Path) -> None:
    """Write a graph whose weights are int8 with a scale per output channel, and one for a token table.

    Inputs of matrix products are quantised as they come (dynamic quantisation); norms, softmax and sums stay float32.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with _without_advice():
        quantize_dynamic(
            str(source), str(target), weight_type=QuantType.QInt8, per_channel=True, use_external_data_format=True
        )
    data = target.with_name(f"{target.name}.data")
    data.chmod(target.stat().st_mode)  # onnxruntime creates it as 0600


@contextmanager
def _without_advice() -> Iterator[None]:
    """Hide onnxruntime's advice to run another tool first, which it logs in the root logger's name."""

    def relevant(record: logging.LogRecord) -> bool:
        return "pre-processing before quantization" not in record.getMessage()

    root = logging.getLogger()
    root.addFilter(relevant)
    try:
        yield
    finally:
        root.removeFilter(relevant)
