"""Rebuilding a sentencepiece model from the ``tokenizer.json`` that was made from it.

transformers' converters write everything that determines the segmentation into that file:

==========  ================================================  ====================================================
kind        in ``tokenizer.json``                             in the rebuilt model
==========  ================================================  ====================================================
Unigram     pieces with their log-probabilities               the same
BPE         every way to merge two pieces into a third, best  scores that give this order: sentencepiece merges the
            result first                                      pair whose result has the best score
both        normalisation as a precompiled character map,     the same; white space options
            white space steps
both        added tokens                                      special ones: control pieces, which no caption can
                                                              produce; others: user-defined pieces
==========  ================================================  ====================================================

A tokenizer that was not made from a sentencepiece model has other steps, or lacks merges, and is refused.
"""

import base64
import binascii
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import msgspec
from sentencepiece import sentencepiece_model_pb2 as sentencepiece_proto

from mc2_hpc.conversion.tokenizer_files import CLEANING, UNKNOWN_CHARACTER
from mc2_hpc.errors import UserError
from mc2_hpc.reading.files import shown
from mc2_hpc.reading.json_file import Count, Foreign, read_json

_MOST_BYTES = 512 << 20
_MOST_PIECES = 4_000_000
_MOST_PIECE_CHARACTERS = 512
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
"""Piece types of sentencepiece_model.proto."""
_UNIGRAM, _BPE = 1, 2
_FAIRSEQ = ["<s>", "<pad>", "</s>", "<unk>"]
"""The first ids of XLM-R and XLM-V."""
_FAIRSEQ_FILE = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0)]
"""How their sentencepiece file starts; it has no ``<mask>``."""
_NAMES = {"bos_piece": ("<s>", "<bos>"), "eos_piece": ("</s>", "<eos>"), "pad_piece": ("<pad>",)}
_APPENDED = re.compile(r"<extra_id_\d+>")
"""transformers appends these to T5's pieces. (mT5's own sentinels start with a ``▁``.)"""
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_SPACES = re.compile(r"(\\[Az]|[\^$|+*{}2, ▁])+")
"""Patterns of spaces alone, such as `` {2,}`` or ``\\A +| +\\z``."""

_Piece = Annotated[str, msgspec.Meta(min_length=1, max_length=_MOST_PIECE_CHARACTERS)]
_Score = Annotated[float, msgspec.Meta(ge=-1e30, le=1e30)]


class _Precompiled(Foreign, tag="Precompiled"):
    precompiled_charsmap: Annotated[str, msgspec.Meta(max_length=32 << 20)] | None


class _Pattern(Foreign):
    String: str | None = None
    Regex: str | None = None


class _Replace(Foreign, tag="Replace"):
    pattern: _Pattern
    content: str


class _Strip(Foreign, tag="Strip"):
    strip_left: bool = True
    strip_right: bool = True


class _Prepend(Foreign, tag="Prepend"):
    prepend: str


class _Lowercase(Foreign, tag="Lowercase"):
    pass


class _Normalizers(Foreign, tag="Sequence"):
    steps: list["_Normalizer"] = msgspec.field(name="normalizers")


_Normalizer = _Precompiled | _Replace | _Strip | _Prepend | _Lowercase | _Normalizers


class _WhitespaceSplit(Foreign, tag="WhitespaceSplit"):
    pass


class _Metaspace(Foreign, tag="Metaspace"):
    replacement: str = "▁"
    prepend_scheme: str | None = None
    add_prefix_space: bool = True


class _Split(Foreign, tag="Split"):
    pattern: _Pattern


class _PreTokenizers(Foreign, tag="Sequence"):
    steps: list["_PreTokenizer"] = msgspec.field(name="pretokenizers")


_PreTokenizer = _WhitespaceSplit | _Metaspace | _Split | _PreTokenizers


class _Unigram(Foreign, tag="Unigram"):
    vocab: Annotated[list[tuple[_Piece, _Score]], msgspec.Meta(max_length=_MOST_PIECES)]
    unk_id: Count
    byte_fallback: bool = False


class _Bpe(Foreign, tag="BPE"):
    vocab: Annotated[dict[_Piece, Count], msgspec.Meta(max_length=_MOST_PIECES)]
    merges: Annotated[list[str | tuple[str, str]], msgspec.Meta(max_length=16 * _MOST_PIECES)]
    unk_token: str | None = None
    byte_fallback: bool = False
    continuing_subword_prefix: str | None = None
    end_of_word_suffix: str | None = None


class _AddedToken(Foreign):
    id: Count
    content: _Piece
    special: bool = False


