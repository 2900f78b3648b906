"""What the trained model can do, measured on the held-out pictures, and how balancing changed the data."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mc2_hpc.balancing import csr
from mc2_hpc.balancing.folder import BalanceFolder
from mc2_hpc.balancing.selection import keep_probability
from mc2_hpc.curation.match import rows_by_language
from mc2_hpc.curation.matched import entries_of, read_matched
from mc2_hpc.data.evalset import EvalBatches
from mc2_hpc.data.tokenizer import Tokenizer
from mc2_hpc.evaluation.features import DualEncoder, Tokenize, encode_images, encode_texts
from mc2_hpc.evaluation.nearest import nearest
from mc2_hpc.evaluation.prompts import fill
from mc2_hpc.evaluation.retrieval import recall
from mc2_hpc.evaluation.zero_shot import average_templates, top_k_accuracy
from mc2_hpc.models.clip import CLIP
from mc2_hpc.quickstart.captions import LANGUAGES, NUMBERS, TEMPLATES, number_names
from mc2_hpc.quickstart.pool import heldout_place
from mc2_hpc.storage import list_shards

_KS = (1, 5, 10)
_EXAMPLE_LANGUAGES = ("en", "ja", "ar", "ru", "th", "ko", "de", "am", "he", "te")
_HITS = 5


@dataclass(frozen=True)
class Heldout:
    """The held-out set in memory. N pictures.

    Attributes:
        images: uint8 ``(N, 3, S, S)``.
        keys: of each picture.
        captions: language -> the caption of each picture.
    """

    images: Tensor
    keys: list[str]
    captions: dict[str, list[str]]

    @property
    def numbers(self) -> Tensor:
        """int64 (N,): the number each picture shows."""
        return torch.tensor([heldout_place(key)[1] for key in self.keys])

    @property
    def folds(self) -> Tensor:
        """int64 (N,): each fold has one picture of every number."""
        return torch.tensor([heldout_place(key)[0] for key in self.keys])


def read_heldout(folder: Path, image_size: int) -> Heldout:
    """Read and resize all held-out pictures."""
    images: list[Tensor] = []
    keys: list[str] = []
    captions: dict[str, list[str]] = {lang: [] for lang in LANGUAGES}
    for batch in EvalBatches(folder, image_size=image_size, batch=256):
        images.append(batch.images)
        keys += batch.keys
        for texts, langs in zip(batch.texts, batch.langs, strict=True):
            for text, lang in zip(texts, langs, strict=True):
                captions[lang].append(text)
    return Heldout(torch.cat(images), keys, captions)


def evaluate(model: DualEncoder, tokenize: Tokenize, heldout: Heldout, update: Any) -> dict[str, Any]:
    """Zero-shot accuracy and retrieval of every language, and search examples: the report's keys of these names.

    Args:
        update: called with (languages done, languages in all).
    """
    names = number_names()
    images = encode_images(model, heldout.images.split(256))
    zero_shot: dict[str, float] = {}
    per_language: dict[str, dict[str, dict[str, float]]] = {}
    examples = []
    for done, lang in enumerate(LANGUAGES, start=1):
        prompts = fill(TEMPLATES[lang], names[lang])
        # In one call, because most captions are prompts too.
        features = encode_texts(model, tokenize, prompts + heldout.captions[lang])
        weights = average_templates(features[: len(prompts)].view(len(NUMBERS), len(TEMPLATES[lang]), -1))
        zero_shot[lang] = top_k_accuracy(images, weights, heldout.numbers, (1,))[1]
        texts = features[len(prompts) :]
        per_language[lang] = _retrieval(images, texts, heldout.folds)
        if lang in _EXAMPLE_LANGUAGES:
            examples.append(_search(lang, images, texts, heldout))
        update(done, len(LANGUAGES))
    mean = {
        direction: {
            k: float(np.mean([recalls[direction][k] for recalls in per_language.values()]))
            for k in per_language["en"][direction]
        }
        for direction in ("text_to_image", "image_to_text")
    }
    return {
        "zero_shot": zero_shot,
        "zero_shot_mean": float(np.mean(list(zero_shot.values()))),
        "chance": 1 / len(NUMBERS),
        "retrieval": {**mean, "per_language": per_language},
        "retrieval_examples": examples,
    }


def _retrieval(images: Tensor, texts: Tensor, folds: Tensor) -> dict[str, dict[str, float]]:
    """Mean over the folds: inside a fold every number is there once, so each caption has one right picture."""
    results = []
    for fold in folds.unique():
        members = folds == fold
        count = int(members.sum())
        results.append(recall(images[members], texts[members], torch.arange(count), _KS))
    return {
        "text_to_image": {f"R@{k}": float(np.mean([r.text_to_image[k] for r in results])) for k in _KS},
        "image_to_text": {f"R@{k}": float(np.mean([r.image_to_text[k] for r in results])) for k in _KS},
    }


def _search(lang: str, images: Tensor, texts: Tensor, heldout: Heldout) -> dict[str, Any]:
    """The pictures nearest to one caption of the language; another number in each language."""
    query = (37 * _EXAMPLE_LANGUAGES.index(lang) + 42) % len(NUMBERS)
    hits = nearest(texts[query : query + 1], images, min(_HITS, len(images)))[1][0].tolist()
    return {
        "lang": lang,
        "query": heldout.captions[lang][query],
        "number": int(heldout.numbers[query]),
        "hits": [{"key": heldout.keys[hit], "number": int(heldout.numbers[hit])} for hit in hits],
    }


def head_tail_curves(curated: Path, languages: Sequence[str]) -> dict[str, dict[str, list[float]]]:
    """How often each entry occurs, in descending order, ``before`` balancing and expected ``after`` it."""
    probs: Mapping[str, Any] = BalanceFolder(curated / "balance")
    before = {lang: np.zeros(len(probs[lang])) for lang in languages}
    after = {lang: np.zeros(len(probs[lang])) for lang in languages}
    for path in list_shards(curated / "matched", ".parquet"):
        rows = read_matched(path, ["lang", "entries"])
        offsets, ids = entries_of(rows)
        for lang, members in rows_by_language(rows):
            own_offsets, own_ids = csr.take(offsets, ids, members)
            keep = keep_probability(own_offsets, own_ids, probs[lang])
            before[lang] += np.bincount(own_ids, minlength=len(before[lang]))
            weights = np.repeat(keep, np.diff(own_offsets))
            after[lang] += np.bincount(own_ids, weights=weights, minlength=len(after[lang]))
    return {
        lang: {
            "before": sorted(before[lang].tolist(), reverse=True),
            "after": [round(count, 3) for count in sorted(after[lang].tolist(), reverse=True)],
        }
        for lang in languages
    }


@torch.inference_mode()
def open_clip_difference(
    model: CLIP, tokenizer: Tokenizer, export: Path, heldout: Heldout, *, pairs: int = 64
) -> tuple[float, int]:
    """Load ``export`` with open_clip itself and compare.

    Returns:
        the largest absolute difference of a logit (``exp(logit_scale)`` x cosine) over ``pairs`` pictures x as many
        captions, and of how many of all held-out captions the token ids differ.
    """
    from mc2_hpc.conversion.peers import import_open_clip
    from mc2_hpc.data.normalise import normalise

    open_clip = import_open_clip()
    theirs, _, _ = open_clip.create_model_and_transforms(f"local-dir:{export}")
    theirs.eval()
    their_tokenizer = open_clip.get_tokenizer(f"local-dir:{export}")
    captions = [text for lang in LANGUAGES for text in heldout.captions[lang]]
    ours_ids = tokenizer.encode(captions, pad_to_context=True)
    differing = int((ours_ids != their_tokenizer(captions)).any(dim=1).sum())
    images = normalise(heldout.images[:pairs])
    tokens = ours_ids[:: max(1, len(captions) // pairs)][:pairs]
    logits = []
    each: Any
    for each in (model, theirs):
        scale = each.logit_scale.exp()
        logits.append(scale * each.encode_image(images, normalize=True) @ each.encode_text(tokens, normalize=True).T)
    return float((logits[0] - logits[1]).abs().max()), differing
