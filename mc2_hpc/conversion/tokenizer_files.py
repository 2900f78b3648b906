"""Converting a sentencepiece model to the tokenizer files that transformers (and through it open_clip) loads.

``tokenizer.json`` describes the same segmentation to Hugging Face's tokenizers library, including the style's cleaning,
so that ``AutoTokenizer`` gives our ids for raw captions. The sentencepiece file is stored beside it for the way back.
The two libraries differ when two segmentations tie, and in how they normalise a few characters.
"""

import base64
import shutil
import string
from pathlib import Path
from typing import Any

from sentencepiece import sentencepiece_model_pb2 as sentencepiece_proto

from mc2_hpc.data.tokenizer import MOST_BYTES, STYLES, Tokenizer
from mc2_hpc.errors import UserError
from mc2_hpc.reading.files import read_bytes
from mc2_hpc.storage import write_json

MODEL_NAMES = {"xlmv": "sentencepiece.bpe.model", "mt5": "spiece.model", "gemma": "tokenizer.model"}
"""The name that transformers gives the sentencepiece file, by style."""

_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4  # piece types of sentencepiece_model.proto
_UNIGRAM, _BPE = 1, 2  # model types
_NEVER = -1000.0  # log-probability of a special piece: any other segmentation of its characters costs less
UNKNOWN_CHARACTER = "\ue000"  # private use: in no vocabulary


def write_tokenizer(model_file: Path, style: str, context_length: int, out: Path) -> None:
    """Write ``tokenizer.json``, ``tokenizer_config.json`` and the sentencepiece file into ``out``.

    Raises:
        UserError: the file is not a sentencepiece model of ``style``, or of a kind that tokenizers cannot express.
    """
    Tokenizer(model_file, style)  # for its checks
    proto = sentencepiece_proto.ModelProto()  # type: ignore[attr-defined]
    proto.ParseFromString(read_bytes(model_file, most=MOST_BYTES))
    shutil.copyfile(model_file, out / MODEL_NAMES[style])
    write_json(out / "tokenizer.json", tokenizer_json(proto, style, str(model_file)))
    write_json(out / "tokenizer_config.json", tokenizer_config(proto, style, context_length))


def tokenizer_config(proto: Any, style: str, context_length: int) -> dict[str, Any]:
    """Contents of ``tokenizer_config.json``."""
    specials = {content: token_id for token_id, content in _special_pieces(proto, style)}
    by_id = {token_id: content for content, token_id in specials.items()}
    layout = STYLES[style]
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context_length,
        "padding_side": "right",
        "truncation_side": "right",
        "clean_up_tokenization_spaces": False,
        # "</s>" in a caption is text, not the end of the caption.
        "split_special_tokens": True,
        "eos_token": by_id[layout.eos],
        "pad_token": by_id[layout.pad],
        "unk_token": by_id[layout.unk],
    }
    if layout.prefix:
        config["bos_token"] = by_id[layout.prefix[0]]
    if "<mask>" in specials:
        config["mask_token"] = "<mask>"
    return config


def tokenizer_json(proto: Any, style: str, source: str) -> dict[str, Any]:
    """Contents of ``tokenizer.json`` for a parsed sentencepiece model; errors call it ``source``.

    Raises:
        UserError: a kind of sentencepiece model that the tokenizers library cannot express.
    """
    trainer = proto.trainer_spec
    if trainer.model_type not in (_UNIGRAM, _BPE) or trainer.treat_whitespace_as_suffix:
        raise UserError(f"{source}: only unigram and BPE models with whitespace prefixes can be exported")
    layout = STYLES[style]
    specials = _special_pieces(proto, style)
    offset = layout.shift
    user_defined = [(i + offset, p.piece) for i, p in enumerate(proto.pieces) if p.type == _USER_DEFINED]
    content = dict(specials)
    prefix = [{"SpecialToken": {"id": content[i], "type_id": 0}} for i in layout.prefix]
    eos = {"SpecialToken": {"id": content[layout.eos], "type_id": 0}}
    row = [*prefix, {"Sequence": {"id": "A", "type_id": 0}}, eos]
    pair = [*row, *prefix, {"Sequence": {"id": "B", "type_id": 0}}, eos]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added_token(i, piece, special=True) for i, piece in specials]
        + [_added_token(i, piece, special=False) for i, piece in user_defined],
        "normalizer": {"type": "Sequence", "normalizers": _normalizers(proto, style, [piece for _, piece in specials])},
        "pre_tokenizer": _metaspace(proto),
        "post_processor": {
            "type": "TemplateProcessing",
            "single": row,
            "pair": pair,
            "special_tokens": {
                content[i]: {"id": content[i], "ids": [i], "tokens": [content[i]]} for i in (*layout.prefix, layout.eos)
            },
        },
        "decoder": _decoder(proto),
        "model": _unigram(proto, style, content) if trainer.model_type == _UNIGRAM else _bpe(proto, style, content),
    }


def _special_pieces(proto: Any, style: str) -> list[tuple[int, str]]:
    """(id, content) of the tokens that no caption may produce, ordered by id."""
    if style == "xlmv":  # fairseq's layout, whatever the file calls its own specials
        return [(0, "<s>"), (1, "<pad>"), (2, "</s>"), (3, "<unk>"), (len(proto.pieces) + 1, "<mask>")]
    unk = STYLES[style].unk
    return [(i, p.piece) for i, p in enumerate(proto.pieces) if p.type == _CONTROL or i == unk]


