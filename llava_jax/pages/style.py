"""The one stylesheet of all pages: light and dark, desktop and phone, screen and paper.

Colours are of the Okabe–Ito palette, which colour-blind people can tell apart; what a colour says
is also said by a line, a pattern or a word.
"""

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #ffffff; --panel: #f5f6f8; --ink: #1b1f24; --soft: #57606a; --edge: #d3d8de;
  --learned: #d5eaf7; --learned-line: #0072b2; --image: #fbe6d4; --image-line: #b35000;
  --hatch: rgba(179, 80, 0, .16); --padding: #eceef1; --here: #f0e442;
  --bar: #0072b2; --context-bar: #a3acb6;
  --line-0: #0072b2; --line-1: #b35000; --line-2: #00795a; --line-3: #a8437d; --line-4: #7a6a00;
  --line-5: #2b2f36;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #15181c; --panel: #1e2227; --ink: #e4e8ec; --soft: #9aa5b1; --edge: #39414a;
    --learned: #113a56; --learned-line: #56b4e9; --image: #46290f; --image-line: #f0934a;
    --hatch: rgba(240, 147, 74, .18); --padding: #262b31; --here: #6f6800;
    --bar: #56b4e9; --context-bar: #66717d;
    --line-0: #56b4e9; --line-1: #f0934a; --line-2: #2fc39b; --line-3: #dd8fbb; --line-4: #d9cb4d;
    --line-5: #d3d8de;
  }
}
* { box-sizing: border-box; }
html {
  -webkit-text-size-adjust: 100%; print-color-adjust: exact; -webkit-print-color-adjust: exact;
}
body {
  margin: 0 auto; padding: 1.5rem 2rem 4rem; max-width: 80rem; background: var(--paper);
  color: var(--ink); font: 16px/1.5 system-ui, "Segoe UI", Roboto, "Noto Sans", sans-serif;
  overflow-wrap: anywhere;
}
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .25rem; }
h2 {
  font-size: 1.2rem; margin: 2.5rem 0 .75rem; padding-bottom: .3rem;
  border-bottom: 1px solid var(--edge);
}
h3 { font-size: 1rem; margin: 1.5rem 0 .5rem; }
p { margin: .5rem 0; max-width: 46rem; }
a { color: var(--learned-line); }
.lead, .soft, figcaption { color: var(--soft); }
nav { display: flex; flex-wrap: wrap; gap: .3rem 1.1rem; margin-top: .75rem; }
:focus-visible { outline: 2px solid var(--learned-line); outline-offset: 2px; }

.facts {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr));
  gap: .6rem 1.5rem; margin: 0;
}
.facts dt { color: var(--soft); font-size: .82rem; }
.facts dd { margin: 0; white-space: pre-wrap; font-variant-numeric: tabular-nums; }

.wide {
  overflow-x: auto; background-repeat: no-repeat;
  background-attachment: local, local, scroll, scroll;
  background-image: linear-gradient(to right, var(--paper) 40%, transparent),
    linear-gradient(to left, var(--paper) 40%, transparent),
    linear-gradient(to right, var(--soft), transparent),
    linear-gradient(to left, var(--soft), transparent);
  background-size: 2.5rem 100%, 2.5rem 100%, .7rem 100%, .7rem 100%;
  background-position: 0 0, 100% 0, 0 0, 100% 0;
}
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td {
  text-align: left; vertical-align: top; padding: .35rem 1.25rem .35rem 0;
  border-bottom: 1px solid var(--edge);
}
th { color: var(--soft); font-weight: 500; overflow-wrap: normal; }
td { max-width: 38rem; white-space: pre-wrap; }
td:not(.number) { min-width: 7.5rem; }
.number { text-align: right; white-space: nowrap; }
td ul { margin: 0; padding-left: 1.1rem; }

