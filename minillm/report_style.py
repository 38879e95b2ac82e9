"""The style sheet of the report: one text, put into the page's head."""

from __future__ import annotations

# Series colours after Okabe and Ito, told apart by most colour-blind readers; brighter ones on dark ground.
STYLE = """
:root { color-scheme: light dark; --paper: #fdfdfb; --ink: #1d2327; --soft: #5a646b; --grid: #d9dcdd; --card: #f3f4f2;
  --shade: #0003; --good: #1a6e46; --bad: #a8321b;
  --c0: #4d5a63; --c1: #d9730d; --c2: #2f7fb8; --c3: #0a8f6a; --c4: #b8478c; --c5: #a88a00;
  --c6: #6a52b3; --c7: #b3402e; }
@media screen and (prefers-color-scheme: dark) { :root {
  --paper: #14181b; --ink: #e4e7e9; --soft: #9ea9b0; --grid: #353c41;
  --card: #1d2327; --shade: #0009; --good: #62cc97; --bad: #ff8f76;
  --c0: #b4bec5; --c1: #f5a34f; --c2: #6bb8ea; --c3: #3fcf9f; --c4: #ea8cc2; --c5: #e2c94a;
  --c6: #a996ee; --c7: #f08575; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 74rem; margin: 0 auto; padding: 1rem clamp(.9rem, 3vw, 2.5rem) 4rem; }
h1 { font-size: clamp(1.5rem, 4vw, 2.1rem); line-height: 1.2; margin: 1rem 0 0; overflow-wrap: anywhere; }
h2 { overflow-wrap: anywhere; font-size: 1.25rem; margin: 2.8rem 0 .7rem; padding-top: .7rem;
  border-top: 1px solid var(--grid); }
h3 { font-size: .95rem; margin: 1rem 0 .3rem; overflow-wrap: anywhere; }
p { max-width: 46rem; overflow-wrap: anywhere; }
.note { color: var(--soft); font-size: .88rem; overflow-wrap: anywhere; }
nav { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; margin: .8rem 0 0; font-size: .9rem; }
nav a, summary, .legend li, .said b { overflow-wrap: anywhere; min-width: 0; } nav a { color: inherit; }
/* A shade at the edge behind which a table goes on: where scroll bars are hidden, nothing else tells. */
.wide { overflow-x: auto; margin: .5rem 0; background:
  linear-gradient(to left, var(--paper) 30%, transparent) right / 2.5rem 100% no-repeat local,
  linear-gradient(to left, var(--shade), transparent) right / 1.1rem 100% no-repeat scroll; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .95rem; }
th, td { padding: .38rem .8rem; border-bottom: 1px solid var(--grid); text-align: right; vertical-align: top; }
td { white-space: nowrap; }
th { font-weight: 600; } thead th span { display: inline-block; max-width: 11rem; overflow-wrap: break-word; }
td.text, th.text { text-align: left; white-space: normal; overflow-wrap: anywhere; min-width: 8rem; }
th[scope=row] { text-align: left; position: sticky; left: 0; background: var(--paper); min-width: 8rem; }
tr.part th { text-align: left; padding-top: 1rem; }
tr.part th span { position: sticky; left: .8rem; }
td small, th small { display: block; color: var(--soft); font-weight: 400; font-size: .8rem; }
th small { max-width: 17rem; line-height: 1.3; }
td.sure { font-weight: 700; }
dl.meanings { display: none; color: var(--soft); font-size: .85rem; margin: .5rem 0; }
.meanings dt { font-weight: 600; float: left; clear: left; margin-right: .5em; } .meanings dd { margin: 0 0 .2rem; }
.plots { display: grid; gap: 1.2rem; margin: 1rem 0;
  grid-template-columns: repeat(auto-fit, minmax(min(19rem, 100%), 1fr)); }
figure { margin: 0; max-width: 32rem; }
svg { width: 100%; height: auto; display: block; }
svg text { font-family: system-ui, sans-serif !important; }
.legend { list-style: none; padding: 0; margin: .5rem 0; display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; }
.legend i, .said i { display: inline-block; width: .8em; height: .8em; margin-right: .45em;
  print-color-adjust: exact; -webkit-print-color-adjust: exact; }
/* The shapes of the marks in the plots, in their order: colour alone does not tell everyone which model it is. */
.k0 { border-radius: 50%; } .k1 { clip-path: inset(6%); } .k2 { clip-path: polygon(50% 0, 100% 95%, 0 95%); }
.k3 { clip-path: polygon(50% 0, 100% 50%, 50% 100%, 0 50%); } .k4 { clip-path: polygon(0 5%, 100% 5%, 50% 100%); }
.k5 { clip-path: polygon(0 50%, 95% 0, 95% 100%); } .k7 { clip-path: polygon(50% 0, 64% 34%, 100% 38%, 72% 62%,
  81% 100%, 50% 80%, 19% 100%, 28% 62%, 0 38%, 36% 34%); }
.k6 { clip-path: polygon(30% 0, 70% 0, 70% 30%, 100% 30%, 100% 70%, 70% 70%, 70% 100%, 30% 100%, 30% 70%, 0 70%,
  0 30%, 30% 30%); }
.k0 { background: var(--c0); } .k1 { background: var(--c1); } .k2 { background: var(--c2); }
.k3 { background: var(--c3); }
.k4 { background: var(--c4); } .k5 { background: var(--c5); } .k6 { background: var(--c6); }
.k7 { background: var(--c7); }
/* Those that share a colour and a shape with an earlier one: hollow marks in the plots, striped ones here. */
.again { mask: repeating-linear-gradient(45deg, #000 0 2px, #0000 2px 4px); }
ul.said-list { padding-left: 1.1rem; max-width: 46rem; } ul.said-list li { margin: .35rem 0; overflow-wrap: anywhere; }
article { background: var(--card); border-radius: .5rem; padding: .2rem 1rem 1rem; margin: 1rem 0; }
article h3 { color: var(--soft); font-weight: 500; font-size: .82rem; }
.prompt p { margin: .2rem 0 .8rem; font-weight: 600; }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(11rem, 100%), 1fr)); gap: .9rem 1.4rem; }
.said { font-size: .93rem; min-width: 0; }
.said p, .prompt p { white-space: pre-wrap; overflow-wrap: anywhere; }
.said p { margin: .15rem 0; }
.said b { font-weight: 600; color: var(--soft); font-size: .85rem; }
.said .long, .prompt .long { max-height: 16rem; overflow-y: auto; padding-left: .6rem;
  border-left: 2px solid var(--grid); }
.empty { font-style: italic; color: var(--soft); }
.told span { color: var(--soft); margin-right: .9em; display: inline-block; } .told .good { color: var(--good); }
.told .bad { color: var(--bad); }
details { margin: .5rem 0; } summary { cursor: pointer; }
pre { background: var(--card); padding: .8rem; border-radius: .5rem; overflow-x: auto; font-size: .82rem; }
.filters { position: relative; } .filters > input { position: absolute; left: 0; opacity: 0; }
.filters > label { display: inline-block; padding: .15rem .7rem; margin: 0 .3rem .4rem 0; border-radius: 1rem;
  border: 1px solid var(--grid); font-size: .85rem; cursor: pointer; overflow-wrap: anywhere; }
.filters > span { display: inline-block; min-width: 6.5rem; color: var(--soft); font-size: .85rem; }
.filters > input:checked + label { border-color: var(--ink); font-weight: 600; }
.filters > input:focus-visible + label { outline: 2px solid var(--c2); }
.filters > .none { display: none; font-style: italic; }
thead th:first-child { text-align: left; }
@media (max-width: 40rem) { th, td { padding: .3rem .45rem; }
  /* It stays where a table scrolls: a long name must leave room for the figures. */
  th[scope=row] { min-width: 6rem; overflow-wrap: anywhere; }
  tr.told th small { display: none; } dl.meanings { display: block; } .filters > span { display: block; } }
@media print { :root { color-scheme: light; } html { font-size: 12px; } body { font-size: 1rem; } 
  /* Not 0: what stands at the very edge of the paper loses its last line. */
  main { padding: 0 2px; }
  article, figure, tr, .legend { break-inside: avoid; } h2, h3, thead, .legend, tr.part { break-after: avoid; }
  h2 + .note, h3 + .note { break-after: avoid; } .filters > article:first-of-type { break-before: avoid; }
  article { border: 1px solid var(--grid); }
  nav, .filters > label, .filters > span, .filters > br { display: none; } .filters { break-before: avoid; }
  .plots { grid-template-columns: 1fr 1fr; } .answers { grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); }
  .wide { overflow: visible; background: none; } th, td { padding: .25rem .4rem; white-space: normal; }
  /* Paper does not scroll: names break anywhere, figures at their spaces. */
  th[scope=row] { min-width: 4rem; position: static; overflow-wrap: anywhere; }
  thead th span { overflow-wrap: anywhere; min-width: 4.4em; } thead th:first-child span { overflow-wrap: normal; }
  .many th, .many ~ tbody > tr > * { font-size: .75rem; padding: .25rem .2rem; }
  .many th span { min-width: 0; } .many ~ tbody small { font-size: .65rem; }
  tr.told th small { display: none; } dl.meanings { display: block; }
  .said .long, .prompt .long { max-height: none; } }
"""
