"""The playground in a real browser, against the real server on the demo model."""

from __future__ import annotations

import ast
import contextlib
import io
import json
import os
import re
import shlex
import shutil
import signal
import statistics
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys

from tests.e2e.browser import CHROMIUM, DRIVER, Page, chromium, violations
from tests.e2e.conftest import START_SECONDS, environment
from tests.e2e.measure_playground import first_paint_ms, steps_late_ms
from tests.support.forked import self_hosted
from tests.support.otlp_endpoint import OtlpEndpoint
from tests.support.processes import ServerProcess, free_port

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

if CHROMIUM is None or DRIVER is None:
    if os.environ.get("CI") == "true":
        raise RuntimeError("CI must have Debian's chromium and chromium-driver; see .ci/run")
    pytest.skip(
        "Debian's chromium and its driver are not installed "
        "(apt-get install chromium chromium-driver)",
        allow_module_level=True,
    )

MAX_SEED = 2**63 - 1
TOKEN = "a-token-of-an-operator"


@pytest.fixture(scope="module")
def server(otlp: OtlpEndpoint) -> Iterator[ServerProcess]:
    settings = {
        "SDXL_TRACE_URL": "http://127.0.0.1/traces/{trace_id}",
        "SDXL_SHAPES": "64x64,96x64",
        "SDXL_ADMIN_TOKEN": TOKEN,
        "SDXL_LORAS": "night=demo:night",
    }
    with self_hosted(environment(otlp, **settings)) as process:
        process.wait_until_ready(START_SECONDS)
        yield process


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as driver:
        yield driver


@pytest.fixture
def page(browser: Any, server: ServerProcess) -> Page:
    """The page as a visitor finds it, with a server that is ready."""
    page = Page(browser, server.url)
    page.open()
    page.wait_ready()
    return page


WATCH = """
window.seen = {texts: [], previews: 0};
new MutationObserver(() => window.seen.texts.push(
  document.getElementById('progress-text').textContent
)).observe(document.getElementById('progress-text'), {childList: true});
new MutationObserver((changes) => { for (const change of changes)
  if (change.target.className === 'preview') window.seen.previews += 1;
}).observe(document.getElementById('pictures'), {attributes: true, subtree: true});
"""

BARS = """
return [...document.querySelectorAll('#waterfall rect[data-name]')].map((bar) => ({
  name: bar.dataset.name, index: Number(bar.dataset.index), start: Number(bar.dataset.startMs),
  ms: Number(bar.dataset.ms), x: bar.x.baseVal.value, width: bar.width.baseVal.value}))
"""


def test_steps_arrive_and_the_waterfall_has_the_exported_spans(
    page: Page, otlp: OtlpEndpoint
) -> None:
    page.run(WATCH)
    page.generate(prompt="a red circle on a white background", num_inference_steps=4, seed=7)
    seen = page.run("return window.seen")
    steps = [text.split(":")[0] for text in seen["texts"] if text.startswith("Step")]
    assert steps == [f"Step {number} of 4" for number in range(1, 5)]
    assert any(text.startswith("Next in the queue; about") for text in seen["texts"])
    assert seen["previews"] >= 1
    assert page.run("return document.querySelector('#pictures img').naturalWidth") == 64
    assert page.text("#pictures .seed") == "seed 7"

    trace_id = page.text("#trace-id")
    spans = otlp.wait_for_trace(trace_id)
    root = next(span for span in spans if span.name == "text-to-image")
    exported = sorted(
        (
            span.name,
            span.attributes.get("inference.step.index", -1),
            round((span.start_ns - root.start_ns) / 1e6, 6),
            round((span.end_ns - span.start_ns) / 1e6, 6),
        )
        for span in spans
    )
    bars = page.run(BARS)
    drawn = sorted(
        (bar["name"], bar["index"], round(bar["start"], 6), round(bar["ms"], 6)) for bar in bars
    )
    assert drawn == exported
    whole = next(bar for bar in bars if bar["name"] == "text-to-image")
    for bar in bars:
        assert bar["x"] - whole["x"] == pytest.approx(
            bar["start"] / whole["ms"] * whole["width"], abs=0.01
        )
        to_scale = bar["ms"] / whole["ms"] * whole["width"]
        assert bar["width"] == pytest.approx(max(1.5, to_scale), abs=0.01)

    decode = page.find("#waterfall [data-name=vae_decode]")
    ActionChains(page.driver).move_to_element(decode).perform()
    assert page.text("#figures").startswith("vae_decode: ")

    link = page.find("#trace-link")
    assert link.is_displayed()
    assert link.get_attribute("href") == f"http://127.0.0.1/traces/{trace_id}"
    assert len(page.all("#thumbnails li")) == 1
    assert page.console() == []


