"""Captions without padding, compared with the same model on padded captions: text tower, and a whole training step.

    mc2 bench packing [--quick] [--json FILE]

Multi30k's captions in four languages, for a ViT-B/32-shaped model of fewer layers; and the quickstart's captions and
model, a small one. Both contenders are the same weights and batches, padded and packed alternately in one process.
``computed_per_token`` is the rows that the text tower computed over the tokens that the captions have.
"""

import gzip
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.curation_corpus import SHARED_DATA
from benchmarks.harness import alternate, main, spread
from mc2_hpc.config import RunConfig, config_from_dict, config_to_dict, load_config
from mc2_hpc.data.tokenizer import Tokenizer, train_tokenizer
from mc2_hpc.distributed import Ranks, process_group
from mc2_hpc.models.clip import CLIP, build_clip
from mc2_hpc.models.packed_captions import caption_lengths
from mc2_hpc.models.presets import resolve
from mc2_hpc.precision import Precision
from mc2_hpc.quickstart.captions import LANGUAGES, draw_caption, number_names
from mc2_hpc.quickstart.recipe import Recipe, write_training_config
from mc2_hpc.training.engine import Engine
from mc2_hpc.training.step import ContrastiveStep

WHO = ("packed", "padded")


@dataclass(frozen=True)
class _Case:
    captions: str
    texts: Sequence[str]
    vocab_size: int
    model: dict[str, Any]
    batch: int


def run(quick: bool) -> dict[str, Any]:
    """Seconds of the text tower and of a step, by captions and by whether they are packed."""
    rows: list[dict[str, Any]] = []
    ratios: dict[str, float] = {}
    config: dict[str, Any] = {"cases": {}}
    with tempfile.TemporaryDirectory() as name, process_group(60) as ranks:
        for case in _cases(quick, Path(name)):
            tokenizer = train_tokenizer(
                case.texts, Path(name) / f"{case.captions}.model", vocab_size=case.vocab_size, style="xlmv"
            )
            config["cases"][case.captions] = {"model": case.model, "batch": case.batch, "vocab_size": case.vocab_size}
            for what, seconds, computed in _measure(case, tokenizer, ranks, rounds=3 if quick else 9):
                for who in WHO:
                    numbers = {"unit": "s", **spread(seconds[who]), "samples": seconds[who]}
                    key = {"captions": case.captions, "what": what, "who": who}
                    rows.append({**key, **numbers, "computed_per_token": computed[who]})
                pairs = zip(seconds["padded"], seconds["packed"], strict=True)
                ratios[f"{case.captions}_{what}_vs_padded"] = statistics.median(a / b for a, b in pairs)
    return {"config": config, "rows": rows, "ratios": ratios}


def _cases(quick: bool, folder: Path) -> Iterator[_Case]:
    layers = {"layers": 1 if quick else 4}
    model = {"preset": "ViT-B-32-worldwide", "vision": layers, "text": layers}
    yield _Case("multi30k", _multi30k()[: 4000 if quick else None], 8000, model, batch=32 if quick else 256)
    rng, names = np.random.default_rng(0), number_names()
    texts = [draw_caption(lang, name, rng) for _ in range(4) for lang in LANGUAGES for name in names[lang]]
    recipe = Recipe()
    write_training_config(folder / "quickstart.yaml", recipe, folder, recipe.vocab_size)
    model = config_to_dict(load_config(folder / "quickstart.yaml"))["model"]
    yield _Case("quickstart", texts, recipe.vocab_size, model, batch=recipe.global_batch)


def _multi30k() -> list[str]:
    """Each caption of the training set in one of its languages, in turn."""
    paths = [SHARED_DATA / "multi30k" / f"train.{lang}.gz" for lang in ("en", "de", "fr", "cs")]
    if not all(path.is_file() for path in paths):
        raise SystemExit(f"mc2 bench packing: needs Multi30k's captions in {SHARED_DATA / 'multi30k'}")
    languages = [gzip.decompress(path.read_bytes()).decode().splitlines() for path in paths]
    return [captions[row % len(languages)] for row, captions in enumerate(zip(*languages, strict=True))]


def _run_config(case: _Case, vocab_size: int) -> RunConfig:
    text = {**case.model.get("text", {}), "vocab_size": vocab_size}
    return config_from_dict(
        {
            "global_batch": case.batch,
            "precision": "bf16" if torch.cuda.is_available() else "fp32",
            "model": {**case.model, "text": text},
            "data": {"lanes": 1},
            "zero": {"stage": 1},
        },
        "benchmark",
    )


def _measure(
    case: _Case, tokenizer: Tokenizer, ranks: Ranks, *, rounds: int
) -> Iterator[tuple[str, dict[str, list[float]], dict[str, float]]]:
    """(what, seconds by contender, rows computed per token by contender) of the text tower and of a step."""
    config = _run_config(case, tokenizer.vocab_size)
    precision = Precision(config.precision)
    alone, trained = (build_clip(resolve(config.model), seed=0) for _ in range(2))
    for clip in (alone, trained):
        clip.set_backends(config.model, ranks.device.type)
    alone.to(ranks.device)
    engine = Engine(trained, config, ranks, num_micro=1)
    step = ContrastiveStep(engine, config.loss, feature_dtype=precision.dtype)
    size = trained.arch.vision.image_size
    images = torch.zeros((case.batch, 3, size, size), dtype=torch.uint8, device=ranks.device)

    def tower(tokens: Tensor, lengths: Sequence[int] | None) -> None:
        with precision.autocast(ranks.device):
            features = alone.encode_text(tokens.to(ranks.device), lengths=lengths)
        torch.autograd.grad(features.sum(), list(alone.text.parameters()))

    def whole(tokens: Tensor, lengths: Sequence[int] | None) -> None:
        step(images, tokens, config.optim.lr, lengths=lengths)

    for what, clip, call in (("text_tower", alone, tower), ("step", trained, whole)):
        batches = [_batch(case, tokenizer, number) for number in range(rounds + 1)]
        contenders = {
            "packed": _Contender(clip, call, batches),
            "padded": _Contender(clip, call, [(tokens, None) for tokens, _ in batches]),
        }
        seconds = alternate(contenders, rounds=rounds)
        num_tokens = sum(sum(lengths) for _, lengths in batches)
        yield what, seconds, {who: contender.computed / num_tokens for who, contender in contenders.items()}
    engine.close()


def _batch(case: _Case, tokenizer: Tokenizer, number: int) -> tuple[Tensor, list[int]]:
    """Token ids on the host, as a loader delivers them, and the lengths of the captions."""
    chosen = np.random.default_rng(number).integers(0, len(case.texts), case.batch)
    tokens = tokenizer.encode([case.texts[index] for index in chosen])
    return tokens, caption_lengths(tokens, tokenizer.eos_id)


class _Contender:
    """Each call takes the next batch; ``computed`` counts the rows that the text tower's blocks compute."""

    def __init__(
        self,
        clip: CLIP,
        call: Callable[[Tensor, Sequence[int] | None], None],
        batches: Sequence[tuple[Tensor, Sequence[int] | None]],
    ) -> None:
        self.computed = 0
        self._mlp = clip.text.transformer.blocks[0].fc
        self._call = call
        self._batches = iter(batches)

    def __call__(self) -> None:
        hook = self._mlp.register_forward_pre_hook(self._count)
        self._call(*next(self._batches))
        hook.remove()

    def _count(self, module: object, inputs: tuple[Tensor]) -> None:
        self.computed += inputs[0].shape[:-1].numel()


if __name__ == "__main__":
    main("packing", run)
