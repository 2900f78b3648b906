"""Charts as inline SVG: no fonts, no scripts, no network; colours are the page's CSS variables.

Every function takes data and returns markup. Text in them is numbers and Latin words; captions stay in HTML, where the
browser shapes every script.
"""

import math
import sys
from collections.abc import Sequence
from html import escape

Point = tuple[float, float]

_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 14, 14, 34


def line_chart(
    points: Sequence[Point],
    *,
    x_label: str,
    y_label: str,
    width: int = 520,
    height: int = 260,
    from_zero: bool = True,
    smooth: Sequence[Point] = (),
) -> str:
    """A line over labelled axes; with ``smooth``, ``points`` are drawn faintly and ``smooth`` over them.

    Args:
        points: (x, y), x ascending; at least one.
        from_zero: whether the y axis starts at 0.
    """
    xs, ys = [x for x, _ in points], [y for _, y in points]
    x_low, x_high = min(xs), max(max(xs), min(xs) + 1e-9)
    y_ticks = nice_ticks(0.0 if from_zero else min(ys), max(ys))
    y_low, y_high = y_ticks[0], y_ticks[-1]

    def place(x: float, y: float) -> Point:
        return (
            _LEFT + (x - x_low) / (x_high - x_low) * (width - _LEFT - _RIGHT),
            height - _BOTTOM - (y - y_low) / (y_high - y_low) * (height - _TOP - _BOTTOM),
        )

    parts = []
    for tick in y_ticks:
        _, y = place(x_low, tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{width - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{short_number(tick)}</text>')
    for tick in nice_ticks(x_low, x_high):
        if x_low <= tick <= x_high:
            x, _ = place(tick, y_low)
            parts.append(f'<text x="{x:.1f}" y="{height - 14}" text-anchor="middle">{short_number(tick)}</text>')
    main = smooth or points
    parts.append(_path([place(x, y) for x, y in points], "line faint" if smooth else "line"))
    if smooth:
        parts.append(_path([place(x, y) for x, y in smooth], "line"))
    end_x, end_y = place(*main[-1])
    parts.append(f'<circle class="dot" cx="{end_x:.1f}" cy="{end_y:.1f}" r="4"/>')
    parts.append(f'<text x="{width - _RIGHT}" y="{height - 1}" text-anchor="end" class="axis">{escape(x_label)}</text>')
    title = f"{y_label}: {short_number(main[0][1])} at the start, {short_number(main[-1][1])} at the end"
    return _svg(width, height, parts, title)


def head_tail(
    before: Sequence[float], after: Sequence[float], *, threshold: float, width: int = 232, height: int = 132
) -> str:
    """How often each entry occurs, most frequent first, before (filled) and after balancing (line), on a log scale.

    Args:
        before: counts in descending order; zeros end the curve.
        after: expected counts after balancing, in descending order.
        threshold: drawn as a dashed line.
    """
    top, bottom, left = 8, 18, 30
    high = max(max(before), 10.0)
    decades = math.ceil(math.log10(high))
    span = max(len(before) - 1, 1)

    def place(rank: int, count: float) -> Point:
        level = max(math.log10(max(count, 1.0)), 0.0) / decades
        return left + rank / span * (width - left - 6), height - bottom - level * (height - top - bottom)

    parts = []
    for decade in range(decades + 1):
        _, y = place(0, 10.0**decade)
        parts.append(f'<line class="grid" x1="{left}" x2="{width - 6}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{left - 5}" y="{y + 3.5:.1f}" text-anchor="end">{short_number(10.0**decade)}</text>')
    area = [place(rank, count) for rank, count in enumerate(before) if count > 0]
    floor = height - bottom
    outline = " L".join(f"{x:.1f},{y:.1f}" for x, y in area)
    parts.append(f'<path class="before" d="M{area[0][0]:.1f},{floor} L{outline} L{area[-1][0]:.1f},{floor} Z"/>')
    _, y = place(0, threshold)
    parts.append(f'<line class="threshold" x1="{left}" x2="{width - 6}" y1="{y:.1f}" y2="{y:.1f}"/>')
    parts.append(_path([place(rank, count) for rank, count in enumerate(after) if count > 0], "line"))
    parts.append(f'<text x="{left}" y="{height - 4}">most frequent</text>')
    parts.append(f'<text x="{width - 6}" y="{height - 4}" text-anchor="end">rarest</text>')
    title = f"most frequent: {before[0]:,.0f} before, {after[0]:,.0f} after; threshold {threshold:,.0f}"
    return _svg(width, height, parts, title)


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About ``count`` round numbers whose first is at most ``low`` and whose last is at least ``high``."""
    if (high - low) / count < sys.float_info.min:  # nothing, or so little that its logarithm has no value
        high = low + max(abs(low), 1.0)
    raw = (high - low) / count
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(m * magnitude for m in (1, 2, 2.5, 5, 10) if m * magnitude >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def short_number(value: float) -> str:
    """A number as an axis shows it: 0, 0.25, 1.5, 320, 12k, 3.4M."""
    for limit, unit in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{unit}"
    return f"{value:.3g}"


def moving_average(points: Sequence[Point], window: int) -> list[Point]:
    """Trailing mean of y over up to ``window`` points."""
    return [
        (x, sum(y for _, y in points[max(0, i - window + 1) : i + 1]) / (i - max(0, i - window + 1) + 1))
        for i, (x, _) in enumerate(points)
    ]


def _path(points: Sequence[Point], css_class: str) -> str:
    return f'<path class="{css_class}" d="M' + " L".join(f"{x:.1f},{y:.1f}" for x, y in points) + '"/>'


def _svg(width: int, height: int, parts: Sequence[str], title: str) -> str:
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title, quote=True)}">'
        f"<title>{escape(title)}</title>{''.join(parts)}</svg>"
    )