def test_cancelling_stops_the_work(page: Page, server: ServerProcess) -> None:
    page.enter(num_inference_steps=100)
    page.find("#generate").click()
    page.until(lambda: page.text("#progress-text").startswith("Step"))
    page.find("#cancel").click()
    page.until(lambda: page.text("#progress-text").startswith("Cancelled"))
    page.until(page.find("#generate").is_enabled)

    def ended() -> dict[str, Any] | None:
        found = httpx.get(server.url + "/debug/requests").json()["requests"][0]
        return found if found["request"]["num_inference_steps"] == 100 else None

    timeline = page.until(ended)
    assert timeline["outcome"] == "cancelled"
    assert 0 < sum(span["name"] == "denoise_step" for span in timeline["spans"]) < 100
    # Its waterfall shows how far it came.
    page.until(lambda: page.text("#trace-id") == timeline["trace_id"])
    assert page.text("#time-text").startswith("Ended as cancelled.")
    page.generate(num_inference_steps=1)  # the page is ready for the next one


@pytest.mark.parametrize(
    ("fields", "wrong"),
    [
        ({"guidance_scale": 99}, "guidance_scale"),
        ({"num_inference_steps": "many"}, "num_inference_steps"),
        ({"seed": MAX_SEED + 1}, "seed"),
        ({"num_images": 1000}, "num_images"),
        ({"prompt": " "}, "prompt"),
    ],
)
def test_an_error_is_at_its_field(page: Page, fields: dict[str, Any], wrong: str) -> None:
    page.enter(**{"num_inference_steps": 1, **fields})
    page.find("#generate").click()
    page.until(lambda: page.text(f"#{wrong}-error"))
    invalid = [field.get_attribute("id") for field in page.all("[aria-invalid=true]")]
    assert invalid == [wrong]
    assert page.run("return document.activeElement.id") == wrong
    assert page.text("#form-error") == ""
    page.until(page.find("#generate").is_enabled)


ANSWER_STREAMS_WITH = """
const [status, body] = arguments;
const real = window.fetch;
window.fetch = (path, options) => path === '/stream'
  ? Promise.resolve(new Response(body, {status})) : real(path, options);
"""


def test_a_failure_shows_its_own_trace(page: Page, server: ServerProcess) -> None:
    def refused() -> None:
        page.find("#generate").click()
        page.until(page.find("#generate").is_enabled)
        said = page.text("#progress-text")
        assert said.startswith("No picture")
        assert "earlier" in said  # the picture that is still there

    page.generate(num_inference_steps=1)
    drawn = page.text("#trace-id")
    page.enter(guidance_scale=99)
    refused()
    failed = page.text("#trace-id")
    assert failed != drawn
    page.until(lambda: page.all("#waterfall [data-name=receive]"))
    assert not page.all("#waterfall [data-name=inference]")
    assert httpx.get(f"{server.url}/timeline/{failed}").json()["status"] == 422

    # The server has no timeline of it: an answer of another process.
    elsewhere = "ab" * 16
    full = {"detail": "full", "error_type": "queue_full", "trace_id": elsewhere}
    page.run(ANSWER_STREAMS_WITH, 429, json.dumps(full))
    refused()
    assert page.text("#form-error") == "full"
    assert page.text("#trace-id") == elsewhere
    assert page.find("#trace-id").is_displayed()
    assert page.all("#waterfall rect") == []
    assert not page.find("#trace-link").is_displayed()
    assert page.all("#thumbnails .compare:enabled") == []

    page.find("#thumbnails .show").click()
    assert page.text("#trace-id") == drawn
    # A proxy's answer names no trace, and its body may be anything.
    for body in ({"message": "upstream timed out"}, None, {"detail": None}, {"detail": {}}):
        page.run(ANSWER_STREAMS_WITH, 502, json.dumps(body))
        refused()
        assert "502" in page.text("#form-error")
        assert not page.find("#trace").is_displayed()
        assert page.all("#waterfall rect") == []


