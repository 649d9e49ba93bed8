"""A result as one HTML page: plots, and the table of all figures.

The page contains plotly's script, so that it opens without a network. Colours follow the reader's
light or dark scheme. Text from the result file is escaped.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable, Sequence
from statistics import median
from typing import Any

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from bench.errors import BenchError
from bench.harness.result_file import BenchResult
from bench.report.rows import Line, cells, columns, digits, facts, lines, remarks
from bench.stats.compare import COLOURS as VERDICT_COLOURS
from bench.stats.compare import ComparedSide, change, compare
from bench.stats.verdict import by_round

PALETTE = (
    "#3b7dd8", "#e07b39", "#2f9e77", "#b84a8c", "#8a6fd1",
    "#c9a227", "#4aa3b8", "#c8553d", "#7a8b3a", "#7d7f8c",
)  # fmt: skip
"""Distinct on white and on near-black, and for most of the colour-blind."""
STAGES = ("queue", "text_encode", "denoise", "vae_decode", "image_encode", "upload")
ROW_PIXELS = 34
MANY = 6


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


# Plots -------------------------------------------------------------------------------------------


def _colours(shown: Sequence[Line]) -> list[str]:
    """One colour a scenario, the same in every plot; of two sides, base's is paler."""
    names = list(dict.fromkeys(line.scenario.name for line in shown))
    both = len({line.scenario.side for line in shown}) == 2
    colours = []
    for line in shown:
        colour = PALETTE[names.index(line.scenario.name) % len(PALETTE)]
        colours.append(_paler(colour) if both and line.scenario.side == "base" else colour)
    return colours


def _parts(colour: str) -> tuple[int, ...]:
    return tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))


def _paler(colour: str) -> str:
    return "#" + "".join(f"{(part + 160) // 2:02x}" for part in _parts(colour))


def _visible(shown: Sequence[Line], line: Line) -> bool | str:
    """Whether a line is visible at first: of many, only the first and last scenario are.

    A click in the legend shows the others.
    """
    names = {shown[0].scenario.name, shown[-1].scenario.name}
    return True if len(shown) <= MANY or line.scenario.name in names else "legendonly"


def _labels(shown: Sequence[Line]) -> list[str]:
    return [html.escape(line.label) for line in shown]


def _figure(height: int, **layout: Any) -> go.Figure:
    figure = go.Figure(layout=go.Layout(template=None, height=height))
    figure.update_layout(margin={"l": 10, "r": 20, "t": 10, "b": 40}, **layout)
    for axis in (figure.update_xaxes, figure.update_yaxes):
        axis(automargin=True, title_font_size=13)
    return figure


def _rows_height(rows: int) -> int:
    return 90 + ROW_PIXELS * rows


def stack(shown: Sequence[Line]) -> go.Figure:
    """Step times as horizontal bars, the baseline on top."""
    figure = _figure(_rows_height(len(shown)), showlegend=False, bargap=0.35)
    above, below, texts = [], [], []
    for line in shown:
        step, judged = line.image_step_ms, line.of_baseline
        texts.append(f"{digits(step)} ms" + ("" if line.ratio is None else f"  {cells(line)[3]}"))
        if judged is None or judged.ratio is None or judged.low is None or judged.high is None:
            above.append(0.0)
            below.append(0.0)
        else:
            above.append(step * (judged.high / judged.ratio - 1))
            below.append(step * (1 - judged.low / judged.ratio))
    figure.add_bar(
        y=_labels(shown),
        x=[line.image_step_ms for line in shown],
        orientation="h",
        marker_color=_colours(shown),
        error_x={"array": above, "arrayminus": below, "thickness": 1.5, "width": 5},
        text=texts,
        textposition="inside",
        insidetextanchor="start",
        textfont_color="white",
        customdata=[html.escape(line.scenario.what) for line in shown],
        hovertemplate="%{customdata}<br>%{text}<extra></extra>",
    )
    if shown[-1].floor_ms is not None:
        least = shown[-1].floor_ms / shown[-1].scenario.images
        figure.add_vline(x=least, line={"dash": "dot", "width": 2, "color": "#c8553d"})
    figure.update_yaxes(autorange="reversed")
    figure.update_xaxes(title="ms a step and image", rangemode="tozero")
    return figure


