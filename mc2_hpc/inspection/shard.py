"""One shard as a run's first epoch reads it, with the loader's own code."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mc2_hpc.config import DataConfig
from mc2_hpc.curation.fetching.stored import is_turned
from mc2_hpc.curation.pool.language_codes import OTHER_CODES
from mc2_hpc.data.decode import TrainTransform, resolve_backend
from mc2_hpc.data.locations import ShardSet
from mc2_hpc.data.remote import CannotReach
from mc2_hpc.data.shards import Shard
from mc2_hpc.data.skips import ShardError
from mc2_hpc.data.stream import Part, ShardPool
from mc2_hpc.data.tokenizer import Tokenizer
from mc2_hpc.drops import Drop, Dropped
from mc2_hpc.errors import UserError
from mc2_hpc.images import image_size, open_image, thumbnail

EPOCH = 0
_TEXTS_AT_ONCE = 4096
_THUMBNAIL = 240
_SKIPPED_SHOWN, _MOST_SKIPPED = 2, 40
"""Skipped samples of each reason that are named: of a shard, and of all."""
_MOST_LANGUAGES, _LONGEST_CODE = 1000, 40
"""A column may hold something else than codes of languages."""
PICTURES = 24
"""Pictures on the page."""


@dataclass(frozen=True)
class LintOptions:
    """What is looked at; picklable."""

    seed: int = 0
    image_size: int = 224
    tokenizer: Path | None = None
    tokenizer_style: str = "xlmv"
    context_length: int = 77
    pictures: int = 0
    """Samples to show of each shard."""


@dataclass(frozen=True)
class Picture:
    """A sample that is shown."""

    key: str
    text: str
    lang: str
    width: int
    height: int
    jpeg: bytes
    """A small copy of the image."""


@dataclass(frozen=True)
class Skip:
    """A sample that is skipped."""

    shard: str
    key: str
    reason: str
    detail: str


@dataclass
class Findings:
    """What was found in one or more shards."""

    shards: int = 0
    unreadable: dict[str, str] = field(default_factory=dict)
    """Shards that cannot be read, with the reason."""
    images: int = 0
    """Distinct keys."""
    kept: int = 0
    """Images that the epoch would train on."""
    skipped: Counter[str] = field(default_factory=Counter)
    """By reason, as a run's metrics count them in its first epoch."""
    captions: Counter[str] = field(default_factory=Counter)
    """Usable captions of each language (:meth:`language`), drawn in the epoch or not."""
    bad_captions: Counter[str] = field(default_factory=Counter)
    """Images of which a caption cannot be used, by reason."""
    short_sides: Counter[int] = field(default_factory=Counter)
    """Images by the pixels of their shorter side."""
    formats: Counter[str] = field(default_factory=Counter)
    turned: int = 0
    """Images with an orientation tag, which training ignores."""
    tokens: dict[str, Counter[int]] = field(default_factory=dict)
    """Captions of each language by their number of tokens, special tokens not counted."""
    skips: list[Skip] = field(default_factory=list)
    """The first ones of each reason."""
    pictures: list[Picture] = field(default_factory=list)
    """The first :data:`PICTURES`."""

    def language(self, lang: str) -> str:
        """The name under which a language is counted: its code or, after a thousand others, :data:`OTHER_CODES`."""
        lang = lang[:_LONGEST_CODE]
        return lang if lang in self.captions or len(self.captions) < _MOST_LANGUAGES else OTHER_CODES

    def add(self, more: "Findings") -> None:
        """Add what was found in other shards."""
        for name in ("shards", "images", "kept", "turned"):
            setattr(self, name, getattr(self, name) + getattr(more, name))
        for name in ("skipped", "bad_captions", "short_sides", "formats"):
            getattr(self, name).update(getattr(more, name))
        self.unreadable |= more.unreadable
        named = Counter(skip.reason for skip in self.skips)
        for skip in more.skips:
            named[skip.reason] += 1
            if named[skip.reason] <= _MOST_SKIPPED:
                self.skips.append(skip)
        self.pictures += more.pictures[: PICTURES - len(self.pictures)]
        for lang, count in more.captions.items():
            self.captions[self.language(lang)] += count
        for lang, lengths in more.tokens.items():
            self.tokens.setdefault(self.language(lang), Counter()).update(lengths)


