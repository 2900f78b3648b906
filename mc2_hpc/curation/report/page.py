"""``curation.html``: a curation run on one self-contained page, without scripts or network; its plots as PNG too."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from mc2_hpc.curation.report.findings import Findings, LanguageFindings, gather
from mc2_hpc.curation.report.plots import draw_plots, require_matplotlib
from mc2_hpc.curation.report.style import STYLE
from mc2_hpc.storage import atomic_path

_ROWS = 25
_CARDS = 12
_ENTRIES_OF_OTHERS = 5
DROP_REASONS = {
    "no_match": "no entry of its language occurs in it",
    "language_unknown": "no metadata for its language",
    "caption_empty": "blank",
    "caption_repeated": "the same key and text again",
    "caption_not_utf8": "not valid UTF-8",
    "caption_not_json": "a .json without a readable caption",
    "key_missing": "no key",
    "name_unsafe": "a key that would escape its folder",
}
"""What each reason of ``mc2 curate match`` means."""
PACK_DROP_REASONS = {
    "image_missing": "matched, but not in the tar",
    "image_unmatched": "none of its captions matched",
    "name_unsafe": "a name that would escape its folder",
    "name_too_long": "a name too long for a tar header",
    "image_repeated": "the same name again",
    "image_unsupported": "not a JPEG",
}
"""What each reason of ``mc2 curate pack`` means."""


def write_report(run: str | Path, metadata: str | Path) -> Path:
    """Write ``run/report/curation.html`` and its plots, ``*.png`` beside it; returns the page's path.

    Args:
        run: the output folder of ``mc2 curate run``, balanced.
        metadata: the folder it was matched with.

    Raises:
        UserError: not balanced yet, other metadata, or matplotlib is not installed.
    """
    require_matplotlib()
    findings = gather(run, metadata)
    folder = Path(run) / "report"
    plots = draw_plots(findings)
    for name, png in plots.items():
        with atomic_path(folder / f"{name}.png") as temporary:
            temporary.write_bytes(png)
    with atomic_path(folder / "curation.html") as temporary:
        temporary.write_text(render(findings, plots), encoding="utf-8")
    return folder / "curation.html"


def render(findings: Findings, plots: Mapping[str, bytes]) -> str:
    """The page."""
    sections = (
        _header(findings),
        "<main>",
        _languages(findings, plots["languages"]),
        _head_tail(findings, plots["head_tail"], plots["thresholds"]),
        _entries(findings),
        _drops(findings),
        _card(findings),
        "</main>",
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Curation report</title><style>{STYLE}</style></head><body>" + "\n".join(sections) + "</body></html>\n"
    )


def _header(findings: Findings) -> str:
    balance = findings.balance
    totals = balance["totals"]
    tiles = (
        (_short(totals["rows"]), "captions in the pool"),
        (_short(totals["matched"]), f"matched, {_share(totals['matched'] / max(totals['rows'], 1))} of them"),
        (_short(totals["images"]), "images with a match"),
        (str(len(findings.languages)), "languages"),
        (_short(findings.expected_texts), "texts expected to pass balancing"),
        (
            f"{_share(balance['english_share_before'])} &rarr; {_share(balance['english_share_after'])}",
            "English among the texts, before and after",
        ),
    )
    drawn = "".join(f'<div class="tile"><b>{value}</b><span>{label}</span></div>' for value, label in tiles)
    return f"""<header><div><div class="kicker">mc2 curate</div><h1>What curation keeps, and why</h1>
