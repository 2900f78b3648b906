"""Averages of models' weights: between two (WiSE-FT, arXiv 2109.01903) and of several (model soups, arXiv 2203.05482).

A merged tensor is the sum, in the order of the models, of ``share * tensor``. Every tensor is read as fp32, the type
that our checkpoints store (half precision widens exactly), and every share, product and sum is rounded to fp32. Models
whose share is 0 are not read, so a share of 1 gives the model's own bits. ``logit_scale`` is averaged as it is stored,
as a logarithm.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2 as sentencepiece_proto
from torch import Tensor

from mc2_hpc.conversion.convert import convert
from mc2_hpc.conversion.model_folder import read_model, write_model
from mc2_hpc.conversion.provenance import Provenance, find_provenance, write_provenance
from mc2_hpc.data.tokenizer import MOST_BYTES
from mc2_hpc.errors import UserError
from mc2_hpc.models.formats import Format, detect_format
from mc2_hpc.models.presets import ClipArchitecture
from mc2_hpc.models.tensor_files import TensorFiles
from mc2_hpc.models.weights import ModelCard, resolve_checkpoint
from mc2_hpc.reading.files import read_bytes
from mc2_hpc.storage import atomic_folder, file_sha256


@dataclass(frozen=True)
class Source:
    """One of the models that are merged, its weights memory-mapped."""

    name: Path
    """As the user wrote it."""
    card: ModelCard
    files: TensorFiles
    tokenizer: Path
    provenance: Provenance


@contextmanager
def open_sources(names: Sequence[Path], scratch: Path) -> Iterator[list[Source]]:
    """The models of checkpoints or run folders of ours, and of open_clip and transformers folders.

    Args:
        scratch: folder in which the last two are converted, while the context lasts.

    Raises:
        UserError: fewer than two, one cannot be read, or they differ in architecture or tokenizer.
    """
    if len(names) < 2:
        raise UserError(f"{names[0]}: one model is nothing to merge; name two or more")
    with ExitStack() as stack:
        sources = [_open(Path(name), scratch, stack) for name in names]
        for other in sources[1:]:
            _check_same(sources[0], other)
        yield sources


def merged(sources: Sequence[Source], shares: Sequence[float]) -> Callable[[str], Tensor]:
    """A function that gets a tensor of the merged model by name: fp32, a copy.

    Args:
        shares: one for each source.
    """
    weighed = [(source, share) for source, share in zip(sources, shares, strict=True) if share]

    def get(name: str) -> Tensor:
        (first, share), *others = weighed
        total = first.files.get_fp32(name) * share
        for source, share in others:
            # Not add_(alpha=share), which may round once instead of twice.
            total.add_(source.files.get_fp32(name) * share)
        return total

    return get


def write_merged(sources: Sequence[Source], shares: Sequence[float], out: Path) -> None:
    """Write a merged model as a checkpoint folder of ours, completely or not at all.

    In memory there are one file's tensors (1 GiB, or a single larger one), the next sum, and a product for it.

    Raises:
        UserError: ``out`` is not empty, or a weight cannot be read.
    """
    get, first = merged(sources, shares), sources[0]
    with atomic_folder(out) as partial:
        write_model(partial, first.card, ((name, get(name)) for name in first.files.names()), first.tokenizer)
        write_provenance(partial, Provenance(merged=describe(sources, shares)))


def describe(sources: Sequence[Source], shares: Sequence[float]) -> list[str]:
    """A line for each model: its share, its folder's name, and its training steps if known."""
    lines = []
    for source, share in zip(sources, shares, strict=True):
        step = source.provenance.step
        lines.append(f"{share:g} x {source.name.absolute().name}" + (f", step {step:,}" if step is not None else ""))
    return lines


def uniform(count: int) -> list[float]:
    """The shares of a uniform soup."""
    return [1 / count] * count


def check_shares(shares: Sequence[float], count: int) -> None:
    """
    Raises:
        UserError: not one share for each of ``count`` models, or they are negative or do not add up to 1.
    """
    if len(shares) != count:
        raise UserError(f"--shares: {len(shares)} numbers for {count} models; give one for each")
    if min(shares) < 0 or not math.isclose(math.fsum(shares), 1, abs_tol=1e-6):
        raise UserError(f"--shares {','.join(f'{share:g}' for share in shares)}: must be 0 or more and add up to 1")


def _open(name: Path, scratch: Path, stack: ExitStack) -> Source:
    kind = detect_format(name)
    if kind == Format.OURS:
        folder = resolve_checkpoint(name)
    else:
        scratch.mkdir(parents=True, exist_ok=True)
        folder = Path(stack.enter_context(TemporaryDirectory(prefix=".merge.", dir=scratch))) / "model"
        convert(name, Format.OURS, folder)
    card, files, tokenizer = read_model(folder)
    return Source(name, card, files, tokenizer, find_provenance(folder))


def _check_same(first: Source, other: Source) -> None:
    ours, theirs = _sizes(first.card.arch), _sizes(other.card.arch)
    different = next((key for key in ours if ours[key] != theirs[key]), None)
    if different is not None:
        raise UserError(
            f"{first.name} and {other.name} cannot be merged: {different} is {ours[different]} and {theirs[different]}"
        )
    if first.card.tokenizer_style != other.card.tokenizer_style or not _same_tokenizer(
        first.tokenizer, other.tokenizer
    ):
        raise UserError(
            f"{first.name} and {other.name} cannot be merged: they have different tokenizers, so rows of their token "
            "tables stand for different pieces"
        )


def _sizes(arch: ClipArchitecture) -> dict[str, object]:
    """Every setting of an architecture under its dotted name."""
    found: dict[str, object] = {"embed_dim": arch.embed_dim, "quick_gelu": arch.quick_gelu}
    for tower in ("vision", "text"):
        found |= {f"{tower}.{key}": value for key, value in vars(getattr(arch, tower)).items()}
    return found


def _same_tokenizer(a: Path, b: Path) -> bool:
    """Whether two sentencepiece files turn every text into the same pieces; how they were trained does not matter."""
    return file_sha256(a) == file_sha256(b) or _segmentation(a) == _segmentation(b)


def _segmentation(path: Path) -> tuple[object, ...]:
    """Everything in a sentencepiece file that decides into which pieces a text is divided."""
    proto = sentencepiece_proto.ModelProto()  # type: ignore[attr-defined]
    try:
        proto.ParseFromString(read_bytes(path, most=MOST_BYTES))
    except DecodeError:
        raise UserError(f"{path}: not a sentencepiece model") from None
    spec, trainer = proto.normalizer_spec, proto.trainer_spec
    normalising = (spec.add_dummy_prefix, spec.remove_extra_whitespaces, spec.escape_whitespaces)
    dividing = (trainer.model_type, trainer.byte_fallback, trainer.treat_whitespace_as_suffix)
    return [(p.piece, p.score, p.type) for p in proto.pieces], spec.precompiled_charsmap, normalising, dividing
