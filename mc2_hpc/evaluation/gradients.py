"""Whether languages pull a model in the same direction: the cosine between the gradients of two languages' losses.

Meta CLIP 2 uses it to measure the "curse of multilinguality": English against every other language (NeurIPS version;
0.546 for ViT-L/14 and 0.697 for ViT-H/14 at the end of training).
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mc2_hpc.data.normalise import normalise
from mc2_hpc.distributed import first_error
from mc2_hpc.errors import UserError
from mc2_hpc.evaluation.encoder import Encoder, ImageFeatures
from mc2_hpc.evaluation.tasks import Captions, Retrieval
from mc2_hpc.kernels.contrastive import reference_loss, reference_sigmoid_loss
from mc2_hpc.models.clip import CLIP
from mc2_hpc.models.depth import tower_of

PARTS = ("vision", "text", "both")
"""The towers whose parameters are compared."""


def gradient_cosines(
    task: Retrieval, images: ImageFeatures, encoder: Encoder, *, pairs: int, reference: str = "en"
) -> dict[str, dict[str, float]]:
    """Language -> ``gradient_cosine_<part>`` for each of :data:`PARTS`, for every language but the reference.

    A language's gradient is that of the training's loss, with its temperature (and bias), with respect to the towers'
    parameters. The loss is over the language's first ``pairs`` decodable images, each with its first
    caption; the temperature's own gradient is left out. Languages with fewer pairs have no cosine, because the loss
    depends on the number of pairs. Collective: the ranks divide the languages, and each computes the reference's
    gradient itself.

    Args:
        pairs: at least 2; one pair has no gradient.

    Raises:
        UserError: the set lacks the reference language, or enough pairs in it; or the model is another library's.
    """
    if not isinstance(encoder.dual.model, CLIP):
        raise UserError("gradient_pairs: needs an mc2 checkpoint; create one with mc2 convert --to mc2")
    if reference not in task.languages:
        raise UserError(f"gradient_pairs: no language {reference!r} in the set to compare the others with")
    found: dict[str, dict[str, float]] = {}
    error = None
    try:
        found = _own_share(task, images, encoder, pairs, reference)
    except UserError as failure:
        error = failure
    first_error(error)
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, found)
    every = {lang: numbers for part in parts for lang, numbers in part.items()}
    return {lang: every[lang] for lang in task.languages if lang in every}


def _own_share(
    task: Retrieval, images: ImageFeatures, encoder: Encoder, pairs: int, reference: str
) -> dict[str, dict[str, float]]:
    others = [lang for lang in task.languages if lang != reference]
    own = others[encoder.ranks.rank :: encoder.ranks.world_size]
    if not own:
        return {}
    rows = first_pairs(task.languages[reference], images.usable, pairs)
    if rows is None:
        raise UserError(f"gradient_pairs: fewer than {pairs} pairs in {reference!r}; lower it")
    expected = _gradient(task, task.languages[reference], rows, encoder)
    found = {}
    for lang in own:
        rows = first_pairs(task.languages[lang], images.usable, pairs)
        if rows is not None:
            found[lang] = cosines(expected, _gradient(task, task.languages[lang], rows, encoder))
    return found


def first_pairs(captions: Captions, usable: Tensor, pairs: int) -> list[int] | None:
    """Rows of the first caption of each of the first ``pairs`` usable images, or None if there are fewer."""
    first: dict[int, int] = {}
    for row, image in enumerate(captions.images):
        if usable[image]:
            first.setdefault(image, row)
    rows = [first[image] for image in sorted(first)[:pairs]]
    return rows if len(rows) == pairs else None


def _gradient(task: Retrieval, captions: Captions, rows: Sequence[int], encoder: Encoder) -> Mapping[str, Tensor]:
    """The loss's gradient by parameter name, for the pairs of ``rows``."""
    images = encoder.preprocess(task.images, [captions.images[row] for row in rows])
    tokens = encoder.dual.tokenize([captions.texts[row] for row in rows])
    return loss_gradient(encoder, torch.stack(images), tokens)


def loss_gradient(encoder: Encoder, images: Tensor, tokens: Tensor) -> dict[str, Tensor]:
    """Gradient of the loss of uint8 images (n, 3, S, S) and their token ids (n, L), by parameter name.

    The loss is the softmax, or the sigmoid for a model with a bias. The gradient is returned on the CPU; activations
    are recomputed, because training may leave little room on the device.
    """
    model, device = encoder.dual.model, encoder.ranks.device
    assert isinstance(model, CLIP)
    parameters = {name: p for name, p in model.named_parameters() if tower_of(name) is not None}
    with torch.enable_grad(), _recomputing(model):
        with encoder.autocast():
            image = model.encode_image(normalise(images.to(device)), normalize=True)
            text = model.encode_text(tokens.to(device), normalize=True)
        scale = model.logit_scale.detach().float()
        if model.logit_bias is None:
            loss = reference_loss(image, text, scale)
        else:
            loss = reference_sigmoid_loss(image, text, scale, model.logit_bias.detach().float())
        # Not backward(), which during training would touch the parameters' own gradients and their hooks.
        gradients = torch.autograd.grad(loss, list(parameters.values()))
    return {name: gradient.cpu() for name, gradient in zip(parameters, gradients, strict=True)}


@contextmanager
def _recomputing(model: CLIP) -> Iterator[None]:
    before = [transformer.recompute for transformer in model.transformers()]
    model.set_recompute("full")
    try:
        yield
    finally:
        for transformer, setting in zip(model.transformers(), before, strict=True):
            transformer.recompute = setting


def cosines(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> dict[str, float]:
    """``gradient_cosine_<part>`` of two gradients by parameter name."""
    found = {}
    for part in PARTS:
        names = [name for name in one if part == "both" or name.startswith(f"{part}.")]
        inner, first, second = (
            sum(_inner(a[name], b[name]) for name in names) for a, b in ((one, other), (one, one), (other, other))
        )
        if first > 0 and second > 0:
            found[f"gradient_cosine_{part}"] = inner / (first * second) ** 0.5
    return found


def _inner(one: Tensor, other: Tensor) -> float:
    """Inner product in float64, piece by piece, because a whole token table in float64 would take gigabytes."""
    pieces = zip(one.flatten().split(1 << 24), other.flatten().split(1 << 24), strict=True)
    return sum(float(a.double() @ b.double()) for a, b in pieces)
