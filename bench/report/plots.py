"""The plots of a result's page, as plotly figures."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import plotly.graph_objects as go

from bench.report.rows import Line, cells, digits
from bench.stats.verdict import by_round

PALETTE = (
    "#3b7dd8", "#e07b39", "#2f9e77", "#b84a8c", "#8a6fd1",
    "#c9a227", "#4aa3b8", "#c8553d", "#7a8b3a", "#7d7f8c",
)  # fmt: skip
"""Distinct on white and on near-black, and for most of the colour-blind."""
STAGES = ("queue", "text_encode", "denoise", "vae_decode", "image_encode", "upload")
ROW_PIXELS = 34
MANY = 6


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