def test_every_seed_stays_exact(page: Page, server: ServerProcess) -> None:
    page.enter(seed="-007")
    for kind in ("curl", "openai", "fal"):
        page.run(f"document.querySelector('[data-code={kind}]').click()")
        code = page.text("#code-text")
        assert re.findall(r'"seed": ?([^,}]*)', code) == ["-7"]
    page.generate(num_inference_steps=1, seed=MAX_SEED)
    assert page.text("#pictures .seed") == f"seed {MAX_SEED}"
    timeline = httpx.get(f"{server.url}/timeline/{page.text('#trace-id')}").json()
    assert timeline["request"]["seed"] == str(MAX_SEED)
    for kind in ("curl", "openai", "fal"):
        page.run(f"document.querySelector('[data-code={kind}]').click()")
        assert str(MAX_SEED) in page.text("#code-text")
    page.enter(seed="")
    page.find("#thumbnails .show").click()
    assert page.find("#seed").get_property("value") == str(MAX_SEED)


@pytest.mark.slow
def test_the_code_makes_the_same_request(page: Page, tmp_path: Path) -> None:
    prompt = 'it\'s a "red" circle \\ on white'
    page.generate(num_inference_steps=1, seed=MAX_SEED, guidance_scale=1.5, prompt=prompt)
    code = {}
    for kind in ("curl", "openai", "fal"):
        page.run(f"document.querySelector('[data-code={kind}]').click()")
        code[kind] = page.text("#code-text")

    command = shlex.split(code["curl"].replace("\\\n", ""))  # joined as a shell does
    body = json.loads(command[command.index("-d") + 1])
    asked = {
        "prompt": prompt,
        "num_inference_steps": 1,
        "seed": MAX_SEED,
        "guidance_scale": 1.5,
        "width": 64,
        "height": 64,
        "format": "jpeg",
    }
    assert body == asked
    if shutil.which("curl"):
        subprocess.run([*command, "--output", str(tmp_path / "answer")], check=True)
        answer = json.loads((tmp_path / "answer").read_text())
        assert (answer["prompt"], answer["seed"]) == (prompt, MAX_SEED)

    [call] = [
        node
        for node in ast.walk(ast.parse(code["fal"]))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "fal_client.subscribe"
    ]
    assert ast.literal_eval(call.keywords[0].value) == asked

    variables: dict[str, Any] = {}
    with contextlib.redirect_stdout(io.StringIO()):
        exec(code["openai"], variables)
    assert variables["images"].seeds == [MAX_SEED]
    variables["client"].close()


def test_two_images_and_their_seeds(page: Page) -> None:
    page.generate(num_inference_steps=1, num_images=2, seed=41)
    seeds = page.run(
        "return [...document.querySelectorAll('#pictures .seed')].map(e => e.textContent)"
    )
    assert seeds == ["seed 41", "seed 42"]
    downloads = page.all("#pictures a[download]")
    assert [link.get_attribute("download") for link in downloads] == [
        "stepspan-41.jpeg",
        "stepspan-42.jpeg",
    ]
    assert all(str(link.get_attribute("href")).startswith("blob:") for link in downloads)


