"""Debian's Chromium without a window, driven by Selenium."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement

from tests.support.processes import ROOT

T = TypeVar("T")

CHROMIUM = shutil.which("chromium")
DRIVER = shutil.which("chromedriver")
WAIT_SECONDS = 40.0
AXE = ROOT / "tests" / "javascript" / "node_modules" / "axe-core" / "axe.min.js"


class Page:
    """The playground in a browser."""

    def __init__(self, driver: webdriver.Chrome, url: str) -> None:
        self.driver = driver
        self.url = url

    def open(self, width: int = 1200, height: int = 1000, dark: bool = False) -> None:
        """Load the page anew in a viewport of this size, with nothing kept from before."""
        self.emulate(width, height, dark)
        self.driver.get(self.url)
        self.run("sessionStorage.clear()")
        self.driver.get(self.url)
        self.driver.get_log("browser")  # type: ignore[no-untyped-call]

    def emulate(self, width: int, height: int, dark: bool = False) -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        still = {"name": "prefers-reduced-motion", "value": "reduce"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme, still]})

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)  # type: ignore[no-untyped-call]

    def find(self, selector: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def text(self, selector: str) -> str:
        found: str = self.run("return document.querySelector(arguments[0]).textContent", selector)
        return found

    def enter(self, **fields: object) -> None:
        """Set the text of fields by their ids."""
        for name, value in fields.items():
            field = self.find(f"#{name}")
            field.clear()
            field.send_keys(str(value))

    def wait_ready(self, seconds: float = WAIT_SECONDS) -> None:
        self.until(
            lambda: self.text("#state") == "ready" and self.find("#generate").is_enabled(), seconds
        )

    def generate(self, **fields: object) -> None:
        """Send a request and wait until its waterfall is there."""
        before = self.text("#trace-id")
        self.enter(**fields)
        self.find("#generate").click()
        self.until(lambda: self.text("#trace-id") != before and self.find("#generate").is_enabled())

    def until(self, found: Callable[[], T], seconds: float = WAIT_SECONDS) -> T:
        """Wait for a true value."""
        end = time.monotonic() + seconds
        while not (value := found()):
            if time.monotonic() > end:
                state = {name: self.text(f"#{name}") for name in ("state", "progress-text")}
                raise AssertionError(f"not so after {seconds} s: {state}, {self.console()}")
            time.sleep(0.03)
        return value

    def console(self) -> list[str]:
        """What the browser has complained of since the last call."""
        return [entry["message"] for entry in self.driver.get_log("browser")]  # type: ignore[no-untyped-call]


@contextmanager
def chromium() -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    assert CHROMIUM is not None
    options.binary_location = CHROMIUM
    arguments = ["--headless=new", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"]
    if os.geteuid() == 0:
        arguments.append("--no-sandbox")  # Chromium's sandbox refuses root
    for argument in arguments:
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    try:
        yield driver
    finally:
        driver.quit()


def violations(page: Page) -> list[str]:
    """What axe finds against WCAG 2.2 A and AA. Without its npm package nothing is checked."""
    if not AXE.exists():
        if os.environ.get("CI") == "true":
            raise RuntimeError("CI must have the packages of tests/javascript; see .ci/run")
        pytest.skip("axe is not installed (npm ci --prefix tests/javascript)")
    page.run(AXE.read_text())
    return page.driver.execute_async_script(  # type: ignore[no-any-return, no-untyped-call]
        "const done = arguments[0];"
        "axe.run({runOnly: ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa', 'wcag22aa',"
        " 'best-practice']}).then((found) => done(found.violations.map("
        "(each) => each.id + ': ' + each.nodes.map((node) => node.html).join(' | '))))"
    )
