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
window.shown = [];
new MutationObserver(() => {
  const text = document.getElementById('progress-text').textContent;
  if (text.startsWith('Step')) window.shown.push(performance.timeOrigin + performance.now());
}).observe(document.getElementById('progress-text'), {childList: true});
"""


def main() -> None:
    with self_hosted({"SDXL_MODEL": "demo", "SDXL_DEVICE": "cpu"}) as server, chromium() as driver:
        server.wait_until_ready(240)
        page = Page(driver, server.url)
        paints_ms = []
        for _ in range(LOADS):
            driver.execute_cdp_cmd("Network.clearBrowserCache", {})
            driver.get(server.url)
            paints_ms.append(page.until(lambda: page.run(PAINTED)))
        page.open()
        page.wait_ready()
        late_ms: list[float] = []
        for preview in (True, False):
            if page.find("#preview").is_selected() != preview:
                page.find("#preview").click()
            for number in range(REQUESTS):
                page.run(WATCH if number == 0 and preview else "window.shown.length = 0")
                page.generate(num_inference_steps=20)
                timeline = httpx.get(f"{server.url}/timeline/{page.text('#trace-id')}").json()
                ends_ms = [
                    timeline["started_at"] * 1e3 + span["start_ms"] + span["ms"]
                    for span in timeline["spans"]
                    if span["name"] == "denoise_step"
                ]
                shown = page.run("return window.shown")
                late_ms += [at - end for at, end in zip(shown, ends_ms, strict=True)]
            _print(f"a step is shown, previews {'on' if preview else 'off'}", late_ms)
            late_ms = []
        _print("first contentful paint", paints_ms)


def _print(what: str, values_ms: list[float]) -> None:
    ordered = sorted(values_ms)
    p99 = ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
    print(
        f"{what}: median {statistics.median(ordered):.1f} ms, p99 {p99:.1f} ms, "
        f"max {ordered[-1]:.1f} ms, of {len(ordered)}"
    )


if __name__ == "__main__":
    main()
