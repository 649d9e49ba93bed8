"""`python -m tests.e2e.measure_playground`: the page's figures, in Debian's Chromium.

The first paint after a load with an empty cache, and how long after a step's end the page shows it.
"""

from __future__ import annotations

import statistics

import httpx

from tests.e2e.browser import Page, chromium
from tests.support.processes import self_hosted

LOADS = 20
REQUESTS = 20

PAINTED = """
const [paint] = performance.getEntriesByName('first-contentful-paint');
return paint === undefined ? null : paint.startTime;
"""

WATCH = """
if (window.shown === undefined) new MutationObserver(() => {
  const text = document.getElementById('progress-text').textContent;
  if (text.startsWith('Step')) window.shown.push(performance.timeOrigin + performance.now());
}).observe(document.getElementById('progress-text'), {childList: true});
window.shown = [];
"""


def first_paint_ms(page: Page) -> float:
    """The time of the first contentful paint of a load with an empty cache."""
    page.driver.execute_cdp_cmd("Network.clearBrowserCache", {})
    page.driver.get(page.url)
    found: float = page.until(lambda: page.run(PAINTED))
    return found


def steps_late_ms(page: Page, previews: bool) -> list[float]:
    """Send a request; for each step, the time from its end until the page shows it."""
    if page.find("#preview").is_selected() != previews:
        page.find("#preview").click()
    page.run(WATCH)
    page.generate(num_inference_steps=20)
    timeline = httpx.get(f"{page.url}/timeline/{page.text('#trace-id')}").json()
    ends_ms = [
        timeline["started_at"] * 1e3 + span["start_ms"] + span["ms"]
        for span in timeline["spans"]
        if span["name"] == "denoise_step"
    ]
    shown_ms = page.run("return window.shown")
    return [shown - end for shown, end in zip(shown_ms, ends_ms, strict=True)]


def main() -> None:
    with self_hosted({"SDXL_MODEL": "demo", "SDXL_DEVICE": "cpu"}) as server, chromium() as driver:
        server.wait_until_ready(240)
        page = Page(driver, server.url)
        page.open()
        _print("first contentful paint", [first_paint_ms(page) for _ in range(LOADS)])
        page.open()
        page.wait_ready()
        for previews in (False, True):
            late_ms = [ms for _ in range(REQUESTS) for ms in steps_late_ms(page, previews)]
            _print(f"a step is shown, previews {'on' if previews else 'off'}", late_ms)


def _print(what: str, values_ms: list[float]) -> None:
    ordered = sorted(values_ms)
    p99 = ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
    print(
        f"{what}: median {statistics.median(ordered):.1f} ms, p99 {p99:.1f} ms, "
        f"max {ordered[-1]:.1f} ms, of {len(ordered)}"
    )


if __name__ == "__main__":
    main()
