"""Map the language codes of a pool to those of its metadata."""

from collections import Counter
from collections.abc import Collection

import pyarrow as pa

from mc2_hpc.errors import UserError
from mc2_hpc.metadata.languages import is_language_code, known_code

NO_CODE, OTHER_CODES = "(none)", "(others)"
_LISTED = 50
"""Most codes counted individually; this bounds the counters for a column that does not hold codes."""
_MAX_CHARS = 40


def in_known_languages(rows: pa.Table, known: Collection[str]) -> tuple[pa.Table, Counter[str]]:
    """Rows in a language that has metadata, with its code in ``lang``, and the other rows counted by their own code.

    Args:
        rows: with a column ``lang`` of strings, which may be null.
        known: languages that have metadata; :func:`mc2_hpc.metadata.languages.known_code` maps codes to them.
    """
    encoded = rows["lang"].combine_chunks().dictionary_encode(null_encoding="encode")
    written = encoded.dictionary.to_pylist()
    codes = [known_code(code, known) or None for code in written]
    counts = encoded.indices.value_counts().to_pylist()
    unknown: Counter[str] = Counter()
    for row in counts:
        if codes[row["values"]] is None:
            unknown[(written[row["values"]] or NO_CODE)[:_MAX_CHARS]] += row["counts"]
    if codes != written:
        langs = pa.array(codes, rows["lang"].type).take(encoded.indices)
        rows = rows.set_column(rows.column_names.index("lang"), "lang", langs)
    return rows.filter(rows["lang"].is_valid()), bounded(unknown)


def split_codes(joined: str) -> list[str]:
    """The codes of a list such as ``en,pt,zh``.

    Raises:
        UserError: one of them is no language's.
    """
    codes = [code.strip() for code in joined.split(",")]
    for code in codes:
        if not is_language_code(code):
            raise UserError(f"{code[:_MAX_CHARS]!r} is not the code of a language; write a list such as en,pt,zh")
    return codes


def is_in_languages(rows: pa.Table, codes: Collection[str]) -> pa.Array:
    """Which rows (bool) have a ``lang`` that means one of the languages, by whatever code.

    Args:
        rows: with a column ``lang`` of strings without nulls.
    """
    encoded = rows["lang"].combine_chunks().dictionary_encode()
    is_in = pa.array([known_code(lang, codes) in codes for lang in encoded.dictionary.to_pylist()], pa.bool_())
    return is_in.take(encoded.indices)


def bounded(unknown: Counter[str]) -> Counter[str]:
    """The same counts with only the most frequent codes, and the rest under :data:`OTHER_CODES`."""
    if len(unknown) <= _LISTED:
        return unknown
    ranked = sorted(unknown.items(), key=lambda code: (code[0] == OTHER_CODES, -code[1], code[0]))
    listed, rest = ranked[: _LISTED - 1], ranked[_LISTED - 1 :]
    return Counter({**dict(listed), OTHER_CODES: sum(captions for _, captions in rest)})
