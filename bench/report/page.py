"""A result as one HTML page: plots, and the table of all figures.

The page contains plotly's script, so that it opens without a network. Colours follow the reader's
light or dark scheme. Text from the result file is escaped.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

from plotly.offline import get_plotlyjs

from bench.errors import BenchError
from bench.harness.result_file import BenchResult
from bench.report.plots import PLOTS
from bench.report.rows import Line, columns, digits, facts, lines, remarks
from bench.stats.compare import COLOURS as VERDICT_COLOURS
from bench.stats.compare import change, compare
from bench.stats.compared_side import ComparedSide
from bench.stats.differences import left_out


def as_page(result: BenchResult, title: str) -> str:
    """The HTML of the page."""
    shown = lines(result)
    plots = [(name, why, draw(shown)) for draw, name, why in PLOTS]
    figures = [(name, why, figure) for name, why, figure in plots if figure is not None]
    sections = "\n".join(
        f'<section><h2>{name}</h2><p class="why">{why}</p>'
        f'<div class="plot" id="plot{index}" style="height:{figure.layout.height}px"></div>'
        f"</section>"
        for index, (name, why, figure) in enumerate(figures)
    )
    specifications = ",\n".join(figure.to_json() for _, _, figure in figures)
    return _PAGE.format(
        title=html.escape(title),
        cards=_cards(shown),
        comparison=_comparison(result),
        sections=sections,
        table=_table(*columns(shown)),
        not_run=_not_run(result),
        remarks="".join(f'<p class="remark">{html.escape(text)}</p>' for text in remarks(result)),
        facts="".join(
            f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>"
            for name, value in facts(result)
        ),
        style=_STYLE,
        # A name out of the file must not end the script.
        specifications=specifications.replace("</", "<\\/"),
        behaviour=_BEHAVIOUR,
        plotly=get_plotlyjs(),
    )


def _cards(shown: Sequence[Line]) -> str:
    """A few figures of the last scenario, which is the default."""
    last = shown[-1]
    cards = [(f"{digits(last.scenario.step_ms)} ms", f"a step, {last.label}")]
    if last.ratio is not None:
        cards.append((f"{1 / last.ratio:.2f} x", "as fast as the baseline, a step"))
    cards.append((digits(last.scenario.images_per_second), "images a second"))
    if last.times_floor is not None:
        cards.append((f"{last.times_floor:.2f} x", "the floor of a step"))
    if last.mfu is not None:
        cards.append((f"{100 * last.mfu:.0f}%", "of the measured matrix rate"))
    if last.cost is not None:
        cards.append((f"{last.cost:.3g}", "the price of 1000 images"))
    return "".join(
        f'<div class="card"><b>{html.escape(figure)}</b><span>{html.escape(of)}</span></div>'
        for figure, of in cards
    )


def _comparison(result: BenchResult) -> str:
    """The verdicts of a file with two sides."""
    if len(result.sides) != 2:
        return ""
    try:
        found = compare(ComparedSide("base", result, "base"), ComparedSide("head", result, "head"))
    except BenchError as error:
        return f"<section><h2>Did it help</h2><p>{html.escape(str(error))}</p></section>"
    rows = [
        (row.scenario, row.quantity, *change(row.judgement), row.judgement.verdict,
         row.judgement.reason)
        for row in found.rows
    ]  # fmt: skip
    shades = [VERDICT_COLOURS.get(row.judgement.verdict, "yellow") for row in found.rows]
    header = ("scenario", "quantity", "change", "interval", "verdict", "why not more")
    notes = "".join(f"<p>{html.escape(note)}</p>" for note in left_out(found.head))
    return f"<section><h2>Did it help</h2>{_table(header, rows, shades)}{notes}</section>"


def _table(
    header: Iterable[str], rows: Iterable[Sequence[str]], shades: Sequence[str | None] = ()
) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in header)
    body = ""
    for index, row in enumerate(rows):
        shade = shades[index] if index < len(shades) else None
        body += f'<tr class="{shade or ""}">'
        body += "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
        f"</div>"
    )


def _not_run(result: BenchResult) -> str:
    if not result.not_run:
        return ""
    rows = [(missing.name, missing.why) for missing in result.not_run]
    return f"<section><h2>Not run</h2>{_table(('scenario', 'why'), rows)}</section>"


_STYLE = """
:root { color-scheme: light dark; --page: #f6f6f4; --sheet: #ffffff; --ink: #1d1f24;
  --faint: #6b6f7a; --line: #e3e3df; --good: #1f7a55; --bad: #b3372a; --unsure: #8a6a00; }
@media (prefers-color-scheme: dark) { :root { --page: #121317; --sheet: #1b1d23; --ink: #e8e8ea;
  --faint: #9a9ca6; --line: #30333c; --good: #5cc79a; --bad: #f0806f; --unsure: #dcb74a; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 26px; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 17px; margin: 0 0 2px; }
section, .facts { background: var(--sheet); border: 1px solid var(--line); border-radius: 10px;
  padding: 18px 20px; margin-top: 18px; }
.why { color: var(--faint); margin: 0 0 6px; font-size: 13.5px; max-width: 75ch; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(140px, 1fr)); gap: 12px;
  margin-top: 18px; }
.card { background: var(--sheet); border: 1px solid var(--line); border-radius: 10px;
  padding: 14px 16px; }
.card b { display: block; font-size: 24px; font-variant-numeric: tabular-nums; }
.card span { color: var(--faint); font-size: 13px; }
.remark { border-left: 3px solid var(--unsure); padding: 2px 0 2px 12px; margin: 14px 0 0; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 3px 18px; margin: 0; }
dt { color: var(--faint); }
dd { margin: 0; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px;
  font-variant-numeric: tabular-nums; }
th { text-align: left; color: var(--faint); font-weight: 500; white-space: nowrap; }
th, td { padding: 6px 14px 6px 0; border-bottom: 1px solid var(--line); white-space: nowrap; }
td:last-child { white-space: normal; }
tr.green td:nth-child(5) { color: var(--good); font-weight: 600; }
tr.red td:nth-child(5) { color: var(--bad); font-weight: 600; }
tr.yellow td:nth-child(5) { color: var(--unsure); }
.plot { width: 100%; }
"""

_BEHAVIOUR = """
const dark = matchMedia("(prefers-color-scheme: dark)");
const read = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
function scheme() {
  const colours = {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", "font.color": read("--ink"),
    "hoverlabel.bgcolor": read("--sheet"), "hoverlabel.font.color": read("--ink"),
    "hoverlabel.bordercolor": read("--line") };
  for (const name of ["xaxis", "yaxis"])
    for (const part of ["gridcolor", "zerolinecolor", "linecolor"])
      colours[`${name}.${part}`] = read("--line");
  return colours;
}
function drawn() {
  figures.forEach((_, index) => {
    Plotly.relayout(`plot${index}`, scheme());
    const bars = document.getElementById(`plot${index}`).data
      .flatMap((trace, place) => trace.error_x ? [place] : []);
    if (bars.length) Plotly.restyle(`plot${index}`, {"error_x.color": read("--ink")}, bars);
  });
  document.documentElement.dataset.drawn = figures.length;
}
Promise.all(figures.map((figure, index) => {
  figure.layout.font = { family: "system-ui, sans-serif", size: 13 };
  return Plotly.newPlot(`plot${index}`, figure.data, figure.layout,
    { responsive: true, displayModeBar: false });
})).then(drawn);
dark.addEventListener("change", drawn);
"""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
<h1>{title}</h1>
{remarks}
<div class="cards">{cards}</div>
{comparison}
{sections}
<section><h2>Every figure</h2>{table}</section>
{not_run}
<section><h2>Where and how</h2><dl>{facts}</dl></section>
</main>
<script>{plotly}</script>
<script>
const figures = [
{specifications}
];
{behaviour}
</script>
</body>
</html>
"""