<p class="lead">{totals["matched"]:,} of {totals["rows"]:,} captions matched an entry of their language's metadata.
Balancing thins the frequent entries of each language and leaves the rare ones alone.</p>
<div class="tiles">{drawn}</div></div></header>"""


def _languages(findings: Findings, plot: bytes) -> str:
    first, rest = findings.languages[:_ROWS], findings.languages[_ROWS:]
    more = (
        f"<details><summary>{len(rest)} more languages, {_share(sum(row.share_before for row in rest))} of the texts"
        f"</summary>{_language_table(rest)}</details>"
        if rest
        else ""
    )
    without = findings.balance["languages_without_matches"]
    silent = (
        f"<details><summary>Metadata without a match: {len(without)}</summary><table>"
        + "".join(f"<tr><td>{escape(lang)}</td><td>{escape(reason)}</td></tr>" for lang, reason in without.items())
        + "</table></details>"
        if without
        else ""
    )
    return f"""<section><div class="kicker">Languages</div><h2>Before and after balancing</h2>
<p class="soft">Share of each language in the matched texts, and in those expected to pass. A language whose texts
repeat few entries loses most.</p>{_figure(plot, "Share of each language before and after balancing")}
{_language_table(first)}{more}{silent}</section>"""


def _language_table(languages: Sequence[LanguageFindings]) -> str:
    rows = "".join(
        f"<tr><td>{escape(row.name)} <code>{escape(row.code)}</code></td>"
        + _numbers(f"{row.texts:,}", f"{row.images:,}", f"{row.matches:,}", f"{row.expected_texts:,.0f}")
        + f'<td class="num"><span class="meter"><i style="width:{row.kept:.1%}"></i></span> {_share(row.kept)}</td>'
        + _numbers(
            _share(row.share_before),
            _share(row.share_after),
            f"{row.threshold:,}",
            _share(row.tail_mass),
            f"{row.entries_head:,} / {row.entries_matched:,} / {row.entries:,}",
        )
        + "</tr>"
        for row in languages
    )
    names = (
        *("texts", "images", "matches", "expected texts", "kept", "share before", "after", "t", "tail mass"),
        "entries: head / matched / all",
    )
    heads = "".join(f'<th class="num">{name}</th>' for name in names)
    return (
        f'<div class="wide"><table><thead><tr><th>language</th>{heads}</tr></thead><tbody>{rows}</tbody></table></div>'
    )


def _head_tail(findings: Findings, curves: bytes, thresholds: bytes) -> str:
    balance = findings.balance
    return f"""<section><div class="kicker">Head and tail</div><h2>Where the matches fall</h2>
<p class="soft">Entries sorted by the number of texts they occur in. English's threshold is set by hand,
t = {balance["t_en"]:,}; entries counted fewer times hold p = {_share(balance["p"])} of its matches (dashed). Every
other language gets the threshold that comes closest to the same share: the shaded tail is always kept, the rest is
thinned to about t texts an entry.</p>{_figure(curves, "Cumulative share of matches over entries sorted by count")}
<h3>Threshold of each language</h3>
{_figure(thresholds, "Threshold of each language over its matched texts")}</section>"""


def _entries(findings: Findings) -> str:
    first, rest = findings.languages[:_CARDS], findings.languages[_CARDS:]
    cards = "".join(
        f'<div class="card"><h3>{escape(language.name)} <code>{escape(language.code)}</code></h3><table>'
        "<thead><tr><th>entry</th>"
        '<th class="num">texts</th><th class="num">probability</th></tr></thead><tbody>'
        + "".join(
            f"<tr><td>{_entry(top.entry, language.code)}</td>"
            f"{_numbers(f'{top.count:,}', f'{top.probability:.3g}')}</tr>"
            for top in language.top
        )
        + "</tbody></table></div>"
        for language in first
    )
    lines = "".join(
        f"<tr><td>{escape(language.name)} <code>{escape(language.code)}</code></td><td>"
        + ", ".join(
            f'{_entry(top.entry, language.code)} <span class="soft">{top.count:,}&nbsp;&times;&nbsp;'
            f"{top.probability:.2g}</span>"
            for top in language.top[:_ENTRIES_OF_OTHERS]
        )
        + "</td></tr>"
        for language in rest
    )
    more = f"<details><summary>{len(rest)} more languages</summary><table>{lines}</table></details>" if rest else ""
    return f"""<section><div class="kicker">Entries</div><h2>The head of each language</h2>
