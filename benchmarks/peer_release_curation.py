"""The release's stage 1 and sampling loop, reimplemented from their description: JSON in, pyahocorasick, JSON out.

Defects that keep the release from running are fixed here; its language map is left out, as is ours.
"""

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import ahocorasick
import numpy as np
import numpy.typing as npt

from mc2_hpc.metadata.scripts import is_release_punctuation, is_release_unspaced

_WRAPPED = (",", ".", ";", ":", "?", "!", "`")


def spaced(text: str) -> str:
    """The text in the form that the release searches."""
    text = f" {text} "
    for mark in _WRAPPED:
        if mark in text:
            text = text.replace(mark, f" {mark} ")
    return text.replace("\t", " ").replace("\n", " ").replace("\r", " ")


def build_automaton(entries: list[str]) -> Any:
    """Automaton of the entries, with the release's spaces at their ends."""
    automaton = ahocorasick.Automaton()
    for number, entry in enumerate(entries):
        left = "" if _joins(entry[0]) else " "
        right = "" if _joins(entry[-1]) else " "
        automaton.add_word(left + entry + right, number)
    automaton.make_automaton()
    return automaton


def _joins(char: str) -> bool:
    return is_release_unspaced(char) or is_release_punctuation(char)


def match_captions(captions: list[str], automaton: Any) -> list[list[int]]:
    """Unique entry ids of each caption: the matcher without any files."""
    return [list({number for _, number in automaton.iter(spaced(text))}) for text in captions]


def match_shard(shard: Path, valid_keys: Path, out: Path, automata: dict[str, Any]) -> dict[str, Counter[int]]:
    """Stage 1 of one shard: ``{key: [[text, lang], ...]}`` to ``{key: [[text, lang, ids], ...]}``.

    ``valid_keys`` is a JSON list; the release searches the list itself, here it is converted to a set.

    Returns:
        counts of each language's entries
    """
    images = json.loads(shard.read_text(encoding="utf-8"))
    valid = set(json.loads(valid_keys.read_text(encoding="utf-8")))
    votes: dict[str, Counter[int]] = {lang: Counter() for lang in automata}
    matched = {}
    for key, texts in images.items():
        if key not in valid:
            continue
        rows = []
        for text, lang in texts:
            ids = list({number for _, number in automata[lang].iter(spaced(text))})
            if ids:
                votes[lang].update(ids)
                rows.append([text, lang, ids])
        if rows:
            matched[key] = rows
    out.write_text(json.dumps(matched), encoding="utf-8")
    return votes


def sample(images: dict[str, list[list[Any]]], probs: dict[str, npt.NDArray[np.float32]], seed: int) -> list[str]:
    """The sampling loop over matched images in memory: a random text per image, kept or dropped by its entries."""
    rng = random.Random(seed)
    kept = []
    for key, rows in images.items():
        _, lang, ids = rows[rng.randrange(len(rows))]
        if rng.random() < 1 - np.prod(1 - probs[lang][ids]):
            kept.append(key)
    return kept
