"""How the members of a shard form samples, for every command that reads shards.

A member's *role* follows from its extension, in any case: an image, a caption (``.txt``), or a record (``.json``) that
may hold captions and their language. Members of one sample share a **key**: the name up to its last dot, so a key may
itself contain dots (``DSC.0001.jpg``, ``DSC.0001.txt``). Keys are compared in Unicode NFC, because macOS writes names
decomposed.

Files left without a partner are matched again by WebDataset's rule, up to the *first* dot of the file name. So named
parts (``000001.input.jpg``, ``000001.output.txt``) make a sample if there is one image among them, and
``000001.mask.png`` beside ``000001.jpg`` is another image of sample ``000001`` rather than a sample of its own.

Hidden files (``.DS_Store``, macOS's ``._`` twins) are ignored.
"""

import json
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, TypeVar

from mc2_hpc.drops import Drop, Dropped
from mc2_hpc.tar import ByteSource, Member, escapes, list_members

JPEG_EXTENSIONS = ("jpg", "jpeg", "jpe", "jfif")
IMAGE_EXTENSIONS = (
    *(*JPEG_EXTENSIONS, "png", "webp", "avif", "gif", "bmp", "dib", "tif", "tiff"),
    *("jp2", "j2k", "ppm", "pgm", "pbm", "pnm", "tga", "ico"),
)
"""Images that Pillow decodes; if a sample has several, the one whose extension comes first here is used."""
UNSUPPORTED_EXTENSIONS = ("jxl", "heic", "heif", "svg", "psd", "raw", "cr2", "nef", "dng")
"""Images that Pillow does not decode; listed so that they are counted rather than treated as other data."""
CAPTION_EXTENSION, RECORD_EXTENSION = "txt", "json"

LARGEST_RECORD = 1 << 20
"""Largest caption or record, in bytes, that is read."""
MOST_CAPTIONS = 64
"""Most captions that are read from one record."""

Value = TypeVar("Value")

_RANK = {extension: rank for rank, extension in enumerate(IMAGE_EXTENSIONS)}


class Caption(NamedTuple):
    """A caption and its language; ``lang`` is empty if the sample does not name one."""

    text: str
    lang: str = ""


@dataclass
class Sample:
    """The members of one sample; each may be absent."""

    key: str
    image: Member | None = None
    caption: Member | None = None
    record: Member | None = None

    def is_complete(self) -> bool:
        """Whether there is an image and a member that may hold its caption."""
        return self.image is not None and (self.caption is not None or self.record is not None)


@dataclass
class Listing:
    """What a tar holds."""

    samples: dict[str, Sample] = field(default_factory=dict)
    """By key in NFC, in order of first occurrence."""
    drops: Counter[str] = field(default_factory=Counter)
    """Members that could be part of a sample but are not, by reason."""
    others: Counter[str] = field(default_factory=Counter)
    """Endings (after the first dot of the file name) of all other members."""

    def describe_others(self) -> str:
        """What the tar holds instead and what was looked for, for a message about a tar without samples."""
        shown = ", ".join(f"{count} *.{ending}" for ending, count in self.others.most_common(4))
        wanted = f"looked for an image (.{', .'.join(IMAGE_EXTENSIONS[:6])}, ...) with a .{CAPTION_EXTENSION} or "
        return f"holds {shown or 'no files'}; {wanted}.{RECORD_EXTENSION} of the same name"


def list_samples(source: ByteSource) -> Listing:
    """The samples of a tar.

    Raises:
        TarError, OSError: see :func:`mc2_hpc.tar.list_members`.
    """
    return group_members(list_members(source))


def group_members(members: Iterable[Member]) -> Listing:
    """Group ``members`` into samples by the rules at the top of this file.

    The first of several members with the same name is kept.
    """
    listing = Listing()
    unsupported: set[str] = set()
    for member in safe_members(members, listing.drops):
        if not member.name.rpartition("/")[2].startswith("."):
            _add(listing, member, unsupported)
    if any(sample.caption or sample.record for sample in listing.samples.values()):
        _join_parts(listing)  # otherwise the captions are in a table, by key
    for key in unsupported:
        sample = listing.samples.get(key)
        if sample is not None and sample.image is None:
            del listing.samples[key]  # already counted, with its image
    return listing