class ShardReader:
    """Reads shards of a set one by one; each worker process has its own."""

    def __init__(self, shards: ShardSet, options: LintOptions) -> None:
        defaults = DataConfig()
        self._options = options
        self._names = shards.names
        transform = TrainTransform(
            options.image_size,
            defaults.crop_scale,
            options.seed,
            resolve_backend(defaults.decode, "train"),
            defaults.max_image_pixels,
        )
        self._pool = ShardPool(shards, lanes=1, seed=options.seed, probs=None, transform=transform, name="the data")
        self._tokenizer: Tokenizer | None = None
        if options.tokenizer is not None:
            self._tokenizer = Tokenizer(options.tokenizer, options.tokenizer_style, options.context_length)

    def read(self, number: int) -> tuple[Findings, npt.NDArray[np.uint64]]:
        """What is in shard ``number``, and the hashes of its keys, sorted.

        Raises:
            UserError: remote storage cannot be reached.
        """
        found = Findings(shards=1)
        self._pool.skipped.clear()
        try:
            shard = self._pool.open(number)
        except ShardError as error:
            self._pool.log_unreadable(number, error)
            found.skipped[Drop.SHARD_UNREADABLE] += 1
            found.unreadable[self._names[number]] = str(error)
            return found, np.zeros(0, np.uint64)
        except CannotReach as error:
            raise UserError(str(error)) from None
        self._pool.count_shard(shard)
        found.skipped.update(self._pool.skipped)
        found.images = shard.num_keys
        for row in self._pool.rows(shard, Part(number), EPOCH).tolist():
            self._load(number, shard, row, found)
        self._read_captions(shard, found)
        return found, np.unique(shard.row_hashes())

    def _load(self, number: int, shard: Shard, row: int, found: Findings) -> None:
        try:
            example = self._pool.load(number, shard, row, EPOCH)
        except Dropped as dropped:
            found.skipped[dropped.reason] += 1
            if found.skipped[dropped.reason] <= _SKIPPED_SHOWN:
                found.skips.append(Skip(shard.name, shard.row_keys[row], dropped.reason, dropped.detail))
            return
        found.kept += 1
        pair = example.pair
        found.formats[(open_image(pair.image).format or "?").lower()] += 1
        width, height = image_size(pair.image)
        found.short_sides[min(width, height)] += 1
        found.turned += is_turned(bytes(pair.image))
        if len(found.pictures) < self._options.pictures:
            small = thumbnail(pair.image, _THUMBNAIL)
            found.pictures.append(Picture(pair.key, pair.text, pair.lang, width, height, small))

    def _read_captions(self, shard: Shard, found: Findings) -> None:
        """Look at every caption, whatever the epoch draws."""
        texts: dict[str, list[str]] = {}
        for index in range(shard.num_keys):
            try:
                captions = shard.read_captions(index)
            except Dropped as dropped:
                if dropped.reason != Drop.IMAGE_MISSING:
                    found.bad_captions[dropped.reason] += 1
                continue
            for text, code in captions:
                lang = found.language(code)
                found.captions[lang] += 1
                if self._tokenizer is not None:
                    waiting = texts.setdefault(lang, [])
                    waiting.append(text)
                    if len(waiting) == _TEXTS_AT_ONCE:
                        self._count_tokens(lang, texts.pop(lang), found)
        for lang, waiting in texts.items():
            self._count_tokens(lang, waiting, found)

    def _count_tokens(self, lang: str, texts: list[str], found: Findings) -> None:
        assert self._tokenizer is not None
        lengths = map(len, self._tokenizer.content(texts))
        found.tokens.setdefault(lang, Counter()).update(lengths)