def _added_token(token_id: int, content: str, *, special: bool) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": special}
    return {"id": token_id, "content": content, **flags}


def _pieces(proto: Any, style: str, specials: dict[int, str]) -> list[tuple[str, float]]:
    """(piece, score) for each of our ids, in order."""
    if style == "xlmv":
        pieces = [(p.piece, p.score) for p in proto.pieces[3:]]
        return [*((specials[i], _NEVER) for i in range(4)), *pieces, ("<mask>", _NEVER)]
    return [(p.piece, _NEVER if i in specials else p.score) for i, p in enumerate(proto.pieces)]


def _unigram(proto: Any, style: str, specials: dict[int, str]) -> dict[str, Any]:
    return {
        "type": "Unigram",
        "unk_id": STYLES[style].unk,
        "vocab": [list(piece) for piece in _pieces(proto, style, specials)],
        "byte_fallback": proto.trainer_spec.byte_fallback,
    }


def _bpe(proto: Any, style: str, specials: dict[int, str]) -> dict[str, Any]:
    pieces = _pieces(proto, style, specials)
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": specials[STYLES[style].unk],
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": proto.trainer_spec.byte_fallback,
        "ignore_merges": False,
        "vocab": {piece: token_id for token_id, (piece, _) in enumerate(pieces)},
        "merges": _merges(proto),
    }


def _merges(proto: Any) -> list[list[str]]:
    """Every way to build a piece from two others, best piece first: the order in which sentencepiece merges."""
    ranks = {p.piece: i for i, p in enumerate(proto.pieces) if p.type == _NORMAL}
    merges = []
    for index in sorted(ranks.values(), key=lambda i: (-proto.pieces[i].score, i)):
        piece = proto.pieces[index].piece
        halves = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        known = [(left, right) for left, right in halves if left in ranks and right in ranks]
        merges += [list(pair) for pair in sorted(known, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))]
    return merges


def _normalizers(proto: Any, style: str, specials: list[str]) -> list[dict[str, Any]]:
    spec = proto.normalizer_spec
    steps = list(CLEANING[style])
    if spec.precompiled_charsmap:
        charsmap = base64.b64encode(spec.precompiled_charsmap).decode("ascii")
        steps.append({"type": "Precompiled", "precompiled_charsmap": charsmap})
    if spec.remove_extra_whitespaces:
        steps.append({"type": "Strip", "strip_left": True, "strip_right": True})
        steps.append(_replace({"Regex": " {2,}"}, " "))
    return steps + [_replace({"String": c}, UNKNOWN_CHARACTER) for c in _forging_characters(proto, specials)]


def _forging_characters(proto: Any, specials: list[str]) -> list[str]:
    """Characters to replace by another unknown one, so that captions cannot spell a special piece.

    A tokenizers unigram model can match any piece in text, special ones included. Their score (:data:`_NEVER`) prevents
    that wherever their characters have another segmentation. A character that no normal piece contains has none: both
    libraries call it unknown, but the special piece that contains it would still win. (A BPE model reaches pieces only
    by merges, and special pieces have none.)
    """
    if proto.trainer_spec.model_type != _UNIGRAM or proto.trainer_spec.byte_fallback:
        return []
    known = {c for p in proto.pieces if p.type in (_NORMAL, _USER_DEFINED) for c in p.piece}
    return sorted({next(c for c in piece if c not in known) for piece in specials if not known.issuperset(piece)})


def _metaspace(proto: Any) -> dict[str, Any]:
    # Words can be segmented one by one if no piece crosses a word boundary.
    crosses = any("▁" in p.piece[1:] for p in proto.pieces if p.type == _NORMAL)
    scheme = "always" if proto.normalizer_spec.add_dummy_prefix else "never"
    return {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": not crosses}


def _decoder(proto: Any) -> dict[str, Any]:
    steps: list[dict[str, Any]] = [_replace({"String": "▁"}, " ")]
    if proto.trainer_spec.byte_fallback:
        steps += [{"type": "ByteFallback"}, {"type": "Fuse"}]
    if proto.normalizer_spec.add_dummy_prefix:
        steps += [{"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]
    return {"type": "Sequence", "decoders": steps}


def _replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


# Lower case as in Python: a sigma at the end of a word has its own form, which tokenizers' Lowercase lacks. A word
# consists of cased and (in Unicode's term) case-ignorable characters; the look-behind covers at most one of the latter.
_CASED = r"[\p{Lu}\p{Ll}\p{Lt}]"
_IGNORABLE = r"[\p{Mn}\p{Me}\p{Cf}\p{Lm}\p{Sk}'’.:·]"
_FINAL_SIGMA = f"(?<={_CASED}|{_CASED}{_IGNORABLE})Σ(?!{_IGNORABLE}*{_CASED})"
_LOWER_CASE = [_replace({"Regex": _FINAL_SIGMA}, "ς"), {"type": "Lowercase"}]
_PUNCTUATION = "[" + "".join(f"\\x{ord(c):02x}" for c in string.punctuation) + "]"

# What data.tokenizer does to a caption before sentencepiece sees it.
CLEANING: dict[str, list[dict[str, Any]]] = {
    "xlmv": [],
    "mt5": [*_LOWER_CASE, _replace({"Regex": _PUNCTUATION}, ""), _replace({"Regex": r"\s+"}, " ")],
    "gemma": _LOWER_CASE,
}