class _TokenizerFile(Foreign):
    """``tokenizer.json``."""

    model: _Unigram | _Bpe
    normalizer: _Normalizer | None = None
    pre_tokenizer: _PreTokenizer | None = None
    added_tokens: Annotated[list[_AddedToken], msgspec.Meta(max_length=_MOST_PIECES)] = []


_CLEANING_STEPS = [msgspec.convert(step, type=_Lowercase | _Replace) for steps in CLEANING.values() for step in steps]
"""Steps with which our own files clean captions, as the style itself does before sentencepiece."""


def rebuild(path: Path) -> bytes:
    """The sentencepiece model, serialised, that a ``tokenizer.json`` was made from.

    Raises:
        UserError: not such a file, or the message says which part of it no sentencepiece model can have.
    """
    found = read_json(path, _TokenizerFile, most=_MOST_BYTES, what="the tokenizer.json of a sentencepiece model")
    added = {token.content: token.special for token in found.added_tokens}
    added |= {name: True for names in _NAMES.values() for name in names}
    proto = sentencepiece_proto.ModelProto()  # type: ignore[attr-defined]
    if isinstance(found.model, _Unigram):
        pieces = _unigram_pieces(found.model, path)
        unknown = found.model.vocab[found.model.unk_id][0]
        proto.trainer_spec.model_type = _UNIGRAM
    else:
        unknown = found.model.unk_token or "<unk>"  # transformers leaves it out for some
        pieces = _bpe_pieces(found.model, unknown, added, path)
        proto.trainer_spec.model_type = _BPE
    if unknown not in {piece for piece, _ in pieces}:
        raise UserError(f"{path}: its unknown token {unknown[:80]!r} is not in its vocabulary")
    for piece, score in pieces:
        kind = _type(piece, unknown, added, found.model.byte_fallback)
        proto.pieces.add(piece=piece, score=score if kind == NORMAL else 0.0, type=kind)
    _set_trainer(proto, unknown, byte_fallback=found.model.byte_fallback)
    _set_normalizer(proto.normalizer_spec, found, path)
    if pieces[:3] == _FAIRSEQ_FILE and any(step in _CLEANING_STEPS for step in _flat(found.normalizer)):
        raise UserError(f"{path}: cleans captions (lower case, ...), which the style xlmv does not")
    return proto.SerializeToString()


def without_sentinels(model: bytes, num_sentinels: int) -> bytes | None:
    """A serialised sentencepiece model without its last pieces; None if one of them is not a sentinel.

    mT5's 250,100 pieces end with 100 sentinels, ``▁<extra_id_99>`` to ``▁<extra_id_0>``, which mark gaps in mT5's own
    training. The released S, M and B models have rows for the first 250,000.
    """
    proto = sentencepiece_proto.ModelProto()  # type: ignore[attr-defined]
    proto.ParseFromString(model)
    if not all(_APPENDED.fullmatch(piece.piece.removeprefix("▁")) for piece in proto.pieces[-num_sentinels:]):
        return None
    del proto.pieces[-num_sentinels:]
    proto.trainer_spec.vocab_size = len(proto.pieces)
    return proto.SerializeToString()


def _type(piece: str, unknown: str, added: dict[str, bool], byte_fallback: bool) -> int:
    if piece == unknown:
        return UNKNOWN
    if byte_fallback and _BYTE.fullmatch(piece):
        return BYTE
    if piece not in added:
        return NORMAL
    return CONTROL if added[piece] else USER_DEFINED


def _unigram_pieces(model: _Unigram, path: Path) -> list[tuple[str, float]]:
    vocab = model.vocab
    if model.unk_id >= len(vocab):
        raise UserError(f"{path}: $.model.unk_id: {model.unk_id} of {len(vocab)} pieces")
    if [piece for piece, _ in vocab[:4]] == _FAIRSEQ:
        last = len(vocab) - (vocab[-1][0] == "<mask>")
        return [*_FAIRSEQ_FILE, *vocab[4:last]]
    end = len(vocab)
    while end and _APPENDED.fullmatch(vocab[end - 1][0]):
        end -= 1
    return vocab[:end]


def _bpe_pieces(model: _Bpe, unknown: str, added: dict[str, bool], path: Path) -> list[tuple[str, float]]:
    if model.continuing_subword_prefix or model.end_of_word_suffix:
        raise UserError(f"{path}: marks parts of words, which no sentencepiece model does")
    pieces = sorted(model.vocab, key=model.vocab.__getitem__)
    if [model.vocab[piece] for piece in pieces] != list(range(len(pieces))):
        raise UserError(f"{path}: $.model.vocab: its ids are not 0 to {len(pieces) - 1}")
    normal = {p for p in pieces if _type(p, unknown, added, model.byte_fallback) == NORMAL}
    ranks = _merge_ranks(model.merges, normal, path)
    # Single characters are never the result of a merge, so their scores do not matter.
    return [(piece, -float(ranks.get(piece, len(ranks))) if piece in normal else 0.0) for piece in pieces]


