"""The style sheet of every report: light and dark by the reader's setting, one column on a phone, system fonts."""

STYLE = """
:root { color-scheme: light dark;
  --paper: #faf8f4; --card: #ffffff; --ink: #1d1b18; --soft: #6d675e; --rule: #e6e0d6; --faint: #efeae1;
  --accent: #b8442a; --accent-soft: #b8442a24; --before: #cfc7b8; --good: #2f7d5b; --bad: #b8442a; }
@media (prefers-color-scheme: dark) { :root {
  --paper: #161513; --card: #1f1d1a; --ink: #f0ebe2; --soft: #a39b8f; --rule: #34302b; --faint: #2a2723;
  --accent: #ef8062; --accent-soft: #ef806230; --before: #57514a; --good: #6cc79c; --bad: #ef8062; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--paper); color: var(--ink); line-height: 1.55;
  font-family: ui-sans-serif, system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Noto Sans CJK JP",
    sans-serif; }
main, header > div, footer { max-width: 1080px; margin: 0 auto; padding: 0 24px; }
h1, h2 { font-family: ui-serif, Charter, "Iowan Old Style", Georgia, "Noto Serif", serif; font-weight: 600;
  letter-spacing: -0.01em; text-wrap: balance; }
h1 { font-size: clamp(2rem, 5vw, 3.2rem); line-height: 1.08; margin: 0 0 16px; max-width: 19em; }
h2 { font-size: 1.65rem; line-height: 1.2; margin: 0 0 6px; }
h3 { font-size: .95rem; margin: 0 0 8px; font-weight: 600; }
p { margin: 0 0 14px; max-width: 44em; }
.soft, .lead { color: var(--soft); }
.lead { font-size: 1.1rem; }
a { color: var(--accent); }
header { padding: 56px 0 8px; }
section { padding: 44px 0 8px; }
.kicker { color: var(--accent); font-size: .8rem; font-weight: 600; letter-spacing: .08em; text-transform: uppercase; }
.tiles { display: flex; flex-wrap: wrap; gap: 1px; margin: 32px 0 0; background: var(--rule);
  border: 1px solid var(--rule); border-radius: 14px; overflow: hidden; }
.tile { flex: 1 1 150px; background: var(--card); padding: 18px 18px 16px; }
.tile b { display: block; font-size: 1.85rem; line-height: 1.1; font-weight: 650; letter-spacing: -0.02em;
  font-variant-numeric: tabular-nums; }
.tile sup { font-size: .6em; line-height: 0; }
.tile span { display: block; margin-top: 6px; color: var(--soft); font-size: .85rem; line-height: 1.35; }
.card { background: var(--card); border: 1px solid var(--rule); border-radius: 14px; padding: 18px; }
.narrow { max-width: 560px; }
.two { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 16px; }
.samples { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 236px), 1fr)); gap: 14px; }
.sample { display: grid; grid-template-columns: 84px minmax(0, 1fr); gap: 14px; align-items: start; padding: 14px; }
.sample ul { list-style: none; margin: 0; padding: 0; font-size: .92rem; line-height: 1.4; }
.sample li { display: block; margin-bottom: 6px; overflow-wrap: anywhere; text-align: start; }
.sample li.noise { color: var(--soft); text-decoration: line-through; text-decoration-color: var(--before); }
img { display: block; border-radius: 8px; width: 100%; aspect-ratio: 1; object-fit: cover; background: var(--faint); }
.lang { color: var(--soft); font-size: .72rem; letter-spacing: .04em; }
.multiples { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 226px), 1fr)); gap: 14px; }
.multiples .card { padding: 12px 12px 8px; }
.multiples h3 { display: flex; justify-content: space-between; gap: 8px; margin: 0 2px 6px; font-size: .9rem; }
.multiples h3 span { color: var(--soft); font-weight: 400; font-variant-numeric: tabular-nums; }
svg { display: block; width: 100%; height: auto; overflow: visible; }
svg text { fill: var(--soft); font-size: 11.5px; font-variant-numeric: tabular-nums; }
.multiples svg text { font-size: 9.5px; }
.grid { stroke: var(--rule); stroke-width: 1; }
.line { fill: none; stroke: var(--accent); stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
.faint { stroke: var(--before); stroke-width: 1; }
.dot { fill: var(--accent); }
.before { fill: var(--before); opacity: .75; }
.threshold { stroke: var(--soft); stroke-width: 1; stroke-dasharray: 3 3; }
.legend { display: flex; flex-wrap: wrap; gap: 6px 20px; margin: 0 0 14px; font-size: .85rem; color: var(--soft); }
.legend i { display: inline-block; width: 22px; height: 10px; margin-inline-end: 7px; border-radius: 2px; }
.legend .l-before { background: var(--before); }
.legend .l-after { height: 3px; background: var(--accent); vertical-align: middle; }
.legend .l-threshold { width: 26px; height: 0; border-radius: 0; border-top: 2px dashed var(--soft);
  vertical-align: middle; }
.share { display: grid; grid-template-columns: auto 1fr auto; gap: 6px 14px; align-items: center; margin: 4px 0 22px; }
.bar { position: relative; height: 14px; border-radius: 4px; background: var(--faint); overflow: hidden; }
.bar i { position: absolute; inset: 0 auto 0 0; background: var(--accent); border-radius: 4px; }
.bar i.old { background: var(--before); }
.bars { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 430px), 1fr)); gap: 9px 40px; }
.row { display: grid; grid-template-columns: 92px minmax(0, 1fr) 58px; gap: 12px; align-items: center; }
.row .name { text-align: start; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.num { font-variant-numeric: tabular-nums; text-align: end; }
.search { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 480px), 1fr)); gap: 14px; }
.query { font-size: 1.12rem; line-height: 1.35; margin: 0 0 12px; text-align: start; overflow-wrap: anywhere; }
.hits { display: grid; grid-template-columns: repeat(5, minmax(0, 1fr)); gap: 8px; }
.hit { text-align: center; font-size: .78rem; color: var(--soft); }
.hit img { border: 2px solid transparent; margin-bottom: 3px; }
.hit.right img { border-color: var(--good); }
.hit.right { color: var(--good); font-weight: 600; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; }
th { color: var(--soft); font-weight: 500; text-align: start; }
th, td { padding: 7px 10px 7px 0; border-bottom: 1px solid var(--rule); vertical-align: top; }
tr:last-child td { border-bottom: 0; }
td.num, th.num { padding-right: 0; }
pre { margin: 0 0 14px; padding: 14px 16px; border-radius: 10px; background: var(--faint); overflow-x: auto;
  font: .86rem/1.6 ui-monospace, SFMono-Regular, Menlo, Consolas, "Noto Sans Mono", monospace; }
code { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "Noto Sans Mono", monospace; font-size: .9em; }
footer { padding-top: 36px; padding-bottom: 56px; color: var(--soft); font-size: .85rem; }
@media (max-width: 520px) { header { padding-top: 36px; } section { padding-top: 34px; }
  main, header > div, footer { padding-left: 16px; padding-right: 16px; } .tile b { font-size: 1.5rem; }
  .row { grid-template-columns: 84px minmax(0, 1fr) 52px; } }
@media print { .card, .tiles { break-inside: avoid; } }
"""
