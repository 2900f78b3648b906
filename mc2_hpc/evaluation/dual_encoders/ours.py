"""A checkpoint or run folder of ours."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from mc2_hpc.data.card_tokenizer import load_tokenizer
from mc2_hpc.data.crop import Encoded
from mc2_hpc.data.decode import EvalTransform
from mc2_hpc.data.normalise import normalise
from mc2_hpc.data.tokenizer import Tokenizer
from mc2_hpc.evaluation.dual_encoders.protocol import ModelFacts, count_parameters, hash_files
from mc2_hpc.models.average import AVERAGE
from mc2_hpc.models.clip import CLIP
from mc2_hpc.models.weights import TOKENIZER_FILE, ModelCard, load_clip, resolve_checkpoint
from mc2_hpc.reading.json_file import Count, Foreign, read_json

_TRAINER = "trainer.json"


@dataclass(frozen=True)
class OurCaptions:
    """Token ids alone."""

    tokenizer: Tokenizer

    @property
    def pads(self) -> tuple[int]:
        return (self.tokenizer.pad_id,)

    def __call__(self, texts: Sequence[str]) -> Tensor:
        return self.tokenizer.encode(texts)[:, None]


class OurEncoder:
    """One of our models; preprocessed images are uint8 (3, S, S), normalised on the device."""

    def __init__(
        self,
        model: CLIP,
        card: ModelCard,
        tokenizer: Tokenizer,
        *,
        eval_resize: str | None = None,
        identity: str = "",
        step: int | None = None,
    ) -> None:
        """
        Args:
            model: on the device that it computes on.
            eval_resize: ``shortest`` or ``squash``; None is the card's.
            identity: of the weights; empty if nothing is cached under it.
            step: training steps so far.

        Raises:
            UserError: an unknown ``eval_resize``.
        """
        vision, resize = card.arch.vision, eval_resize or card.arch.eval_resize
        self.model = model
        self.tokenizer = tokenizer
        self.identity = identity
        self.facts = ModelFacts(
            format="mc2",
            image_size=vision.image_size,
            resize=resize,
            context_length=card.arch.text.context_length,
            parameters=count_parameters(model),
            vision_width=vision.width,
            patch_size=vision.patch_size,
            step=step,
        )
        self._to_square = EvalTransform(vision.image_size, resize)

    @classmethod
    def load(cls, source: Path, device: torch.device, eval_resize: str | None, *, ema: bool = False) -> "OurEncoder":
        """
        Args:
            ema: take the moving average of the weights.

        Raises:
            UserError: there is no checkpoint, or it has no tokenizer or no moving average.
        """
        folder = resolve_checkpoint(source)
        model, card = load_clip(folder, ema=ema)
        tokenizer = load_tokenizer(folder, card)
        files = [*folder.glob("model.*safetensors"), folder / TOKENIZER_FILE]
        if ema:
            files += folder.glob(f"{AVERAGE}.*safetensors")
        identity = hash_files(files, card, eval_resize or card.arch.eval_resize)
        step = _step(folder)
        return cls(model.to(device), card, tokenizer, eval_resize=eval_resize, identity=identity, step=step)

    def preprocess(self, image: Encoded | Image.Image) -> Tensor:
        return self._to_square(image)

    def transform(self, image: Image.Image) -> Tensor:
        return normalise(self.preprocess(image)[None])[0]

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        return self.tokenizer.encode(texts)

    def encode_images(self, images: Sequence[Tensor]) -> Tensor:
        return self.encode_pixels(torch.stack(list(images)).to(self.device))

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        return self.model.encode_image(normalise(pixels), normalize=True).float()

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        return self.encode_tokens(self.captions(texts).to(self.device))

    @property
    def captions(self) -> OurCaptions:
        return OurCaptions(self.tokenizer)

    def encode_tokens(self, tokens: Tensor, lengths: Sequence[int] | None = None) -> Tensor:
        """As in the protocol; with the ``lengths`` of the captions, without computing their padding."""
        return self.model.encode_text(tokens[:, 0], normalize=True, lengths=lengths).float()

    def logits(self) -> tuple[float, float]:
        scale, bias = self.model.logit_scale, self.model.logit_bias
        return float(scale.detach().float().exp()), 0.0 if bias is None else float(bias.detach().float())

    @property
    def device(self) -> torch.device:
        return self.model.logit_scale.device


def _step(folder: Path) -> int | None:
    """The training steps of a checkpoint; None for an imported model."""
    path = folder / _TRAINER
    if not path.is_file():
        return None
    return read_json(path, _TrainerState, cure="the checkpoint is damaged").step


class _TrainerState(Foreign):
    step: Count