def test_a_lora_and_its_scale(page: Page, server: ServerProcess) -> None:
    page.find("[data-lora=night]").click()
    page.enter(num_inference_steps=1)
    for wrong in (9, "strong"):
        page.enter(**{"lora-scale-0": wrong})
        page.find("#generate").click()
        page.until(lambda: page.text("#loras-error").startswith("night: "))
        page.until(page.find("#generate").is_enabled)
        invalid = [field.get_attribute("id") for field in page.all("[aria-invalid=true]")]
        assert invalid == ["lora-scale-0"]
        assert page.run("return document.activeElement.id") == "lora-scale-0"
        page.run("document.getElementById('loras-error').textContent = ''")
    page.enter(**{"lora-scale-0": " "})  # left to the server, as every empty field
    page.generate()
    assert '"loras":[{"path":"night"}]' in page.text("#code-text")
    page.enter(**{"lora-scale-0": 0.5})
    page.generate(num_inference_steps=1)
    assert page.all("[aria-invalid]") == []
    timeline = httpx.get(f"{server.url}/timeline/{page.text('#trace-id')}").json()
    assert timeline["request"]["loras"] == ["night"]
    assert '"loras":[{"path":"night","scale":0.5}]' in page.text("#code-text")


def test_a_flagged_picture_says_why_it_is_black(page: Page, server: ServerProcess) -> None:
    page.generate(num_inference_steps=1)
    assert page.all("#pictures .flagged") == []
    body = {"prompt": "a red circle", "num_inference_steps": 1}
    events = httpx.post(server.url + "/stream", json=body, timeout=60).text
    flagged = events.replace(
        '"prompt_truncated":', '"has_nsfw_concepts":[true],"prompt_truncated":'
    )
    page.run(ANSWER_STREAMS_WITH, 200, flagged)
    page.generate()
    assert "safety checker" in page.text("#pictures .flagged")


READ_IN_PARTS = """
const [text, length, done] = arguments;
const bytes = new TextEncoder().encode(text);
let at = 0;
const body = new ReadableStream({pull(parts) {
  parts.enqueue(bytes.slice(at, at + length));
  at += length;
  if (at >= bytes.length) parts.close();
}});
const real = window.fetch;
window.fetch = () => Promise.resolve(new Response(body));
import('/playground/server.js').then(async ({drawEvents}) => {
  const began = performance.now();
  const read = [];
  for await (const event of drawEvents('{}', new AbortController().signal)) read.push(event);
  window.fetch = real;
  done([read.map((event) => [event.type, event.images?.length]), performance.now() - began]);
}).catch((error) => done(String(error)));
"""


def stream_of(images: int, letters: int) -> str:
    last = {"type": "image", "images": [{"url": "A" * letters}] * images}
    events = [{"type": "queued"}, {"type": "step"}, {"type": "step"}, last]
    return ": a comment\n\n" + "".join(f"event: x\ndata: {json.dumps(e)}\n\n" for e in events)


@pytest.mark.parametrize("length", [1, 2, 3, 7, 10_000])
def test_events_are_read_however_they_are_parted(page: Page, length: int) -> None:
    read, _ = page.driver.execute_async_script(READ_IN_PARTS, stream_of(2, 5), length)  # type: ignore[no-untyped-call]
    assert read == [["queued", None], ["step", None], ["step", None], ["image", 2]]


def test_many_large_pictures_do_not_stop_the_page(page: Page) -> None:
    """Searching all that has arrived anew with each part took half a minute."""
    read, ms = page.driver.execute_async_script(READ_IN_PARTS, stream_of(24, 2_000_000), 65536)  # type: ignore[no-untyped-call]
    assert read[-1] == ["image", 24]
    assert ms < 10_000


NO_STORAGE = """
Object.defineProperty(window, 'sessionStorage', {
  get() { throw new DOMException('Access is denied for this document.', 'SecurityError'); },
});
"""


def test_a_browser_that_keeps_nothing_draws_too(page: Page) -> None:
    """As with all cookies blocked."""
    driver = page.driver
    added = driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": NO_STORAGE})
    try:
        driver.get(page.url)
        page.wait_ready()
        page.generate(num_inference_steps=1)
        assert len(page.all("#pictures img")) == 1
    finally:
        driver.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", added)


LONG_NAMES = """
const real = window.fetch;
window.fetch = async (path, options) => {
  const answer = await real(path, options);
  if (path !== '/stats') return answer;
  const stats = await answer.json();
  stats.model = '/models/' + 'a_long_name_of_a_folder'.repeat(5);
  stats.request.loras = ['x'.repeat(64)];
  return Response.json(stats);
};
"""