def floor(shown: Sequence[Line]) -> go.Figure | None:
    """Each step time as its floor and the rest; None if no floor is known."""
    known = [line for line in shown if line.floor_ms is not None]
    if not known:
        return None
    floors = [(line.floor_ms or 0.0) / line.scenario.images for line in known]
    figure = _figure(
        _rows_height(len(known)) + 20,
        barmode="stack",
        bargap=0.35,
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "traceorder": "normal"},
    )
    figure.add_bar(
        name="floor",
        y=_labels(known),
        x=floors,
        orientation="h",
        marker_color="#2f9e77",
        hovertemplate="floor %{x:.2f} ms<extra></extra>",
    )
    figure.add_bar(
        name="beyond",
        y=_labels(known),
        x=[max(0.0, line.image_step_ms - least) for line, least in zip(known, floors, strict=True)],
        orientation="h",
        marker_color="#e07b39",
        text=[f"{line.times_floor or 0:.2f} x the floor" for line in known],
        textposition="inside",
        insidetextanchor="end",
        textfont_color="white",
        hovertemplate="%{text}<br>%{x:.2f} ms beyond<extra></extra>",
    )
    figure.update_yaxes(autorange="reversed")
    figure.update_xaxes(title="ms a step and image")
    return figure


def by_index(shown: Sequence[Line]) -> go.Figure:
    """Step times by index, a line a scenario."""
    figure = _figure(420, legend={"orientation": "h", "y": -0.2}, hovermode="x unified")
    for line, label, colour in zip(shown, _labels(shown), _colours(shown), strict=True):
        steps = [(r.first_step_ms, *r.steps_ms) for r in line.scenario.requests]
        columns = [sorted(column) for column in zip(*steps, strict=True)]
        x = list(range(len(columns)))
        low = [column[int(0.1 * (len(column) - 1))] for column in columns]
        high = [column[-1 - int(0.1 * (len(column) - 1))] for column in columns]
        red, green, blue = _parts(colour)
        figure.add_scatter(
            x=x + x[::-1],
            y=high + low[::-1],
            mode="lines",
            fill="toself",
            fillcolor=f"rgba({red},{green},{blue},0.15)",
            line_width=0,
            legendgroup=label,
            visible=_visible(shown, line),
            showlegend=False,
            hoverinfo="skip",
        )
        figure.add_scatter(
            x=x,
            y=[median(column) for column in columns],
            name=label,
            legendgroup=label,
            visible=_visible(shown, line),
            mode="lines+markers",
            marker={"size": 5, "color": colour},
            line={"color": colour, "width": 2},
            hovertemplate="%{y:.2f} ms",
        )
    figure.update_xaxes(title="step", dtick=1 if len(columns) <= 20 else 5)
    figure.update_yaxes(title="ms", rangemode="tozero")
    return figure


def spread(shown: Sequence[Line]) -> go.Figure:
    figure = _figure(_rows_height(len(shown)) + 20 * len(shown), showlegend=False)
    for line, label, colour in zip(shown, _labels(shown), _colours(shown), strict=True):
        figure.add_box(
            x=[_percent_off(request.step_ms, line) for request in line.scenario.requests],
            name=label,
            boxpoints="all",
            jitter=0.6,
            pointpos=0,
            marker={"color": colour, "size": 5, "opacity": 0.7},
            line_width=1.5,
            hovertemplate="%{x:+.2f}%<extra></extra>",
        )
    figure.update_yaxes(autorange="reversed")
    figure.update_xaxes(title="from its median", ticksuffix="%")
    return figure


