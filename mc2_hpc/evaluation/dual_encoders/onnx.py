"""Models exported to ONNX, run by onnxruntime on the CPU."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from mc2_hpc.conversion.onnx_facts import read_onnx_facts
from mc2_hpc.conversion.peers import import_onnxruntime
from mc2_hpc.data.crop import Encoded
from mc2_hpc.data.decode import EvalTransform
from mc2_hpc.data.normalise import normalise
from mc2_hpc.data.tokenizer import Tokenizer
from mc2_hpc.errors import UserError
from mc2_hpc.evaluation.dual_encoders.protocol import ModelFacts, folder_files, hash_files
from mc2_hpc.reading.files import check_regular, shown


class Graph(nn.Module):
    """One tower's graph."""

    def __init__(self, path: Path, input_name: str) -> None:
        """
        Raises:
            UserError: onnxruntime is not installed or cannot load the file, or the graph has no such input.
        """
        super().__init__()
        runtime = import_onnxruntime()
        check_regular(path)
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        try:
            self._session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its own classes share no other base
            reason = shown(" ".join(str(error).split()))
            raise UserError(f"{path}: onnxruntime cannot load it: {reason}; export the model again") from None
        found = [given.name for given in self._session.get_inputs()]
        if found != [input_name]:
            raise UserError(
                f"{path}: its inputs are {', '.join(found)[:200]}, not {input_name}; export the model again"
            )
        self._input = input_name

    def forward(self, inputs: Tensor) -> Tensor:
        (features,) = self._session.run(None, {self._input: inputs.cpu().numpy()})
        return torch.from_numpy(features)


class OnnxEncoder:
    """An ONNX folder; preprocessed images are uint8 (3, S, S), as for our own models."""

    def __init__(self, source: Path, device: torch.device, eval_resize: str | None) -> None:
        """
        Args:
            device: ignored: the graphs run on the CPU.

        Raises:
            UserError: onnxruntime is not installed, a file is missing or damaged, or the resize is not supported.
        """
        facts = read_onnx_facts(source)
        image, text = facts.image, facts.text
        resize = eval_resize or image.resize
        self._to_square = EvalTransform(image.size, resize)
        self.tokenizer = Tokenizer(source / text.tokenizer.file, text.tokenizer.style, text.context_length)
        self.model: nn.Module = nn.ModuleDict(
            {"image": Graph(source / image.file, image.input), "text": Graph(source / text.file, text.input)}
        ).eval()
        self._scale, self._bias = facts.logit_scale, facts.logit_bias
        self.identity = hash_files(folder_files(source), eval_resize)
        self.facts = ModelFacts(
            format="onnx",
            image_size=image.size,
            resize=resize,
            context_length=text.context_length,
            parameters=facts.parameters,
        )

    def preprocess(self, image: Encoded | Image.Image) -> Tensor:
        return self._to_square(image)

    def transform(self, image: Image.Image) -> Tensor:
        return normalise(self.preprocess(image)[None])[0]

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        return self.tokenizer.encode(texts)

    def encode_images(self, images: Sequence[Tensor]) -> Tensor:
        return self._run("image", normalise(torch.stack(list(images))))

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        return self._run("text", self.tokenize(texts))

    def logits(self) -> tuple[float, float]:
        return self._scale, self._bias

    def _run(self, tower: str, inputs: Tensor) -> Tensor:
        graph: Any = self.model[tower]  # type: ignore[index]
        return graph(inputs)
