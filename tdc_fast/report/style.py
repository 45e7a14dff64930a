"""The style sheet of a report."""

from __future__ import annotations

STYLE = """
:root { color-scheme: light; --ink: #1d2733; --muted: #66717f; --rule: #d9dee5; --card: #ffffff;
  --page: #f4f6f8; --accent: #0f7f8c; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 40px 24px 80px; }
header { margin-bottom: 28px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 6px; letter-spacing: -0.01em; }
h2 { font-size: 19px; margin: 0 0 14px; }
h3 { font-size: 14px; margin: 0 0 6px; color: var(--muted); font-weight: 600; }
.sub { color: var(--muted); margin: 0 0 18px; }
.headline { font-size: 20px; line-height: 1.4; border-left: 4px solid var(--accent); padding: 2px 0 2px 16px;
  margin: 0 0 16px; }
header ul { padding-left: 20px; margin: 0 0 10px; }
li { margin-bottom: 5px; }
section { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; padding: 22px 24px;
  margin-bottom: 20px; }
.note { color: var(--muted); font-size: 14px; margin: 10px 0 0; max-width: 95ch; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th { text-align: left; color: var(--muted); font-weight: 600; vertical-align: bottom; }
th, td { padding: 7px 10px 7px 0; border-bottom: 1px solid var(--rule); }
tbody tr:last-child td { border-bottom: none; }
.numbers td { font-variant-numeric: tabular-nums; white-space: nowrap; }
.numbers th:not(:first-child), .numbers td:not(:first-child) { text-align: right; }
.pm { color: var(--muted); font-size: 12.5px; }
.models { list-style: none; padding: 0; margin: 12px 0 0; font-size: 14px; }
.swatch { display: inline-block; width: 11px; height: 11px; border-radius: 3px; margin-right: 8px; }
figure { margin: 0; }
figure img { width: 100%; height: auto; display: block; }
figure.narrow { max-width: 860px; }
.grids { display: grid; grid-template-columns: repeat(auto-fill, minmax(300px, 1fr)); gap: 20px; }
.grid img { image-rendering: pixelated; border: 1px solid var(--rule); border-radius: 6px; }
figcaption { font-size: 14px; color: var(--muted); margin-top: 6px; }
.settings { display: grid; grid-template-columns: repeat(auto-fit, minmax(300px, 1fr)); gap: 24px; }
.settings td { vertical-align: top; }
code { font: 12.5px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; overflow-wrap: anywhere; }
@media print { body { background: white; } section { break-inside: avoid; border: none; padding: 10px 0; } }
"""
