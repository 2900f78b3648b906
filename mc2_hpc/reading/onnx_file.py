"""ONNX graphs: what a file says of itself, and the one way to have onnxruntime run it.

A graph may keep weights in other files, which onnxruntime opens by name. They must be regular files beside the graph:
others are not part of what callers hash, and a named pipe would never end.
"""

import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from mc2_hpc.errors import UserError
from mc2_hpc.reading.files import check_regular, read_bytes, shown

_MOST_BYTES = (1 << 31) - 1
"""Of protobuf."""
_PROVIDERS = ("CUDAExecutionProvider", "CPUExecutionProvider")


class GraphTensor(NamedTuple):
    """An input or output."""

    name: str
    kind: str
    """Of its numbers, in ONNX's words, such as ``FLOAT`` or ``INT64``."""
    shape: tuple[int | str, ...]
    """A size that may vary is its name, or empty."""


class Graph(NamedTuple):
    """What a file says of itself."""

    opset: int
    """Version of ONNX's own operators; 0 if the graph uses none."""
    inputs: tuple[GraphTensor, ...]
    outputs: tuple[GraphTensor, ...]
    data: tuple[Path, ...]
    """Files of weights beside the graph, by name."""


def read_graph(path: Path, *, extra: str, cure: str = "") -> Graph:
    """Read a graph without its weights.

    Args:
        extra: of this package, that has ``onnx``; for the message if it is not installed.
        cure: how to get a good file, for the end of every other message.

    Raises:
        UserError: not a regular file, not ONNX, or a file of weights is missing or not beside the graph.
    """
    onnx: Any = _import("onnx", extra)
    data = read_bytes(path, most=_MOST_BYTES)
    try:
        model = onnx.ModelProto.FromString(data)
    except Exception as error:  # a class of whichever implementation of protobuf is loaded
        raise _not_onnx(path, error, cure) from None
    tail = f"; {cure}" if cure else ""
    names = sorted(set(_locations(model, onnx.TensorProto)))
    for name in names:
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise UserError(
                f"{shown(path)}: keeps weights in {shown(name)[:200]!r}, which is not a file beside it{tail}"
            )
        check_regular(path.parent / name)
    weights = {weight.name for weight in model.graph.initializer}
    opsets = [entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")]
    return Graph(
        opset=max(opsets, default=0),
        # Before version 4 of the format, weights are also inputs.
        inputs=tuple(_tensor(found, onnx) for found in model.graph.input if found.name not in weights),
        outputs=tuple(_tensor(found, onnx) for found in model.graph.output),
        data=tuple(path.parent / name for name in names),
    )


def open_session(path: Path, *, threads: int, extra: str, gpu: bool = False, cure: str = "") -> Any:
    """An ``onnxruntime.InferenceSession`` of a graph that :func:`read_graph` accepts.

    Args:
        threads: for one operator on the CPU; operators run one after another.
        extra, cure: as in :func:`read_graph`.
        gpu: run on a GPU if onnxruntime can.

    Raises:
        UserError: see :func:`read_graph`, or onnxruntime is not installed or cannot load it.
    """
    onnxruntime: Any = _import("onnxruntime", extra)
    read_graph(path, extra=extra, cure=cure)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3  # errors, which are raised as well
    wanted = _PROVIDERS if gpu else _PROVIDERS[1:]
    providers = [name for name in wanted if name in onnxruntime.get_available_providers()]
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=providers)
    except Exception as error:  # onnxruntime has a class for each of its error codes, without a common base
        raise _not_onnx(path, error, cure) from None


def runs_on_gpu(session: Any) -> bool:
    """Whether a session runs on a GPU."""
    return bool(session.get_providers()[0] == _PROVIDERS[0])


def _import(name: str, extra: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise UserError(f"ONNX models need {name} ({error}): pip install 'mc2_hpc[{extra}]'") from None


def _not_onnx(path: Path, error: Exception, cure: str) -> UserError:
    reason = shown(" ".join(str(error).split()))[:200]
    return UserError(f"{shown(path)}: cannot be loaded as ONNX ({reason})" + (f"; {cure}" if cure else ""))


def _tensor(found: Any, onnx: Any) -> GraphTensor:
    tensor = found.type.tensor_type
    shape = [dim.dim_value if dim.HasField("dim_value") else dim.dim_param for dim in tensor.shape.dim]
    return GraphTensor(found.name, onnx.TensorProto.DataType.Name(tensor.elem_type), tuple(shape))


def _locations(message: Any, tensor_class: Any) -> Iterator[str]:
    """Where the tensors of a message are kept that are not in it: weights, constants, and those of inner graphs."""
    if isinstance(message, tensor_class):
        if message.data_location == tensor_class.EXTERNAL:
            yield next((entry.value for entry in message.external_data if entry.key == "location"), "")
        return
    for field, value in message.ListFields():
        if field.message_type is not None:
            for part in [value] if hasattr(value, "ListFields") else value:
                yield from _locations(part, tensor_class)
