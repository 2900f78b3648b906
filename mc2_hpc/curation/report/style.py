"""What the curation report adds to the style sheet of every report."""

from mc2_hpc import page_style

STYLE = (
    page_style.STYLE
    + """
figure { margin: 8px 0 24px; background: var(--card); border: 1px solid var(--rule); border-radius: 14px;
  padding: 16px; }
figure img { height: auto; aspect-ratio: auto; border-radius: 0; background: none; }
/* The plots are drawn on white; inverted at the same hue they fit a dark page. */
@media (prefers-color-scheme: dark) {
  figure img { filter: invert(1) hue-rotate(180deg); mix-blend-mode: screen; } }
section > h3 { margin-top: 28px; }
.tile b { white-space: nowrap; font-size: 1.6rem; }
.wide { overflow-x: auto; }
.wide td.num, .wide th.num { padding-inline: 7px; white-space: nowrap; }
.wide td:last-child, .wide th:last-child { padding-inline-end: 0; }
td { overflow-wrap: anywhere; }
td code, h3 code { color: var(--soft); font-weight: 400; }
.wide td { overflow-wrap: normal; }
.meter { display: inline-block; width: 52px; height: 8px; border-radius: 4px; background: var(--faint);
  overflow: hidden; vertical-align: 1px; }
.meter i { display: block; height: 100%; background: var(--accent); }
td.meters { width: 34%; }
td.meters .meter { width: 100%; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 250px), 1fr)); gap: 14px; }
.cards .num { padding-inline-start: 10px; }
details { margin-top: 16px; }
summary { cursor: pointer; padding: 6px 0; color: var(--soft); }
"""
)
