"""The trained model's scores on the held-out images, and how balancing changed the data."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from mc2_hpc.balancing import csr
from mc2_hpc.balancing.folder import BalanceFolder
from mc2_hpc.balancing.selection import keep_probability
from mc2_hpc.curation.matched import entries_of, read_matched, rows_by_language
from mc2_hpc.data.normalise import normalise
from mc2_hpc.evaluation.dual_encoders import DualEncoder, open_dual_encoder
from mc2_hpc.evaluation.encoder import Encoder
from mc2_hpc.evaluation.nearest import nearest
from mc2_hpc.evaluation.scoring import Scores
from mc2_hpc.evaluation.sets.shards import shards
from mc2_hpc.evaluation.suite import SetResult, load_suite, run_suite
from mc2_hpc.evaluation.tasks import Classification, Retrieval
from mc2_hpc.quickstart.captions import LANGUAGES, NUMBERS, TEMPLATES, number_names
from mc2_hpc.quickstart.pool import heldout_place
from mc2_hpc.shard_paths import list_shards
from mc2_hpc.storage import write_text

_DIRECTIONS = ("text_to_image", "image_to_text")
_KS = (1, 5, 10)
_EXAMPLE_LANGUAGES = ("en", "ja", "ar", "ru", "th", "ko", "de", "am", "he", "te")
_HITS = 5


def write_suite(path: Path, folder: Path) -> None:
    """Write the suite that the trained model is scored on, for ``mc2 eval --suite``.

    ``numbers``: which of the 100 numbers each held-out image shows, in every language. ``fold_00000``...: retrieval
    within a fold, which has one image per number, so that each caption has one correct image.

    Args:
        folder: the quickstart's output.
    """
    sets: dict[str, Any] = {
        "numbers": {
            "reader": "labelled_parquet",
            "path": "heldout.parquet",
            "options": {
                "classes": [str(number) for number in NUMBERS],
                "names": number_names(),
                "templates": {lang: list(TEMPLATES[lang]) for lang in LANGUAGES},
            },
        }
    }
    for shard in list_shards(folder / "heldout", ".tar"):
        fold = f"fold_{shard.stem.rpartition('-')[2]}"
        sets[fold] = {"reader": "shards", "path": f"heldout/{shard.name}", "languages": list(LANGUAGES)}
    write_text(path, yaml.safe_dump({"root": str(folder), "sets": sets}, allow_unicode=True, sort_keys=False))


def evaluate(suite: Path, encoder: Encoder, update: Callable[[int, int], None]) -> dict[str, Any]:
    """Zero-shot accuracy and retrieval for every language, and search examples, under the report's keys.

    Args:
        suite: from :func:`write_suite`.
        update: called with (images done, total images) of a set.

    Raises:
        RuntimeError: a set could not be scored.
    """
    numbers, *folds = run_suite(load_suite(suite), encoder, lambda name, done, total, more: update(done, total))
    for result in (numbers, *folds):
        if result.scores is None:
            raise RuntimeError(f"the held-out set {result.name} could not be scored: {result.error}")
    zero_shot = {lang: found["top1"] for lang, found in _scores(numbers).groups.items()}
    per_language = {lang: _mean_of_folds([_scores(fold).groups[lang] for fold in folds]) for lang in LANGUAGES}
    mean = {
        direction: {
            f"R@{k}": float(np.mean([recalls[direction][f"R@{k}"] for recalls in per_language.values()])) for k in _KS
        }
        for direction in _DIRECTIONS
    }
    return {
        "zero_shot": zero_shot,
        "zero_shot_mean": float(np.mean(list(zero_shot.values()))),
        "chance": _scores(numbers).chance["top1"],
        "retrieval": {**mean, "per_language": per_language},
        "retrieval_examples": [
            _search(lang, numbers, folds[0], encoder) for lang in LANGUAGES if lang in _EXAMPLE_LANGUAGES
        ],
    }


def _scores(result: SetResult) -> Scores:
    assert result.scores is not None
    return result.scores


def _mean_of_folds(folds: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    return {
        direction: {f"R@{k}": float(np.mean([found[f"{direction}_R@{k}"] for found in folds])) for k in _KS}
        for direction in _DIRECTIONS
    }


def _search(lang: str, numbers: SetResult, fold: SetResult, encoder: Encoder) -> dict[str, Any]:
    """The images nearest to one caption in the language; each language gets a different number."""
    assert isinstance(numbers.task, Classification) and isinstance(fold.task, Retrieval)
    assert numbers.images is not None
    place = (37 * _EXAMPLE_LANGUAGES.index(lang) + 42) % len(NUMBERS)
    query = fold.task.languages[lang].texts[place]
    hits = nearest(encoder.texts([query]), numbers.images.features, _HITS)[1][0].tolist()
    keys = [numbers.task.images.name(hit) for hit in hits]
    return {
        "lang": lang,
        "query": query,
        "number": NUMBERS[place],
        "hits": [{"key": key, "number": heldout_place(key)[1]} for key in keys],
    }


def head_tail_curves(curated: Path, languages: Sequence[str]) -> dict[str, dict[str, list[float]]]:
    """Entry counts in descending order, ``before`` balancing and expected ``after`` it."""
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
def open_clip_difference(ours: DualEncoder, export: Path, heldout: Path, *, pairs: int = 64) -> tuple[float, int]:
    """Load ``export`` with open_clip itself and compare.

    Args:
        heldout: folder of the held-out shards.

    Returns:
        the largest absolute difference of a logit (``exp(logit_scale)`` x cosine) over ``pairs`` images x ``pairs``
        captions, and the number of held-out captions whose token ids differ.
    """
    theirs = open_dual_encoder(export, torch.device("cpu"))
    task = shards(heldout)
    captions = [text for lang in LANGUAGES for text in task.languages[lang].texts]
    ids = ours.tokenizer.encode(captions, pad_to_context=True)
    differing = int((ids != theirs.tokenize(captions)).any(dim=1).sum())
    # Both get the same inputs, because differences in transforms and tokenizers are not due to the conversion.
    pixels = [ours.preprocess(task.images.read(index)) for index in range(min(pairs, len(task.images)))]
    images = normalise(torch.stack(pixels))
    tokens = ids[:: max(1, len(captions) // pairs)][:pairs]
    logits = []
    for encoder in (ours, theirs):
        model: Any = encoder.model
        features = model.encode_image(images, normalize=True), model.encode_text(tokens, normalize=True)
        logits.append(encoder.logits()[0] * features[0] @ features[1].T)
    return float((logits[0] - logits[1]).abs().max()), differing