def safe_members(members: Iterable[Member], drops: Counter[str]) -> Iterator[Member]:
    """The members without a leading ``./``; names that lead out of their folder are counted in ``drops``."""
    for member in members:
        member = member._replace(name=member.name.removeprefix("./"))
        if member.name and not escapes(member.name):
            yield member
        else:
            drops[Drop.NAME_UNSAFE] += 1


def pairing_key(key: str) -> str:
    """The form in which keys are compared: NFC."""
    return key if key.isascii() else unicodedata.normalize("NFC", key)


class ByKey(Generic[Value]):
    """Look-up by key when one side has the keys in a table and the other in file names.

    Keys are compared by :func:`pairing_key`. If that finds nothing, all-digit keys are compared by value: a table may
    hold 12 where the file is ``000012.jpg``. A value that two names share finds nothing.
    """

    def __init__(self, pairs: Iterable[tuple[str, Value]]) -> None:
        self._exact = {pairing_key(key): value for key, value in pairs}
        self._numbers: dict[int, Value | None] | None = None

    def get(self, key: str) -> Value | None:
        """The value for ``key``, or None."""
        found = self._exact.get(pairing_key(key))
        if found is None and _is_number(key):
            if self._numbers is None:
                self._numbers = {}
                for name, value in self._exact.items():
                    if _is_number(name):
                        self._numbers[int(name)] = None if int(name) in self._numbers else value
            found = self._numbers.get(int(key))
        return found


def _is_number(key: str) -> bool:
    return len(key) <= 18 and key.isascii() and key.isdecimal()


def is_image_name(name: str) -> bool:
    """Whether a file name has the extension of an image that can be decoded."""
    return name.rpartition(".")[2].lower() in _RANK and not name.rpartition("/")[2].startswith(".")


def _add(listing: Listing, member: Member, unsupported: set[str]) -> None:
    stem, dot, extension = member.name.rpartition(".")
    extension = extension.lower()
    if not dot or not stem.rpartition("/")[2]:
        listing.others["(no ending)"] += 1
    elif extension in _RANK:
        sample = _sample(listing, stem)
        if sample.image is not None:
            listing.drops[Drop.IMAGE_REPEATED] += 1
        if sample.image is None or _rank(member) < _rank(sample.image):
            sample.image = member
    elif extension == CAPTION_EXTENSION:
        sample = _sample(listing, stem)
        sample.caption = sample.caption or member
    elif extension == RECORD_EXTENSION:
        sample = _sample(listing, stem)
        sample.record = sample.record or member
    elif extension in UNSUPPORTED_EXTENSIONS:
        listing.drops[Drop.IMAGE_UNSUPPORTED] += 1
        unsupported.add(pairing_key(stem))
    else:
        listing.others[member.name.rpartition("/")[2].partition(".")[2]] += 1


def _sample(listing: Listing, key: str) -> Sample:
    return listing.samples.setdefault(pairing_key(key), Sample(key))


def _rank(member: Member) -> int:
    return _RANK[member.name.rpartition(".")[2].lower()]


def _join_parts(listing: Listing) -> None:
    """Regroup incomplete samples whose stem contains a dot by their name up to the first dot."""
    loose: dict[str, list[str]] = {}
    for key, sample in listing.samples.items():
        if not sample.is_complete() and "." in key.rpartition("/")[2]:
            loose.setdefault(_up_to_first_dot(key), []).append(key)
    for key, keys in loose.items():
        whole = listing.samples.get(key)
        parts = [listing.samples[part] for part in keys]
        if whole is not None and whole.image is not None:
            for part in (part for part in parts if part.image is not None and part.caption is None):
                del listing.samples[pairing_key(part.key)]
                listing.drops[Drop.IMAGE_REPEATED] += 1
        elif whole is None and sum(part.image is not None for part in parts) == 1 and len(parts) > 1:
            joined = Sample(_up_to_first_dot(parts[0].key))
            for part in parts:
                joined.image = joined.image or part.image
                joined.caption = joined.caption or part.caption
                joined.record = joined.record or part.record
                del listing.samples[pairing_key(part.key)]
            listing.samples[key] = joined


