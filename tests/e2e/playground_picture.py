"""The README's first picture: `python -m tests.e2e.playground_picture` writes
docs/images/playground.png.

It is the page after a request, from its top to the end of the waterfall, in Debian's Chromium.
"""

from __future__ import annotations

import base64

from tests.e2e.browser import Page, chromium
from tests.support.processes import ROOT, self_hosted

PICTURE = ROOT / "docs" / "images" / "playground.png"
WIDTH = 1100


def main() -> None:
    settings = {"SDXL_MODEL": "demo", "SDXL_DEVICE": "cpu"}
    with self_hosted(settings) as server, chromium() as driver:
        server.wait_until_ready(240)
        page = Page(driver, server.url)
        page.open(WIDTH, 1200)
        page.wait_ready()
        for seed in (1, 2):  # the first fills caches
            page.generate(
                prompt="tiny green triangle under a big orange star on black",
                num_inference_steps=20,
                seed=seed,
            )
        page.run("document.activeElement.blur()")
        page.run("document.querySelector(\"[data-name=denoise_step][data-index='12']\").focus()")
        page.until(lambda: page.text("#figures").startswith("step 12"))
        bottom = page.run("return document.querySelector('#time').getBoundingClientRect().bottom")
        clip = {"x": 0, "y": 0, "width": WIDTH, "height": round(bottom + 14), "scale": 1}
        shot = driver.execute_cdp_cmd(
            "Page.captureScreenshot", {"clip": clip, "captureBeyondViewport": True}
        )
        PICTURE.write_bytes(base64.b64decode(shot["data"]))


if __name__ == "__main__":
    main()
