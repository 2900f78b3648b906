"""Colours of pages and plots. Plots are drawn in the light colours; inside a page they follow the reader's setting.

Text colours have a contrast of at least 4.5 with both backgrounds, and ``before`` of at least 3 (WCAG 2.2, 1.4.3 and
1.4.11); a test computes the contrast.
"""

from collections.abc import Mapping

LIGHT: Mapping[str, str] = {
    "paper": "#faf8f4",
    "card": "#ffffff",
    "ink": "#1d1b18",
    "soft": "#66604f",
    "rule": "#e6e0d6",
    "faint": "#efeae1",
    "before": "#8d8577",
    "accent": "#b8442a",
    "good": "#2a7353",
}
DARK: Mapping[str, str] = {
    "paper": "#161513",
    "card": "#1f1d1a",
    "ink": "#f0ebe2",
    "soft": "#a9a194",
    "rule": "#34302b",
    "faint": "#2a2723",
    "before": "#857c6e",
    "accent": "#ef8062",
    "good": "#6cc79c",
}
"""The same names in dark mode."""

SERIES = (LIGHT["accent"], "#1f6f9c", "#b07c12", "#6f4e8c", "#3d8f8a", LIGHT["soft"])
"""Colours of adjacent lines and bars, also distinguishable for readers who cannot tell red from green."""
