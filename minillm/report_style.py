"""The style sheet of the report: one text, put into the page's head."""

from __future__ import annotations

# Series colours after Okabe and Ito, told apart by most colour-blind readers; brighter ones on dark ground.
STYLE = """
:root { color-scheme: light dark; --paper: #fdfdfb; --ink: #1d2327; --soft: #5a646b; --grid: #d9dcdd; --card: #f3f4f2;
  --good: #1a6e46; --bad: #a8321b;
  --c0: #4d5a63; --c1: #d9730d; --c2: #2f7fb8; --c3: #0a8f6a; --c4: #b8478c; --c5: #a88a00;
  --c6: #6a52b3; --c7: #b3402e; }
@media (prefers-color-scheme: dark) { :root { --paper: #14181b; --ink: #e4e7e9; --soft: #9ea9b0; --grid: #353c41;
  --card: #1d2327; --good: #62cc97; --bad: #ff8f76;
  --c0: #b4bec5; --c1: #f5a34f; --c2: #6bb8ea; --c3: #3fcf9f; --c4: #ea8cc2; --c5: #e2c94a;
  --c6: #a996ee; --c7: #f08575; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 74rem; margin: 0 auto; padding: 1rem clamp(.9rem, 3vw, 2.5rem) 4rem; }
h1 { font-size: clamp(1.5rem, 4vw, 2.1rem); line-height: 1.2; margin: 1rem 0 0; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 2.8rem 0 .7rem; padding-top: .7rem; border-top: 1px solid var(--grid); }
h3 { font-size: .95rem; margin: 1rem 0 .3rem; overflow-wrap: anywhere; }
p { max-width: 46rem; }
.note { color: var(--soft); font-size: .88rem; overflow-wrap: anywhere; }
.wide { overflow-x: auto; margin: .5rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .95rem; }
th, td { padding: .38rem .8rem; border-bottom: 1px solid var(--grid); text-align: right; vertical-align: top; }
td { white-space: nowrap; }
th { font-weight: 600; }
th[scope=row] { text-align: left; position: sticky; left: 0; background: var(--paper); min-width: 8rem; }
tr.part th { text-align: left; padding-top: 1rem; }
tr.part th span { position: sticky; left: .8rem; }
td small, th small { display: block; color: var(--soft); font-weight: 400; font-size: .8rem; }
th small { max-width: 17rem; line-height: 1.3; }
td.sure { font-weight: 700; }
.plots { display: grid; gap: 1.2rem; margin: 1rem 0;
  grid-template-columns: repeat(auto-fit, minmax(min(19rem, 100%), 1fr)); }
figure { margin: 0; max-width: 32rem; }
svg { width: 100%; height: auto; display: block; }
svg text { font-family: system-ui, sans-serif !important; }
.legend { list-style: none; padding: 0; margin: .5rem 0; display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; }
.legend i, .said i { display: inline-block; width: .8em; height: .8em; border-radius: 50%; margin-right: .45em; }
.k0 { background: var(--c0); } .k1 { background: var(--c1); } .k2 { background: var(--c2); }
.k3 { background: var(--c3); }
.k4 { background: var(--c4); } .k5 { background: var(--c5); } .k6 { background: var(--c6); }
.k7 { background: var(--c7); }
article { background: var(--card); border-radius: .5rem; padding: .2rem 1rem 1rem; margin: 1rem 0; }
article h3 { color: var(--soft); font-weight: 500; font-size: .82rem; }
.prompt p { margin: .2rem 0 .8rem; font-weight: 600; }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(11rem, 100%), 1fr)); gap: .9rem 1.4rem; }
.said { font-size: .93rem; min-width: 0; }
.said p, .prompt p { white-space: pre-wrap; overflow-wrap: anywhere; }
.said p { margin: .15rem 0; }
.said b { font-weight: 600; color: var(--soft); font-size: .85rem; }
.empty { font-style: italic; color: var(--soft); }
.told span { color: var(--soft); margin-right: .9em; display: inline-block; } .told .good { color: var(--good); }
.told .bad { color: var(--bad); }
details { margin: .5rem 0; } summary { cursor: pointer; }
pre { background: var(--card); padding: .8rem; border-radius: .5rem; overflow-x: auto; font-size: .82rem; }
@media print { article { break-inside: avoid; } }
"""