.plots {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(20rem, 1fr)); gap: 1.5rem 2rem;
}
.plot { margin: 0; min-width: 0; }
.plot b { font-weight: 600; font-size: .95rem; }
.plot svg { display: block; width: 100%; height: auto; }
.plot figcaption { font-size: .82rem; font-variant-numeric: tabular-nums; }
.plot text { fill: var(--soft); font-size: 12px; font-variant-numeric: tabular-nums; }
.grid { stroke: var(--edge); stroke-width: 1; }
.bars rect { fill: var(--bar); }
.bars rect:hover { fill: var(--image-line); }
.hover { fill: transparent; }
.hover:hover { fill: var(--soft); fill-opacity: .2; }
.key { display: inline-block; margin-right: 1rem; color: var(--ink); }
.plot .key svg { display: inline-block; width: 34px; height: 10px; margin-right: .3rem; }
.series { fill: none; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
.series-0 { stroke: var(--line-0); } .series-1 { stroke: var(--line-1); stroke-dasharray: 7 3; }
.series-2 { stroke: var(--line-2); stroke-dasharray: 2 3; }
.series-3 { stroke: var(--line-3); stroke-dasharray: 10 3 2 3; }
.series-4 { stroke: var(--line-4); stroke-dasharray: 4 4; }
.series-5 { stroke: var(--line-5); stroke-dasharray: 12 5; }
.faint { stroke-width: 1; stroke-opacity: .35; }
.dots { stroke-width: 6; stroke-dasharray: none; }
.mark { fill: none; stroke: var(--soft); stroke-width: 1.5; stroke-dasharray: 3 2; }

.tiles {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: .8rem;
  margin: 0 0 1.5rem;
}
.tiles > div {
  padding: .6rem .9rem; background: var(--panel); border: 1px solid var(--edge);
  border-radius: 6px; min-width: 0;
}
.tiles dt { color: var(--soft); font-size: .82rem; }
.tiles dd { margin: 0; font-size: 1.35rem; font-variant-numeric: tabular-nums; }
.tiles small { display: block; color: var(--soft); font-size: .82rem; }
.samples {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(24rem, 1fr)); gap: 1.2rem;
  align-items: start;
}
.sample {
  border: 1px solid var(--edge); border-radius: 6px; padding: .8rem; min-width: 0;
  overflow: hidden;
}
.sample > header { display: flex; gap: .9rem; margin-bottom: .6rem; }
.sample > header > div { min-width: 0; }
.sample img {
  flex: none; width: 7rem; height: 7rem; object-fit: contain; background: var(--padding);
}
.sample p { margin: 0 0 .4rem; white-space: pre-wrap; }
.command { columns: auto; padding: .6rem .9rem; background: var(--panel); border-radius: 6px; }

.legend {
  display: flex; flex-wrap: wrap; gap: .3rem 1.5rem; align-items: baseline; font-size: .92rem;
}
.row { contain-intrinsic-size: auto 1200px; content-visibility: auto; overflow-x: clip; }
.strip { display: flex; gap: 3px; margin: .9rem 0 .4rem; }
.strip > span { min-width: 0; flex-basis: 0; }
.strip > span > span {
  display: flex; align-items: flex-end; height: 1.6rem; border-bottom: 2px solid var(--soft);
}
.strip > span > span > span { min-width: 0; flex-basis: 0; }
.strip small {
  display: block; height: 1.1em; overflow: hidden; line-height: 1.1; font-size: .75rem;
  color: var(--soft);
}
.strip .learned { height: 100%; background: var(--bar); }
.strip .context { height: 30%; background: var(--context-bar); }
.strip .image { height: 65%; border: 1px solid var(--image-line); }
.strip .padding { height: 30%; border: 1px dashed var(--soft); }
.image {
  background-color: var(--image);
  background-image: repeating-linear-gradient(135deg, var(--hatch) 0 4px, transparent 4px 8px);
}

.pictures { display: flex; flex-wrap: wrap; gap: .9rem; margin: 1rem 0; }
.pictures figure { margin: 0; max-width: 11rem; }
.pictures figcaption { font-size: .82rem; line-height: 1.35; margin-top: .3rem; }
.pictures img {
  display: block; width: 10.5rem; height: auto; background: var(--padding); cursor: zoom-in;
}
.pictures figure:focus { max-width: 100%; }
.pictures figure:focus img { width: auto; max-width: 100%; cursor: default; }

