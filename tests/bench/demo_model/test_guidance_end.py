"""The table of time against score, on few pictures."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from bench.demo_model.guidance_end import ENDS, as_table, draw_all, outcomes
from bench.demo_model.lossless import prompts_by_row
from serve.model.loading import load_model


def test_every_end_draws_every_prompt_and_the_ways_take_turns() -> None:
    model = load_model("demo", device_name="cpu")
    rows = prompts_by_row(3)
    prompts = [*rows["128x128 one object"], *rows["160x96 one object"][:1]]
    ticks = itertools.count()
    order: list[int | None] = []
    real = model.denoise

    def denoise(*given: object, **options: object) -> object:
        order.append(options["guided_steps"])  # type: ignore[arg-type]
        return real(*given, **options)  # type: ignore[arg-type]

    model.denoise = denoise  # type: ignore[method-assign, assignment]
    drawn = draw_all(model, prompts, ENDS, steps=2, images=2, clock=lambda: float(next(ticks)))
    assert order == [2, 2, 1, 1, 2, 1, 1, 2, 1, 1, 2, 2]  # runs of two, one and one picture
    for of in drawn.values():
        assert [picture.shape for picture in of.pictures] == [(128, 128, 3)] * 3 + [(96, 160, 3)]
        assert of.seconds == [1.0] * 3
    whole, fewer = drawn[1.0], drawn[0.5]
    assert not np.array_equal(whole.pictures[0], fewer.pictures[0])
    table = outcomes(prompts, drawn)
    assert {row.scores.pictures for row in table.values()} == {4}
    assert table[0.6].ratio.point == pytest.approx(1)
    assert len(as_table(table).splitlines()) == 2 + len(ENDS)