def _up_to_first_dot(key: str) -> str:
    folder, slash, name = key.rpartition("/")
    return folder + slash + name.partition(".")[0]


def captions_of(caption: bytes | None, record: bytes | None) -> list[Caption]:
    """The captions of a sample from its ``.txt`` and its ``.json``; at least one, none of them empty.

    A ``.txt`` is one caption and takes precedence over the record, which then gives only its language; a record that
    cannot be read gives none. Without a ``.txt``, a record has its caption under ``caption``, else ``text``, or several
    under ``captions`` or ``texts``: a list of strings, or of ``[kind, text]`` as MetaCLIP writes them. ``lang`` is the
    language of all of them.

    Raises:
        Dropped: there is no usable caption.
    """
    if caption is not None:
        return [Caption(usable_text(caption), _language_beside(record))]
    fields = parse_record(record) if record is not None else {}
    lang = _language_in(fields)
    names = ("caption", "text", "captions", "texts")
    found: Any = next((fields[name] for name in names if name in fields), [])
    return [Caption(text, lang) for text in usable_texts(found)]


def _language_in(fields: dict[str, Any]) -> str:
    lang = fields.get("lang")
    return lang if isinstance(lang, str) else ""


def _language_beside(record: bytes | None) -> str:
    """The language that the record beside a ``.txt`` names. Damage to the record does not cost the caption."""
    if record is None or not names_language(record):
        return ""
    try:
        return _language_in(parse_record(record))
    except Dropped:
        return ""


def usable_texts(value: Any) -> list[str]:
    """The captions in a value of a record: text, or a list of texts or of ``[kind, text]``; at least one, none empty.

    Raises:
        Dropped: there is no usable caption.
    """
    texts = list(texts_in(value)) if value is not None else [""]  # null counts as an empty caption
    if not texts:
        raise Dropped(Drop.CAPTION_MISSING)
    usable = [text.strip() for text in texts[:MOST_CAPTIONS] if text.strip()]
    if not usable:
        raise Dropped(Drop.CAPTION_EMPTY)
    for text in usable:
        if not is_unicode(text):
            raise Dropped(Drop.CAPTION_NOT_UTF8, "half of a surrogate pair")
    return list(dict.fromkeys(usable))


def texts_in(value: Any) -> Iterator[str]:
    """The captions in a field of a record: a string, or a list of strings or of ``[kind, text]``."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            text = item[-1] if isinstance(item, list) and len(item) == 2 else item
            if isinstance(text, str):
                yield text


def usable_text(raw: bytes) -> str:
    """A caption as text, stripped of white space.

    Raises:
        Dropped: too large, not UTF-8, or nothing but white space.
    """
    if len(raw) > LARGEST_RECORD:
        raise Dropped(Drop.CAPTION_NOT_UTF8, f"more than {LARGEST_RECORD:,} bytes are not a caption")
    try:
        text = raw.decode().removeprefix("\ufeff").strip()
    except UnicodeDecodeError as error:
        raise Dropped(Drop.CAPTION_NOT_UTF8, str(error)) from None
    if not text:
        raise Dropped(Drop.CAPTION_EMPTY)
    return text


def parse_record(raw: bytes) -> dict[str, Any]:
    """The object in a ``.json`` member.

    Raises:
        Dropped: not UTF-8, not a JSON object, too large, or nested too deeply.
    """
    if len(raw) > LARGEST_RECORD:
        raise Dropped(Drop.CAPTION_NOT_JSON, f"more than {LARGEST_RECORD:,} bytes")
    try:
        value = json.loads(raw.decode().removeprefix("\ufeff"))
    except UnicodeDecodeError as error:
        raise Dropped(Drop.CAPTION_NOT_UTF8, str(error)) from None
    except (ValueError, RecursionError) as error:
        raise Dropped(Drop.CAPTION_NOT_JSON, str(error)) from None
    if not isinstance(value, dict):
        raise Dropped(Drop.CAPTION_NOT_JSON, "not an object")
    return value


def names_language(record: bytes) -> bool:
    """Whether a record may name a language, and so matters beside a ``.txt``; any other is never parsed there."""
    return len(record) <= LARGEST_RECORD and b'"lang"' in record


def is_unicode(text: str) -> bool:
    """Whether a string can be encoded: JSON can spell half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