def _merge_ranks(merges: list[str | tuple[str, str]], normal: set[str], path: Path) -> dict[str, int]:
    """The place of each result in the order of merges.

    Raises:
        UserError: sentencepiece would merge in another order: a piece has several places, or lacks one of its splits.
    """
    ranks: dict[str, int] = {}
    counts: dict[str, int] = {}
    last = None
    for merge in merges:
        # Files of tokenizers before 0.20 have both halves in one text.
        left, _, right = merge.partition(" ") if isinstance(merge, str) else (merge[0], "", merge[1])
        whole = left + right
        if not {left, right, whole} <= normal:
            continue  # sentencepiece does not merge user-defined pieces either
        if whole != last and whole in ranks:
            raise _not_sentencepiece(path, f"merges into {whole[:80]!r} at two places")
        last = whole
        ranks.setdefault(whole, len(ranks))
        counts[whole] = counts.get(whole, 0) + 1
    for piece in normal:
        splits = sum(piece[:cut] in normal and piece[cut:] in normal for cut in range(1, len(piece)))
        if splits != counts.get(piece, 0):
            raise _not_sentencepiece(path, f"has {counts.get(piece, 0)} of {splits} merges into {piece[:80]!r}")
    return ranks


def _not_sentencepiece(path: Path, reason: str) -> UserError:
    return UserError(f"{path}: not made from a sentencepiece model: {reason}; put the tokenizer's own file beside it")


def _set_trainer(proto: Any, unknown: str, *, byte_fallback: bool) -> None:
    """The fields that sentencepiece reads from a model: its special pieces, by name."""
    spec, types = proto.trainer_spec, {piece.piece: piece.type for piece in proto.pieces}
    ids = {piece.piece: index for index, piece in enumerate(proto.pieces)}
    spec.vocab_size = len(proto.pieces)
    spec.byte_fallback = byte_fallback
    spec.unk_piece, spec.unk_id = unknown, ids[unknown]
    for field, names in _NAMES.items():
        piece = next((name for name in names if types.get(name) == CONTROL), None)
        setattr(spec, field.replace("piece", "id"), ids[piece] if piece is not None else -1)
        if piece is not None:
            setattr(spec, field, piece)


def _set_normalizer(spec: Any, found: _TokenizerFile, path: Path) -> None:
    spec.add_dummy_prefix = spec.remove_extra_whitespaces = False
    for step in _flat(found.normalizer):
        if isinstance(step, _Precompiled):
            spec.precompiled_charsmap = _charsmap(step, path)
        elif isinstance(step, _Prepend) and step.prepend == "▁":
            spec.add_dummy_prefix = True
        elif isinstance(step, _Replace) and _is_white_space(step):
            spec.remove_extra_whitespaces |= step.pattern.Regex == " {2,}"
        elif not (isinstance(step, _Strip) or step in _CLEANING_STEPS or _hides_special_pieces(step)):
            raise _not_sentencepiece(path, f"normalises with {shown(str(step))[:120]}")
    for step in _flat(found.pre_tokenizer):
        if isinstance(step, _Metaspace):
            spec.add_dummy_prefix = step.prepend_scheme != "never" and step.add_prefix_space
        elif isinstance(step, _WhitespaceSplit):
            spec.remove_extra_whitespaces = True
        elif step.pattern.String != " ":  # words can be segmented one by one
            raise _not_sentencepiece(path, f"splits at {shown(str(step.pattern))[:120]}")


def _charsmap(step: _Precompiled, path: Path) -> bytes:
    try:
        return base64.b64decode(step.precompiled_charsmap or "", validate=True)
    except (binascii.Error, ValueError):
        raise UserError(f"{path}: its precompiled_charsmap is not base64") from None


def _is_white_space(step: _Replace) -> bool:
    """Whether it only changes, escapes or removes spaces."""
    pattern = step.pattern.String or step.pattern.Regex or ""
    return _SPACES.fullmatch(pattern) is not None and set(step.content) <= {" ", "▁"}


def _hides_special_pieces(step: Any) -> bool:
    """Whether it is a step with which our own files keep captions from spelling a special piece."""
    return isinstance(step, _Replace) and step.content == UNKNOWN_CHARACTER


def _flat(step: Any) -> Iterator[Any]:
    """The steps of a pipeline, with those of nested sequences in place."""
    if isinstance(step, _Normalizers | _PreTokenizers):
        for part in step.steps:
            yield from _flat(part)
    elif step is not None:
        yield step
