"""The findings of ``mc2 data lint``, and samples, as pages with pictures that need no other file."""

from collections.abc import Sequence
from pathlib import Path

from mc2_hpc.inspection.lint import Lint, quantile
from mc2_hpc.inspection.show import ShownSample
from mc2_hpc.pages import data_uri, write_page
from mc2_hpc.pages.reasons import reason_rows

_PACKAGE = "mc2_hpc.inspection"
_ROWS = 40
_BANDS = (0, 32, 64, 128, 224, 336, 512, 1024, 2048)


def write_lint_page(path: Path, data: str, lint: Lint) -> Path:
    """Write what was found in ``data`` to ``path``; returns it."""
    found = lint.findings
    values = {
        "data": data,
        "found": found,
        "lint": lint,
        "skipped": reason_rows(found.skipped, found.images),
        "bad_captions": reason_rows(found.bad_captions, found.images),
        "captions": found.captions.total(),
        "languages": found.captions.most_common(_ROWS),
        "num_languages": len(found.captions),
        "bands": _bands(found.short_sides),
        "tokens": [
            (lang, lengths.total(), quantile(lengths, 0.5), max(lengths), lint.truncated(lang))
            for lang, lengths in sorted(found.tokens.items(), key=lambda item: -item[1].total())
        ],
        "rows": _ROWS,
        "pictures": [(picture, data_uri(picture.jpeg, "image/jpeg")) for picture in found.pictures],
    }
    return write_page(path, _PACKAGE, "lint.html", values)


def write_samples_page(path: Path, data: str, samples: Sequence[ShownSample]) -> Path:
    """Write samples to ``path``; returns it."""
    shown = [(sample, data_uri(sample.jpeg, "image/jpeg") if sample.jpeg else "") for sample in samples]
    return write_page(path, _PACKAGE, "samples.html", {"data": data, "samples": shown})


def _bands(sides: dict[int, int]) -> list[tuple[str, int, float]]:
    """Images by their shorter side: a label, the number, and its share of all."""
    total = max(1, sum(sides.values()))
    bands = []
    for low, high in zip(_BANDS, (*_BANDS[1:], None), strict=True):
        count = sum(n for side, n in sides.items() if side >= low and (high is None or side < high))
        bands.append((f"{low} to {high - 1}" if high else f"{low} or more", count, count / total))
    return bands
