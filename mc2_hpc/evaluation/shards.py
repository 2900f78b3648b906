"""Retrieval of a checkpoint on image-text shards: the captions that lie with the pictures are the queries."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mc2_hpc.data.evalset import EvalBatches
from mc2_hpc.data.tokenizer import Tokenizer
from mc2_hpc.evaluation.features import encode_images, encode_texts
from mc2_hpc.evaluation.retrieval import Recall, recall
from mc2_hpc.models.weights import TOKENIZER_FILE, load_clip, resolve_checkpoint


def evaluate_shards(
    checkpoint: str | Path, shards: str | Path, *, batch: int = 64, progress: Callable[[int], None] | None = None
) -> dict[str, Any]:
    """R@1/5/10 in both directions over all pictures and captions of ``shards``, and within each language.

    Within a language the gallery is its own captions and the pictures that have one.

    Args:
        checkpoint: a checkpoint or run folder.
        progress: called with the number of pictures encoded so far.

    Returns:
        ``checkpoint``, ``images``, ``texts``, ``retrieval`` (``all`` and each language: ``texts``, ``text_to_image``,
        ``image_to_text``) and ``skipped`` (samples left out, by reason).

    Raises:
        UserError: no checkpoint, no shards, or not one usable picture.
    """
    folder = resolve_checkpoint(checkpoint)
    model, card = load_clip(folder)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = model.to(device)
    tokenizer = Tokenizer(folder / TOKENIZER_FILE, card.tokenizer_style, card.arch.text.context_length)
    batches = EvalBatches(shards, image_size=card.arch.vision.image_size, batch=batch, transform=card.arch.eval_resize)
    texts: list[str] = []
    langs: list[str] = []
    owners: list[int] = []
    parts: list[Tensor] = []
    num_images = 0
    for loaded in batches:
        parts.append(encode_images(model, [loaded.images], device))
        for own_texts, own_langs in zip(loaded.texts, loaded.langs, strict=True):
            texts += own_texts
            langs += own_langs
            owners += [num_images] * len(own_texts)
            num_images += 1
        if progress is not None:
            progress(num_images)
    image_features = torch.cat(parts)
    text_features = encode_texts(model, tokenizer.encode, texts, device=device)
    owner = torch.tensor(owners)
    retrieval = {"all": _row(recall(image_features, text_features, owner), len(texts))}
    for lang in sorted(set(langs) - {""}):
        own = torch.tensor([index for index, found in enumerate(langs) if found == lang])
        images, local = owner[own].unique(return_inverse=True)
        retrieval[lang] = _row(recall(image_features[images], text_features[own], local), len(own))
    return {
        "checkpoint": str(folder),
        "images": num_images,
        "texts": len(texts),
        "retrieval": retrieval,
        "skipped": dict(batches.skipped),
    }


def _row(found: Recall, num_texts: int) -> dict[str, Any]:
    return {
        "texts": num_texts,
        "text_to_image": {f"R@{k}": value for k, value in found.text_to_image.items()},
        "image_to_text": {f"R@{k}": value for k, value in found.image_to_text.items()},
    }
