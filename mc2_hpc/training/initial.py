"""The model that a run trains: its architecture, its tokenizer, and its initial weights.

``model.init_from`` may name a checkpoint or run of ours, an open_clip folder or a transformers folder. Where the config
does not set the architecture and tokenizer, the source's are used. For another image size or context length, the tables
of positions are interpolated.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from mc2_hpc.config import RunConfig
from mc2_hpc.conversion.convert import convert
from mc2_hpc.conversion.find_tokenizer import fit_to_rows
from mc2_hpc.data.tokenizer import Tokenizer
from mc2_hpc.distributed import Ranks, on_first_rank
from mc2_hpc.errors import UserError
from mc2_hpc.models.average import weight_files
from mc2_hpc.models.clip import CLIP
from mc2_hpc.models.formats import Format, detect_format
from mc2_hpc.models.positions import describe_resizing
from mc2_hpc.models.presets import ClipArchitecture, resolve
from mc2_hpc.models.weights import TOKENIZER_FILE, ModelCard, read_card, resolve_checkpoint
from mc2_hpc.storage import atomic_path, file_sha256, remove_folder
from mc2_hpc.training.checkpoint import Checkpoint, copy_weights

logger = logging.getLogger(__name__)

_CONVERTED = ".init_from"
"""In the run folder: a foreign source converted to our format, kept only while the ranks load it."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """A model folder of ours that a run starts from or resumes."""

    folder: Path
    card: ModelCard
    name: str
    """For messages."""
    resumed: bool = False
    """Whether the run resumes from it."""

    @property
    def tokenizer_file(self) -> Path:
        """The sentencepiece model that its weights were trained with."""
        return self.folder / TOKENIZER_FILE


@contextmanager
def initial_source(config: RunConfig, checkpoint: Checkpoint | None, ranks: Ranks) -> Iterator[Source | None]:
    """The model that ``model.init_from`` names, in our format while the context lasts; for a resumed run, its
    checkpoint.

    None if ``model.init_from`` is not set. Collective, on exit too.

    Raises:
        UserError: no model there, or one that cannot be trained here.
    """
    name = config.model.init_from
    if name is None:
        yield None
    elif checkpoint is not None:
        yield Source(
            folder=checkpoint.folder, card=read_card(checkpoint.folder), name=str(checkpoint.folder), resumed=True
        )
    else:
        source = Path(name).expanduser()
        is_ours = not source.exists() or detect_format(source) == Format.OURS
        converted = Path(config.output) / _CONVERTED
        if not is_ours:
            on_first_rank(ranks, lambda: _convert(source, converted))
        try:
            folder = resolve_checkpoint(source) if is_ours else converted
            yield Source(folder=folder, card=read_card(folder), name=name)
            if not is_ours:
                dist.barrier()  # until all have read it
        finally:
            if not is_ours and ranks.is_first:
                remove_folder(converted)


def _convert(source: Path, out: Path) -> None:
    remove_folder(out)  # left by a start that was killed
    convert(source, Format.OURS, out)


def architecture(config: RunConfig, source: Source | None) -> ClipArchitecture:
    """The architecture of the preset or source, with the sizes that the config overrides."""
    initial = source.card.arch if source is not None else None
    return resolve(config.model, initial, logit_bias=config.loss.has_bias)


def load_initial_weights(clip: CLIP, source: Source) -> None:
    """Copy the source's weights into ``clip``, with tables of positions interpolated to its image size and context
    length; logs from what to what.

    Raises:
        UserError: they belong to another model.
    """
    old, new = source.card.arch, clip.arch
    copy_weights(clip, weight_files(source.folder), old, source.name)
    logger.info("%s", "; ".join([f"initial weights from {source.name}", *describe_resizing(old, new)]))
    if old.logit_bias != new.logit_bias:
        begins = "logit_bias begins anew" if new.logit_bias else "its logit_bias is left out, which softmax ignores"
        losses = {True: "sigmoid", False: "softmax"}
        logger.warning(
            "%s was trained with loss.kind=%s, and this run trains with %s: %s",
            source.name,
            losses[old.logit_bias],
            losses[new.logit_bias],
            begins,
        )
    if old.quick_gelu != new.quick_gelu:
        names = {True: "QuickGELU", False: "GELU"}
        logger.warning(
            "%s was trained with %s, and this run computes %s: set model.quick_gelu=%s unless that is intended",
            source.name,
            names[old.quick_gelu],
            names[new.quick_gelu],
            str(old.quick_gelu).lower(),
        )


def tokenizer(config: RunConfig, source: Source | None, arch: ClipArchitecture, ranks: Ranks) -> Tokenizer:
    """The config's tokenizer, or a copy of the source's in the run folder. Collective.

    Raises:
        UserError: there is neither, it does not fit the architecture, or the source's weights were trained with
            another one.
    """
    length = arch.text.context_length
    if config.data.tokenizer:
        found = Tokenizer(config.data.tokenizer, config.data.tokenizer_style, context_length=length)
        if found.vocab_size > arch.text.vocab_size:
            found = _without_sentinels(found, arch, Path(config.output) / TOKENIZER_FILE, ranks)
        if source is not None and not source.resumed:
            _check_same(found, source, allowed=config.model.new_tokenizer)
    elif source is not None:
        if not source.tokenizer_file.is_file():
            raise UserError(f"{source.name}: has no {TOKENIZER_FILE}; name a sentencepiece model in data.tokenizer")
        own = Path(config.output) / TOKENIZER_FILE
        on_first_rank(ranks, lambda: _copy(source.tokenizer_file, own))
        found = Tokenizer(own, source.card.tokenizer_style, context_length=length)
    else:
        raise UserError("data.tokenizer is not set: name a sentencepiece model file")
    _check_fits(found, arch)
    return found


def _without_sentinels(found: Tokenizer, arch: ClipArchitecture, own: Path, ranks: Ranks) -> Tokenizer:
    """A copy in the run folder without mT5's sentinels, if it fits the token table; otherwise ``found``. Collective."""

    def write() -> None:
        own.unlink(missing_ok=True)  # of an earlier start
        fit_to_rows(found, arch.text.vocab_size, own)

    on_first_rank(ranks, write)
    return Tokenizer(own, found.style, context_length=found.context_length) if own.is_file() else found


def _copy(source: Path, target: Path) -> None:
    with atomic_path(target) as temporary:
        temporary.write_bytes(source.read_bytes())


def _check_same(found: Tokenizer, source: Source, *, allowed: bool) -> None:
    if not source.tokenizer_file.is_file():
        logger.warning("%s: has no %s to compare data.tokenizer with", source.name, TOKENIZER_FILE)
        return
    same = file_sha256(found.model_file) == file_sha256(source.tokenizer_file)
    if (same and found.style == source.card.tokenizer_style) or allowed:
        return
    raise UserError(
        f"{found.model_file}: not the tokenizer that the weights of {source.name} were trained with, so captions would "
        f"map to other rows of the token table: leave out data.tokenizer to use theirs, or set model.new_tokenizer=true"
    )


def _check_fits(found: Tokenizer, arch: ClipArchitecture) -> None:
    if found.vocab_size > arch.text.vocab_size:
        raise UserError(
            f"{found.model_file}: {found.vocab_size} token ids, but model.text.vocab_size={arch.text.vocab_size}: "
            f"raise it to at least {found.vocab_size} or use the model's own tokenizer"
        )
    if found.eos_id != arch.text.eos_id:
        raise UserError(
            f"{found.model_file}: its EOS is id {found.eos_id}, but model.text.eos_id={arch.text.eos_id}: "
            f"set data.tokenizer_style and model.text.eos_id to match"
        )
