"""What a build reports about sources that its languages lacked, and about wordnets with markup in them."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

_NAMED = 20
"""Most languages named in one line."""
_NUM_DIGITS = 100


def shortfalls(card: Mapping[str, Any], built: Collection[str]) -> list[str]:
    """Readable lines: each kind of source with the languages that lacked it, then warnings.

    Args:
        card: as :func:`mc2_hpc.metadata.build.build_folder` returns it.
        built: curation languages to report on.
    """
    languages = {lang: card["languages"][lang] for lang in sorted(built) if lang in card["languages"]}
    parts = {code: facts for row in languages.values() for code, facts in row["wikipedias"].items()}
    lines = []
    for kind in ("wordnet", "corpus", "titles"):
        if lacking := [code for code, facts in parts.items() if kind in facts["lacks"]]:
            lines.append(f"no {kind}: {len(lacking)} of {len(parts)} ({_named(lacking)})")
    for code, facts in parts.items():
        lemmas = facts.get("lemmas", {"cleaned": 0, "refused": 0})
        if lemmas["cleaned"] or lemmas["refused"]:
            line = f"{code}: markup in the wordnet: {lemmas['cleaned']:,} lemmas cleaned, {lemmas['refused']:,} refused"
            lines.append(line + (f" ({_named([repr(e) for e in lemmas['examples']])})" if lemmas["refused"] else ""))
    if digits := [lang for lang, row in languages.items() if row["entries"] <= _NUM_DIGITS and _only_numbers(row)]:
        lines.append(
            f"warning: only the digits 0-99 in {len(digits)} of {len(languages)} languages ({_named(digits)}): "
            "too little text, or no file is named as docs/metadata.md says"
        )
    return lines


def _only_numbers(row: Mapping[str, Any]) -> bool:
    counts = [facts["by_source"] for facts in row["wikipedias"].values()]
    return all(not number for sources in counts for source, number in sources.items() if source != "numbers")


def _named(names: Sequence[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")