def test_long_names_fit_a_phone(page: Page) -> None:
    page.emulate(390, 900)
    page.run(LONG_NAMES)
    page.until(lambda: page.text("#model").startswith("/models/") and page.all("[data-lora^=xxx]"))
    assert page.run("return document.documentElement.scrollWidth") <= 390


def test_text_is_never_read_as_html(page: Page) -> None:
    prompt = "<img src=x onerror=\"document.title='taken'\"> '; rm"
    page.generate(num_inference_steps=1, prompt=prompt)
    assert len(page.all("#pictures img")) == 1
    assert prompt in str(page.find("#pictures img").get_attribute("alt"))
    assert page.run("return document.title") == "stepspan playground"
    assert page.console() == []


def test_two_requests_are_laid_over_one_another(page: Page) -> None:
    page.generate(num_inference_steps=2)
    page.generate(num_inference_steps=3)
    page.run("document.querySelectorAll('#thumbnails .compare')[1].click()")
    others = page.all("#waterfall rect.other")
    assert len([bar for bar in page.run(BARS) if bar["name"] == "denoise_step"]) == 3
    assert len(others) == len(page.run(BARS)) - 1  # a step fewer
    page.run("document.querySelector(\"[data-name=denoise_step][data-index='1']\").focus()")
    assert "the other: " in page.text("#figures")
    page.run("document.querySelector(\"[data-name=denoise_step][data-index='2']\").focus()")
    assert "the other: " not in page.text("#figures")
    page.find("#stop-compare").click()
    assert page.all("#waterfall rect.other") == []


def test_an_operator_sees_the_requests_of_everybody(page: Page, server: ServerProcess) -> None:
    body = {"prompt": "a red circle", "num_inference_steps": 1}
    trace_id = httpx.post(server.url, json=body, timeout=60).json()["trace_id"]
    page.find("#operator summary").click()
    # No browser sends the first; the server refuses the second.
    for wrong in ("ключ-оператора", "another-token-than-that"):
        page.run("document.getElementById('token-error').textContent = ''")
        page.enter(token=wrong)
        page.find("#operator-form button").click()
        page.until(lambda: page.text("#token-error"))
    page.enter(token=TOKEN)
    page.find("#operator-form button").click()
    page.until(lambda: page.all("#everybody tbody button"))
    assert page.text("#token-error") == ""
    page.find(f"[aria-label='Show trace {trace_id}']").click()
    assert page.text("#trace-id") == trace_id


ON_A_GPU = """
const done = arguments[0];
import('/playground/waterfall.js').then(({drawWaterfall}) => {
  const span = (name, depth, clock, start_ms, ms, more) =>
    ({name, depth, clock, start_ms, ms, ...more});
  const place = document.getElementById('waterfall');
  drawWaterfall(place, {trace_id: 'a', duration_ms: 100, spans: [
    span('text-to-image', 0, 'host', 0, 100),
    span('inference', 1, 'host', 1, 98, {batch_size: 2}),
    span('denoise', 2, 'cuda', 10, 50),
    span('denoise_step', 3, 'cuda', 10, 25, {index: 0, gpu_queue_ms: 4}),
    span('denoise_step', 3, 'cuda', 35, 25, {index: 1, gpu_queue_ms: 20}),
  ]}, null, (text) => { document.getElementById('figures').textContent = text; });
  done([...place.querySelectorAll('rect')].map((each) => each.getAttribute('class').split(' ')));
}).catch((error) => done(String(error)));
"""


def test_the_gpus_clock_and_queue_are_told_apart(page: Page) -> None:
    classes = page.driver.execute_async_script(ON_A_GPU)  # type: ignore[no-untyped-call]
    clocks = [names[1] for names in classes if names[0] == "bar"]
    assert clocks == ["host", "host", "gpu", "gpu", "gpu"]
    assert sum(names == ["mark"] for names in classes) == 3
    assert sum(names == ["wait"] for names in classes) == 2
    page.run("document.querySelector(\"[data-name=denoise_step][data-index='1']\").focus()")
    assert "waited 20.00 ms in the GPU's queue" in page.text("#figures")
    assert "GPU clock" in page.text("#figures")


