"""How a tokenizer divides the captions of each language: fertility, unknown characters, truncation."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mc2_hpc.data.tokenizer import Tokenizer
from mc2_hpc.metadata.languages import LANGUAGES, is_spaced, known_code


@dataclass(frozen=True, kw_only=True)
class LanguageTokens:
    """Figures of one language, or of all captions together. Special tokens are not counted."""

    lang: str
    captions: int
    tokens_per_caption: float
    """The mean."""
    tokens_per_word: float | None
    """Fertility: tokens per run of characters between spaces; None in languages that do not separate words."""
    characters_per_token: float
    unknown: float
    """Share of tokens that are ``<unk>``, where what was written is lost."""
    bytes: float
    """Share of tokens that are single bytes, of characters that the vocabulary lacks."""
    truncated: float
    """Share of captions that do not fit the context length with their special tokens."""

    def to_dict(self) -> dict[str, Any]:
        """The figures by name, for JSON."""
        return asdict(self)


def inspect_tokenizer(tokenizer: Tokenizer, texts: Mapping[str, Sequence[str]]) -> list[LanguageTokens]:
    """Figures of every language in ``texts``, in its order; a language without texts is left out."""
    return [_inspect(tokenizer, lang, captions) for lang, captions in texts.items() if captions]


def _inspect(tokenizer: Tokenizer, lang: str, texts: Sequence[str]) -> LanguageTokens:
    rows = tokenizer.content(texts)
    lengths = np.array([len(row) for row in rows], np.int64)
    tokens = max(1, int(lengths.sum()))
    ids = np.concatenate([np.asarray(row, np.int64) for row in rows])
    words = sum(len(text.split()) for text in texts)
    return LanguageTokens(
        lang=lang,
        captions=len(texts),
        tokens_per_caption=float(lengths.mean()),
        tokens_per_word=int(lengths.sum()) / max(1, words) if is_spaced(known_code(lang, LANGUAGES) or lang) else None,
        characters_per_token=sum(map(len, texts)) / tokens,
        unknown=int((ids == tokenizer.unk_id).sum()) / tokens,
        bytes=int(np.isin(ids, tokenizer.byte_ids).sum()) / tokens,
        truncated=float((lengths > tokenizer.room).mean()),
    )