def _percent_off(step_ms: float, line: Line) -> float:
    """The difference from the scenario's median, in percent."""
    return 100 * (step_ms / line.scenario.step_ms - 1)


def drift(shown: Sequence[Line]) -> go.Figure | None:
    """Each round's difference from the scenario's median; None with a single round."""
    figure = _figure(380, legend={"orientation": "h", "y": -0.2}, hovermode="x unified")
    longest = 0
    for line, label, colour in zip(shown, _labels(shown), _colours(shown), strict=True):
        rounds = by_round(line.scenario, "step")
        longest = max(longest, len(rounds))
        figure.add_scatter(
            x=sorted(rounds),
            y=[_percent_off(rounds[number], line) for number in sorted(rounds)],
            name=label,
            visible=_visible(shown, line),
            mode="lines+markers",
            marker={"size": 5, "color": colour},
            line={"color": colour, "width": 1.5},
            hovertemplate="%{y:+.2f}%",
        )
    figure.update_xaxes(title="round")
    figure.update_yaxes(title="from its median", ticksuffix="%")
    return figure if longest > 1 else None


def stages(shown: Sequence[Line]) -> go.Figure | None:
    """The stages of a request as stacked bars; None if no stage was timed."""
    timed = [line for line in shown if any(line.scenario.stage_ms(stage) for stage in STAGES)]
    if not timed:
        return None
    figure = _figure(
        _rows_height(len(timed)) + 40,
        barmode="stack",
        bargap=0.35,
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "traceorder": "normal"},
    )
    left = [line.scenario.request_ms for line in timed]
    for index, stage in enumerate(STAGES):
        values = [line.scenario.stage_ms(stage) or 0.0 for line in timed]
        left = [rest - value for rest, value in zip(left, values, strict=True)]
        if any(values):
            _stage_bar(figure, timed, stage, values, PALETTE[index])
    if any(rest > 0 for rest in left):
        _stage_bar(figure, timed, "the rest", [max(0.0, rest) for rest in left], "#9a9ca6")
    figure.update_yaxes(autorange="reversed")
    figure.update_xaxes(title="ms a request")
    return figure


def _stage_bar(
    figure: go.Figure, timed: Sequence[Line], stage: str, values: list[float], colour: str
) -> None:
    figure.add_bar(
        name=stage,
        y=_labels(timed),
        x=values,
        orientation="h",
        marker_color=colour,
        hovertemplate=f"{stage} %{{x:.2f}} ms<extra></extra>",
    )


PLOTS: tuple[tuple[Callable[[Sequence[Line]], go.Figure | None], str, str], ...] = (
    (
        stack,
        "The stack",
        (
            "A steady step, median of requests, from the baseline to the default. Whiskers: the "
            "interval of its ratio to the baseline. Dotted: the floor of the last scenario."
        ),
    ),
    (
        floor,
        "Distance from the floor",
        (
            "A step's nominal FLOPs at the rate of matrix products measured in the same session, "
            "and the time beyond that."
        ),
    ),
    (
        by_index,
        "Steps by index",
        (
            "Median over requests, with the span from the 10th to the 90th percentile. Step 0 also "
            "fills the launch queue and is part of no verdict."
        ),
    ),
    (
        spread,
        "Distributions",
        "One dot a request: the median of its steady steps, relative to the scenario's median.",
    ),
    (
        drift,
        "Through the run",
        (
            "Each round's step relative to the scenario's median. A change that all scenarios have "
            "in common is the machine's: drift, heat, another process."
        ),
    ),
    (stages, "Where a request goes", "Median of each stage."),
)
"""The function that draws each plot, its title and its caption. A plot that is None is left out."""


# Text --------------------------------------------------------------------------------------------


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
    return f"<section><h2>Did it help</h2>{_table(header, rows, shades)}</section>"


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