.segment { margin: 1rem 0; border: 1px solid var(--edge); border-radius: 6px; }
.segment > header {
  display: flex; flex-wrap: wrap; gap: 0 1rem; padding: .35rem .8rem; background: var(--panel);
  border-bottom: 1px solid var(--edge); border-radius: 6px 6px 0 0; font-size: .88rem;
  color: var(--soft);
}
.segment > header b { color: var(--ink); }
.note { color: var(--image-line); font-weight: 600; }
.tokens {
  padding: .5rem .8rem; margin: 0; max-width: none; line-height: 1.95; white-space: pre-wrap;
  direction: ltr;
}
.tokens i, .tokens b {
  font: inherit; unicode-bidi: isolate; box-shadow: -1px 0 0 var(--edge); padding: .1em 0;
}
.tokens i {
  background-image: radial-gradient(circle, var(--soft) .07em, transparent .09em);
  background-position: 0 62%; background-size: .27em .3em; background-repeat: no-repeat;
}
.learned-text {
  background: var(--learned); border-bottom: 2px solid var(--learned-line); padding: .1em 0;
}
.learned-text i, .learned-text b {
  box-shadow: -1px 0 0 color-mix(in srgb, var(--learned-line) 30%, transparent);
}
.tokens .special {
  border: 1px solid var(--soft); border-radius: 4px; padding: 0 .25em; margin: 0 .1em;
}
.tokens .here { outline: 2px solid var(--ink); background-color: var(--here); }
.box {
  display: inline-flex; align-items: center; gap: .5rem; vertical-align: middle;
  border: 1px solid var(--image-line); border-radius: 4px; padding: .15rem .5rem .15rem .15rem;
  margin: .1rem .2rem; line-height: 1.3; font-size: .88rem; white-space: normal;
}
.box img { display: block; width: auto; height: 2.5rem; }
.box.padding {
  border: 1px dashed var(--soft); background: var(--padding); color: var(--soft);
  padding: .15rem .5rem;
}
summary { cursor: pointer; color: var(--soft); font-size: .85rem; }
.segment details { padding: 0 .8rem .5rem; }
pre {
  margin: .3rem 0 0;
  font: 12.5px/1.45 ui-monospace, Menlo, Consolas, "Noto Sans Mono", monospace; tab-size: 8;
  white-space: pre-wrap; columns: 16rem;
}
#shown {
  position: fixed; left: 0; right: 0; bottom: 0; padding: .6rem 1rem; background: var(--ink);
  color: var(--paper); font-size: .92rem;
}
#shown:empty { display: none; }

@media (max-width: 600px) {
  body { padding: 1rem 1rem 4rem; }
  h1 { font-size: 1.35rem; }
  .facts { grid-template-columns: 1fr 1fr; gap: .6rem 1rem; }
  thead { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
  table, tbody, tr { display: block; }
  tr { margin: 0 0 1rem; padding: .3rem .7rem; border: 1px solid var(--edge); border-radius: 6px; }
  td.number, td:not(.number) {
    display: flex; gap: .7rem; min-width: 0; max-width: none; padding: .2rem 0; text-align: left;
    border: 0;
  }
  td::before { content: attr(data-column); flex: 0 0 7rem; color: var(--soft); }
  td:empty { display: none; }
  .plots, .samples { grid-template-columns: 1fr; }
  .tiles { grid-template-columns: 1fr 1fr; }
  .plot text { font-size: 14px; }
  .pictures figure { max-width: calc(50% - .45rem); }
  .pictures img { width: 100%; }
}
@media print {
  body { max-width: none; padding: 0; font-size: 11pt; }
  nav, #shown, summary { display: none; }
  .row { content-visibility: visible; }
  .plot, figure, .sample, .strip, .box, .segment > header { break-inside: avoid; }
  h2, .strip, .segment > header { break-after: avoid; }
}
"""