<p class="soft">The most frequent entries, the texts they occur in, and the probability that a match with one of them
lets a text pass.</p><div class="cards">{cards}</div>{more}</section>"""


def _drops(findings: Findings) -> str:
    captions = _reasons(findings.drops, DROP_REASONS, findings.balance["totals"]["rows"])
    packed = ""
    if findings.pack is not None:
        drops, images = findings.pack["drops"], findings.pack["images"]
        packed = f"""<h3>Images left out when packing; {images:,} were packed</h3>
<table>{_reasons(drops, PACK_DROP_REASONS, images + sum(drops.values()))}</table>"""
    return f"""<section><div class="kicker">Left out</div><h2>What was dropped, and why</h2>
<h3>Captions dropped before balancing</h3><table>{captions}</table>{packed}</section>"""


def _reasons(drops: Mapping[str, int], meanings: Mapping[str, str], total: int) -> str:
    """Table rows, most frequent reason first; shares are of ``total``."""
    most = max(drops.values(), default=1)
    rows = "".join(
        f"<tr><td><code>{escape(reason)}</code></td><td>{escape(meanings.get(reason, ''))}</td>"
        f'<td class="meters"><span class="meter"><i style="width:{count / most:.1%}"></i></span></td>'
        f"{_numbers(f'{count:,}', _share(count / total))}</tr>"
        for reason, count in sorted(drops.items(), key=lambda drop: (-drop[1], drop[0]))
        if count
    )
    return rows or "<tr><td>nothing</td></tr>"


def _card(findings: Findings) -> str:
    balance = findings.balance
    hashes = balance["sources"]["metadata"]
    whole = hashlib.sha256("".join(f"{lang} {hashes[lang]}\n" for lang in sorted(hashes)).encode()).hexdigest()
    facts = (
        ("matching rules", balance["mode"]),
        ("t of English", f"{balance['t_en']:,}"),
        ("tail mass p", f"{balance['p']:.6g}"),
        ("shards", f"{balance['totals']['shards']:,}"),
        ("language identification", balance["sources"]["language_id"]),
        ("metadata", f"{len(hashes)} languages, SHA-256 of their list {whole}"),
    )
    rows = "".join(f"<tr><td>{name}</td><td>{escape(value)}</td></tr>" for name, value in facts)
    counts = balance["sources"]["counts"]
    files = "".join(
        f"<tr><td><code>{escape(lang)}</code></td><td><code>{hashes[lang]}</code></td>"
        f"<td><code>{counts.get(lang, '')}</code></td></tr>"
        for lang in sorted(hashes)
    )
    return f"""<section><div class="kicker">Data card</div><h2>What it was made from</h2><table>{rows}</table>
<details><summary>SHA-256 of every language's metadata and counts</summary><div class="wide"><table>
<thead><tr><th></th><th>metadata</th><th>counts</th></tr></thead><tbody>{files}</tbody></table></div></details></section>"""


def _figure(png: bytes, alt: str) -> str:
    return f'<figure><img alt="{escape(alt)}" src="data:image/png;base64,{base64.b64encode(png).decode()}"></figure>'


def _numbers(*values: str) -> str:
    return "".join(f'<td class="num">{value}</td>' for value in values)


def _entry(entry: str, lang: str) -> str:
    return f'<bdi lang="{escape(lang.replace("_", "-"), quote=True)}">{escape(entry)}</bdi>'


def _share(share: float) -> str:
    """Three digits of a percentage, and no more than are needed."""
    digits = 0 if share >= 0.9995 or share == 0 else 1 if share >= 0.01 else 2 if share >= 0.001 else 4
    return f"{share:.{digits}%}"


def _short(value: float) -> str:
    """``812``, ``18.3k``, ``4.21M``, ``10.7B``."""
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.3g}{unit}"
    return f"{value:.0f}"