def test_it_works_with_the_keyboard_alone(page: Page) -> None:
    def press(*keys: str) -> None:
        ActionChains(page.driver).send_keys(*keys).perform()

    def focused() -> str:
        found: str = page.run(
            "const e = document.activeElement; return e.id || e.dataset.name || e.className"
        )
        return found

    press(Keys.TAB)
    assert focused() == "prompt"
    while focused() != "num_inference_steps":
        press(Keys.TAB)
    press("2")
    ActionChains(page.driver).key_down(Keys.CONTROL).send_keys(Keys.ENTER).key_up(
        Keys.CONTROL
    ).perform()
    page.until(lambda: page.text("#trace-id"))
    visited = []
    while focused() != "text-to-image":
        press(Keys.TAB)
        visited.append(focused())
        assert len(visited) < 60, visited
    for stop in ("guidance_scale", "seed", "format", "generate", "copy-trace"):
        assert stop in visited
    press(Keys.ARROW_RIGHT)
    assert focused() == "receive"
    assert page.text("#figures").startswith("receive: ")
    press(Keys.END)
    assert focused() == "respond"
    press(Keys.TAB)
    press(Keys.ENTER)  # the thumbnail
    assert focused() == "show"


@pytest.mark.parametrize(
    ("width", "dark"),
    [
        pytest.param(1200, False, id="wide", marks=pytest.mark.slow),
        pytest.param(1200, True, id="dark"),
        pytest.param(390, False, id="phone"),
    ],
)
def test_it_is_readable_on_every_screen(page: Page, width: int, dark: bool) -> None:
    page.generate(num_inference_steps=2)
    page.generate(num_inference_steps=2)
    page.run("document.querySelectorAll('#thumbnails .compare')[1].click()")
    page.find("#code summary").click()
    page.find("#generate").click()
    page.emulate(width, 900, dark)
    page.until(lambda: page.text("#progress-text").startswith("Done"))
    page.until(page.find("#generate").is_enabled)  # the thumbnails are drawn anew before that
    assert page.run("return document.documentElement.scrollWidth") <= width
    background = page.run("return getComputedStyle(document.body).backgroundColor")
    red = int(background.split("(")[1].split(",")[0])
    assert (red < 60) == dark
    for field in page.all("input, select, textarea, button"):
        assert field.accessible_name or not field.is_displayed()
    assert violations(page) == []


WARMING = """
return document.getElementById('state').textContent === 'warming up'
  && !document.getElementById('warmup').hidden
  && document.getElementById('warmup-text').textContent !== ''
  && document.querySelector('#warmup-phases [data-state=now]') !== null
"""


@pytest.mark.slow
def test_the_page_is_quick(page: Page) -> None:
    assert statistics.median(first_paint_ms(page) for _ in range(5)) < 300
    page.open()
    page.wait_ready()
    assert statistics.median(steps_late_ms(page, previews=True)) < 50


@pytest.mark.slow
def test_a_server_that_dies_and_returns(browser: Any, otlp: OtlpEndpoint) -> None:
    port = free_port()
    settings = environment(otlp, SDXL_SHAPES="64x64")
    page = Page(browser, f"http://127.0.0.1:{port}")
    with self_hosted(settings, port=port) as first:
        first.wait_until_ready(START_SECONDS)
        page.open()
        page.wait_ready()
        page.enter(num_inference_steps=100, prompt="a red circle")
        page.find("#generate").click()
        page.until(lambda: page.text("#progress-text").startswith("Step"))
        first.process.send_signal(signal.SIGKILL)
        page.until(lambda: page.text("#progress-text").startswith("No picture"))
        page.until(lambda: page.text("#state").startswith("not reachable"))
        assert not page.find("#generate").is_enabled()
    with self_hosted(settings, port=port):
        page.until(lambda: page.run(WARMING), START_SECONDS)
        page.wait_ready(START_SECONDS)
        assert not page.find("#warmup").is_displayed()
        assert page.find("#prompt").get_property("value") == "a red circle"  # nothing is lost
        page.generate(num_inference_steps=1)
