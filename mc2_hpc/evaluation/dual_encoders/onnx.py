"""Models exported to ONNX, run by onnxruntime on the CPU."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from mc2_hpc.conversion.onnx_facts import CURE, EXTRA, ImageFacts, TextFacts, check_graphs, read_onnx_facts
from mc2_hpc.data.crop import Encoded
from mc2_hpc.data.decode import EvalTransform
from mc2_hpc.data.normalise import normalise
from mc2_hpc.data.tokenizer import Tokenizer
from mc2_hpc.evaluation.dual_encoders.protocol import ModelFacts, check_weight_files, folder_files, hash_files
from mc2_hpc.reading.onnx_file import open_session


class Graph(nn.Module):
    """One tower's graph."""

    def __init__(self, folder: Path, tower: ImageFacts | TextFacts) -> None:
        """On as many threads as torch uses.

        Raises:
            UserError: onnxruntime is not installed or cannot load the graph.
        """
        super().__init__()
        self._session = open_session(folder / tower.file, threads=torch.get_num_threads(), extra=EXTRA, cure=CURE)
        self._input = tower.input

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
            UserError: onnx or onnxruntime is not installed, a file is missing or damaged, a graph is not as
                ``onnx_model.json`` says, or the resize is not supported.
        """
        facts = read_onnx_facts(source)
        check_weight_files(source)
        check_graphs(source, facts)
        image, text = facts.image, facts.text
        resize = eval_resize or image.resize
        self._to_square = EvalTransform(image.size, resize)
        self.tokenizer = Tokenizer(source / text.tokenizer.file, text.tokenizer.style, text.context_length)
        self.model: nn.Module = nn.ModuleDict({"image": Graph(source, image), "text": Graph(source, text)}).eval()
        self.device = torch.device("cpu")
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
