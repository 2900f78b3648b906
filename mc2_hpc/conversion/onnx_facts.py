"""``onnx_model.json``: what a program must do before and after the graphs of an ONNX folder.

It is enough to run the model without this package: ``examples/onnx_zero_shot.py`` does that.
"""

from pathlib import Path
from typing import Literal

from mc2_hpc.data.normalise import MEAN, STD
from mc2_hpc.data.tokenizer import STYLES
from mc2_hpc.errors import UserError
from mc2_hpc.models.formats import ONNX_CONFIG
from mc2_hpc.models.weights import TOKENIZER_FILE, ModelCard
from mc2_hpc.reading.json_file import Count, File, Name, Size, read_json
from mc2_hpc.reading.onnx_file import Graph, GraphTensor, read_graph

OPSET = 18
"""Version of ONNX's operators: onnxruntime 1.14 and later run it."""
EXTRA = "onnx"
"""Of this package, with what exporting and running these folders needs."""
CURE = "export the model again"

Cleaning = Literal["lower_case", "drop_ascii_punctuation", "collapse_white_space"]

CLEANING: dict[str, list[Cleaning]] = {
    "xlmv": [],
    "mt5": ["lower_case", "drop_ascii_punctuation", "collapse_white_space"],
    "gemma": ["lower_case"],
}
"""What happens to a caption before sentencepiece, by style (``clean`` in ``mc2_hpc.data.tokenizer``)."""


class ImageFacts(File):
    """From a decoded image to the image tower's input, and its output."""

    file: Name
    input: str
    """Float32 (batch, 3, size, size), RGB."""
    output: str
    """Float32 (batch, embed_dim), of unit length."""
    size: Size
    """Side in pixels."""
    resize: Literal["shortest", "squash"]
    """``shortest``: the shorter side becomes ``size`` (the other is rounded down), then the centre is cropped, from
    round((side - size) / 2); ``squash``: both sides become ``size``."""
    interpolation: Literal["bicubic"]
    """With antialias, as in Pillow."""
    mean: list[float]
    std: list[float]
    """Per channel: ``(value / 255 - mean) / std``."""


class TokenizerFacts(File):
    """How a caption becomes ids: ``[*prefix, *pieces, eos]``, then ``pad``."""

    file: Name
    """A sentencepiece model."""
    style: Literal["xlmv", "mt5", "gemma"]
    clean: list[Cleaning]
    """Steps before sentencepiece, in this order."""
    shift: Count
    """Added to the file's ids."""
    file_unk: Count
    """The file's id of an unknown piece, which becomes ``unk`` instead."""
    unk: Count
    prefix: list[Count]
    eos: Count
    pad: Count


class TextFacts(File):
    """From a caption to the text tower's input, and its output."""

    file: Name
    input: str
    """Int64 (batch, tokens), with one EOS in each row; what follows it has no effect."""
    output: str
    """Float32 (batch, embed_dim), of unit length."""
    context_length: Size
    """Most tokens in a row, special ones included; longer captions are cut, and the EOS kept."""
    tokenizer: TokenizerFacts


class OnnxFacts(File):
    """``onnx_model.json``."""

    opset: Size
    weights: Literal["fp32", "int8"]
    embed_dim: Size
    parameters: Size
    logit_scale: float
    """Times the cosine of an image and a text, plus ``logit_bias``: their logit."""
    image: ImageFacts
    text: TextFacts
    logit_bias: float = 0.0
    """Not 0 for models of the sigmoid loss: the probability that image and text match is the sigmoid of their logit."""


def onnx_facts(card: ModelCard, *, logit_scale: float, logit_bias: float, parameters: int, int8: bool) -> OnnxFacts:
    """The facts about a model, with the names of files that this package writes."""
    arch, style = card.arch, STYLES[card.tokenizer_style]
    return OnnxFacts(
        opset=OPSET,
        weights="int8" if int8 else "fp32",
        embed_dim=arch.embed_dim,
        parameters=parameters,
        logit_scale=logit_scale,
        logit_bias=logit_bias,
        image=ImageFacts(
            file="image.onnx",
            input="pixel_values",
            output="image_features",
            size=arch.vision.image_size,
            resize=arch.eval_resize,  # type: ignore[arg-type]  # the architecture checks it
            interpolation="bicubic",
            mean=list(MEAN),
            std=list(STD),
        ),
        text=TextFacts(
            file="text.onnx",
            input="input_ids",
            output="text_features",
            context_length=arch.text.context_length,
            tokenizer=TokenizerFacts(
                file=TOKENIZER_FILE,
                style=card.tokenizer_style,  # type: ignore[arg-type]  # the card is typed where it is read
                clean=CLEANING[card.tokenizer_style],
                shift=style.shift,
                file_unk=style.model_ids["unk"],
                unk=style.unk,
                prefix=list(style.prefix),
                eos=style.eos,
                pad=style.pad,
            ),
        ),
    )


def read_onnx_facts(folder: Path) -> OnnxFacts:
    """Read the facts of an ONNX folder.

    Raises:
        UserError: the file is missing or damaged.
    """
    return read_json(folder / ONNX_CONFIG, OnnxFacts, cure=CURE)


def check_graphs(folder: Path, facts: OnnxFacts) -> None:
    """Check that the graphs of a folder are those that its facts describe.

    Raises:
        UserError: onnx is not installed, a graph cannot be read, its operators have another version, its input or
            output has another name, type or shape, or its weights are in a file of another name.
    """
    image, text = facts.image, facts.text
    for tower, kind, shape in (
        (image, "FLOAT", (None, 3, image.size, image.size)),
        (text, "INT64", (None, None)),
    ):
        path = folder / tower.file
        graph = read_graph(path, extra=EXTRA, cure=CURE)
        wrong = _difference(graph, facts, tower, kind, shape)
        if wrong:
            raise UserError(f"{path}: {wrong}; {CURE}")


def _difference(
    graph: Graph, facts: OnnxFacts, tower: ImageFacts | TextFacts, kind: str, shape: tuple[int | None, ...]
) -> str:
    """In what a graph differs from the facts; empty if in nothing. A size of None varies."""
    if graph.opset != facts.opset:
        return f"its operators are of version {graph.opset}, not {facts.opset} as {ONNX_CONFIG} says"
    for end, found, name, numbers, sizes in (
        ("input", graph.inputs, tower.input, kind, shape),
        ("output", graph.outputs, tower.output, "FLOAT", (None, facts.embed_dim)),
    ):
        if len(found) != 1 or not _fits(found[0], name, numbers, sizes):
            wanted = f"{name}: {numbers} {_shown(sizes)}"
            there = ", ".join(f"{one.name}: {one.kind} {_shown(one.shape)}" for one in found)[:200]
            return f"its {end} is {there or 'missing'}, not {wanted} as {ONNX_CONFIG} says"
    others = [path.name for path in graph.data if path.name != f"{tower.file}.data"]
    return f"its weights are in {others[0]}, not {tower.file}.data" if others else ""


def _fits(found: GraphTensor, name: str, kind: str, sizes: tuple[int | None, ...]) -> bool:
    if (found.name, found.kind, len(found.shape)) != (name, kind, len(sizes)):
        return False
    return all(
        isinstance(there, str) if wanted is None else there == wanted
        for there, wanted in zip(found.shape, sizes, strict=True)
    )


def _shown(sizes: tuple[int | str | None, ...]) -> str:
    return f"({', '.join(str(size) if size else '*' for size in sizes)})"
