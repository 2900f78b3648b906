"""Captions to token ids with sentencepiece itself, in the id layouts of XLM-V / XLM-R, mT5 / SigLIP, Gemma / SigLIP 2.

A row is ``[prefix] content EOS padding``, with exactly one EOS. Under a causal mask with EOS pooling, nothing after the
EOS reaches the output, so rows are only padded to the longest in their batch, and the padding id does not matter.

======  ===============  ==========================  =================================================================
style   row              specials                    cleaning
======  ===============  ==========================  =================================================================
xlmv    ``<s> x </s>``   bos 0, pad 1, eos 2, unk 3  none; ids are the file's + 1 (fairseq), ``<mask>`` comes last
mt5     ``x </s>``       pad 0, eos 1, unk 2         lower case, ASCII punctuation dropped, white space collapsed
gemma   ``x <eos>``      pad 0, eos 1, unk 3         lower case (no ``<bos>``, as in SigLIP 2)
======  ===============  ==========================  =================================================================

mt5's cleaning is that of transformers' ``SiglipTokenizer`` with its defaults. That class also *pads* with EOS; here the
padding is ``<pad>`` as in mT5's own tokenizer, so that every style has exactly one EOS per row.
"""

import io
import logging
import math
import re
import string
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import torch

from mc2_hpc.errors import UserError, first_line
from mc2_hpc.reading.files import read_bytes
from mc2_hpc.storage import atomic_path

logger = logging.getLogger(__name__)

LONGEST_BYTES = 4192
"""Of a caption that a tokenizer is trained on: sentencepiece's own limit, which it applies without a word."""
MOST_BYTES = 256 << 20
"""Of a sentencepiece model file: about 250 bytes for each of a million pieces."""

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_WIDTH_MULTIPLE = 8


def _canonicalise(text: str) -> str:
    return " ".join(text.lower().translate(_NO_PUNCTUATION).split())


@dataclass(frozen=True)
class _Style:
    model_ids: dict[str, int]
    """Where the sentencepiece file must have its special pieces."""
    shift: int
    """Added to the file's ids to make ours."""
    prefix: tuple[int, ...]
    eos: int
    pad: int
    unk: int
    added: int
    """Ids beyond the file's pieces."""
    clean: Callable[[str], str] | None
    trainer: dict[str, Any]
    """Options for the sentencepiece trainer that give the file this layout."""


_UNIGRAM = {"model_type": "unigram", "normalization_rule_name": "nmt_nfkc", "byte_fallback": False}
STYLES = {
    "xlmv": _Style(
        model_ids={"unk": 0, "bos": 1, "eos": 2},
        shift=1,
        prefix=(0,),
        eos=2,
        pad=1,
        unk=3,
        added=2,
        clean=None,
        trainer={**_UNIGRAM, "unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": -1},
    ),
    "mt5": _Style(
        model_ids={"pad": 0, "eos": 1, "unk": 2},
        shift=0,
        prefix=(),
        eos=1,
        pad=0,
        unk=2,
        added=0,
        clean=_canonicalise,
        trainer={**_UNIGRAM, "pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1},
    ),
    "gemma": _Style(
        model_ids={"pad": 0, "eos": 1, "bos": 2, "unk": 3},
        shift=0,
        prefix=(),
        eos=1,
        pad=0,
        unk=3,
        added=0,
        clean=str.lower,
        trainer={
            "model_type": "bpe",
            "normalization_rule_name": "identity",
            "byte_fallback": True,
            "add_dummy_prefix": False,
            "remove_extra_whitespaces": False,
            "allow_whitespace_only_pieces": True,
            "split_digits": True,
            "pad_id": 0,
            "eos_id": 1,
            "bos_id": 2,
            "unk_id": 3,
            "pad_piece": "<pad>",
            "eos_piece": "<eos>",
            "bos_piece": "<bos>",
        },
    ),
}


class Tokenizer:
    """A sentencepiece model file read in one of this module's id layouts; picklable, workers reload the file.

    Args:
        model_file: the sentencepiece model (``sentencepiece.bpe.model``, ``spiece.model``, ``tokenizer.model``).
        style: ``xlmv``, ``mt5`` or ``gemma``.
        context_length: most tokens in a row, special tokens included.

    Attributes:
        vocab_size: number of ids, and so of rows in the model's token table: the file's pieces, and for ``xlmv`` two
            more (the fairseq shift and ``<mask>``). XLM-V's 901,627 pieces make 901,629.
        eos_id, pad_id: ids of the end of a caption and of the padding after it.
        unk_id: id of characters that the vocabulary lacks, if it has no bytes for them.
        room: most tokens of a caption besides the special ones.

    Raises:
        UserError: the file is missing, is not a sentencepiece model, has another style's layout, or could turn the
            characters of a special token in a caption into that token.
    """

    def __init__(self, model_file: str | Path, style: str, context_length: int = 77) -> None:
        if style not in STYLES:
            raise UserError(f"tokenizer style {style!r}: choose one of {', '.join(STYLES)}")
        self.model_file = Path(model_file)
        self.style = style
        self.context_length = context_length
        self._style = STYLES[style]
        self._model = _load_model(self.model_file)
        _check_layout(self._model, self.model_file, style)
        self.vocab_size = self._model.get_piece_size() + self._style.added
        self.eos_id = self._style.eos
        self.pad_id = self._style.pad
        self.unk_id = self._style.unk
        self.room = context_length - len(self._style.prefix) - 1
        if self.room < 1:
            raise UserError(f"context_length={context_length}: needs room for a token besides the special ones")

    def encode(self, texts: Sequence[str], *, pad_to_context: bool = False) -> torch.Tensor:
        """Token ids of ``texts``: int64 ``(len(texts), width)``, truncated to the context length with the EOS kept.

        ``width`` is the longest row rounded up to a multiple of 8, at most ``context_length``; with ``pad_to_context``
        it is ``context_length``.
        """
        style = self._style
        rows = self.content(texts, most=self.room)
        start = len(style.prefix)
        longest = max(map(len, rows), default=0) + start + 1
        width = min(self.context_length, math.ceil(longest / _WIDTH_MULTIPLE) * _WIDTH_MULTIPLE)
        ids = np.full((len(rows), self.context_length if pad_to_context else width), style.pad, dtype=np.int64)
        ids[:, :start] = style.prefix
        for out, content in zip(ids, rows, strict=True):
            end = start + len(content)
            out[start:end] = content
            out[end] = style.eos
        return torch.from_numpy(ids)

    def content(self, texts: Sequence[str], *, most: int | None = None) -> list[list[int]]:
        """Token ids of each text without special tokens, at most ``most`` of them."""
        style = self._style
        cleaned = list(texts) if style.clean is None else [style.clean(text) for text in texts]
        # One thread: loader workers provide the parallelism, and sentencepiece would use every core in each of them.
        rows = [row[:most] for row in self._model.encode(cleaned, out_type=int, num_threads=1)]
        if not style.shift:
            return rows
        file_unk = style.model_ids["unk"]
        return [[piece + style.shift if piece != file_unk else style.unk for piece in row] for row in rows]

    @property
    def byte_ids(self) -> list[int]:
        """Ids of single bytes, which stand for characters that the vocabulary lacks; none without byte fallback."""
        return [
            piece + self._style.shift for piece in range(self._model.get_piece_size()) if self._model.is_byte(piece)
        ]

    def __getstate__(self) -> tuple[Path, str, int]:
        return self.model_file, self.style, self.context_length

    def __setstate__(self, state: tuple[Path, str, int]) -> None:
        self.__init__(*state)  # type: ignore[misc]


def _load_model(path: Path) -> sentencepiece.SentencePieceProcessor:
    if not path.is_file():
        raise UserError(f"{path}: no such sentencepiece model file (data.tokenizer)")
    model = sentencepiece.SentencePieceProcessor()
    try:
        loaded = model.LoadFromSerializedProto(read_bytes(path, most=MOST_BYTES))
    except (RuntimeError, OSError) as error:
        raise UserError(f"{path}: not a sentencepiece model ({first_line(error)})") from None
    if not loaded or model.get_piece_size() == 0:
        raise UserError(f"{path}: not a sentencepiece model")
    return model


def _check_layout(model: sentencepiece.SentencePieceProcessor, path: Path, style: str) -> None:
    # These are -1 unless the piece is a *control* piece, which sentencepiece never produces from text. If "</s>" were
    # an ordinary or user-defined piece, a caption that spells it would end early, so that is refused here.
    found = {"unk": model.unk_id(), "bos": model.bos_id(), "eos": model.eos_id(), "pad": model.pad_id()}
    wanted = STYLES[style].model_ids
    if any(found[name] != wanted[name] for name in wanted):
        shown = ", ".join(f"{name} {found[name]}" for name in wanted) + " (-1: no such control piece)"
        fits = [name for name, other in STYLES.items() if all(found[k] == v for k, v in other.model_ids.items())]
        hint = f"; it fits style {' or '.join(fits)}" if fits else ""
        raise UserError(f"{path}: special ids are {shown}, which does not match style {style}{hint}")


def train_tokenizer(
    texts: Iterable[str], out_file: str | Path, *, vocab_size: int, style: str, character_coverage: float = 1.0
) -> Tokenizer:
    """Train a sentencepiece model on ``texts`` and write it to ``out_file``; the same texts give the same bytes.

    ``gemma`` falls back to bytes for characters that are not covered, as Gemma does; ``xlmv`` and ``mt5`` map them to
    ``<unk>``, because transformers' tokenizers of those families have no byte fallback.

    Args:
        texts: captions; ``style``'s cleaning is applied. Those of over :data:`LONGEST_BYTES` are left out, and logged.
        vocab_size: of the resulting tokenizer; texts with little variety give fewer ids.
        character_coverage: share of the texts' characters that get an id; the rarest go without.

    Raises:
        UserError: no texts, or the vocabulary is too small for their characters.
    """
    if style not in STYLES:
        raise UserError(f"tokenizer style {style!r}: choose one of {', '.join(STYLES)}")
    clean = STYLES[style].clean
    num_long = 0

    def sentences() -> Iterator[str]:
        nonlocal num_long
        for text in texts:
            sentence = " ".join((clean(text) if clean else text).split("\n"))
            if len(sentence.encode("utf-8", "surrogatepass")) > LONGEST_BYTES:
                num_long += 1
            else:
                yield sentence

    out = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sentences(),
            max_sentence_length=LONGEST_BYTES,
            model_writer=out,
            vocab_size=vocab_size - STYLES[style].added,
            character_coverage=character_coverage,
            hard_vocab_limit=False,
            num_threads=1,  # float sums depend on how the sentences are divided among threads
            minloglevel=2,
            **STYLES[style].trainer,
        )
    except (RuntimeError, OSError) as error:
        # The trainer's messages read "INTERNAL: file(line) [condition] sentence"; the sentence may be empty.
        sentence = re.search(r"\] (\S.*)$", str(error).strip())
        reason = sentence[1] if sentence else "they are empty"
        raise UserError(f"{out_file}: no tokenizer of {vocab_size} ids fits these texts: {reason}") from None
    if num_long:
        logger.warning("%s: not trained on captions of over %d bytes: %d", out_file, LONGEST_BYTES, num_long)
    with atomic_path(out_file) as temporary:
        temporary.write_bytes(out.getvalue())
    return Tokenizer(out_file, style)
