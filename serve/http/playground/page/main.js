// @ts-check
/** The playground: one request at a time, its picture, and where its time went. */

import { asCode } from "./code.js";
import { byId, copy, element, time } from "./dom.js";
import { applyLimits, clearErrors, fillForm, NotANumber, readForm, showErrors } from "./form.js";
import { askForKey, keyIsRight, offerKey } from "./key.js";
import { drawStrip, showState, showStats, showWarmup } from "./live.js";
import { offerEverybody } from "./operator.js";
import { drawRecent, keep, keptRequests, thumbnailOf } from "./recent.js";
import {
  drawEvents, exactBody, KeyNeeded, keptKey, readStats, readTimeline, RequestFailed, ServerGone,
} from "./server.js";
import { comparison, drawStepBars, drawWaterfall } from "./waterfall.js";

/**
 * @typedef {import("./server.js").Stats} Stats
 * @typedef {import("./server.js").Timeline} Timeline
 * @typedef {import("./recent.js").Kept} Kept
 */

const POLL_MS = 2000;
const POLL_SOON_MS = 500;

/** @type {AbortController | null} */
let running = null;
/** @type {Stats | null} */
let stats = null;
/** @type {Record<string, any> | null} */
let request = null;
/** @type {Timeline | null} */
let shown = null;
/** @type {Timeline | null} */
let compared = null;
/** @type {string[]} */
let objectUrls = [];

// A request

byId("form").addEventListener("submit", (/** @type {Event} */ event) => {
  event.preventDefault();
  void generate();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    void generate();
  }
});
byId("cancel").addEventListener("click", () => running?.abort());

async function generate() {
  if (running !== null || byId("generate").disabled) return;
  clearErrors();
  try {
    request = readForm();
  } catch (error) {
    if (!(error instanceof NotANumber)) throw error;
    showErrors(error.message, error.problems);
    return;
  }
  showCode();
  const controller = running = new AbortController();
  let traceId = "";
  showButtons();
  progress("Sent.");
  try {
    await follow(request, controller.signal, (id) => { traceId = id; });
  } catch (error) {
    if (controller.signal.aborted) {
      noPicture("Cancelled. The server stops within two steps.");
    } else if (error instanceof RequestFailed) {
      noPicture("No picture.");
      showErrors(error.message, error.problems);
      traceId = error.traceId || traceId; // only an error names a request that was never queued
    } else if (error instanceof KeyNeeded) {
      noPicture("No picture: the server needs a key.");
      withoutKey();
    } else if (error instanceof ServerGone) {
      noPicture("No picture: the connection to the server was lost.");
      showState("gone");
      soon();
    } else {
      throw error;
    }
    showNoTimeline(traceId);
    if (traceId !== "" && !(error instanceof ServerGone)) void showFailed(traceId);
  } finally {
    running = null;
    showButtons();
  }
}

/**
 * Where the time went of a request that drew nothing, unless another one is shown since.
 * @param {string} traceId
 */
async function showFailed(traceId) {
  const timeline = await readTimeline(traceId);
  if (timeline !== null && byId("trace-id").textContent === traceId) showTimeline(timeline);
}

/**
 * @param {Record<string, any>} asked
 * @param {AbortSignal} signal
 * @param {(traceId: string) => void} onQueued
 */
async function follow(asked, signal, onQueued) {
  /** @type {number[]} */
  const stepsMs = [];
  const bars = byId("step-bars");
  bars.replaceChildren();
  const clock = stats?.device.startsWith("cuda") ? "gpu" : "host";
  for await (const event of drawEvents(exactBody(asked), signal)) {
    if (event.type === "queued") {
      onQueued(event.trace_id);
      byId("pictures").replaceChildren();
      const place = event.waiting === 0 ? "Next in the queue" : `${event.waiting} in the queue before this one`;
      progress(event.eta_ms === undefined ? `${place}.` : `${place}; about ${time(event.eta_ms)}.`);
    } else if (event.type === "step") {
      stepsMs.push(event.gpu_ms);
      progress(`Step ${stepsMs.length} of ${event.total}: ${time(event.gpu_ms)}`);
      drawStepBars(bars, stepsMs, event.total, clock);
      if (event.preview) showPreview(event.preview, stepsMs.length / event.total);
    } else if (event.type === "image") {
      await showImages(asked, event);
    }
  }
}

/** @param {string} text */
function progress(text) {
  byId("progress-text").textContent = text;
}

/** @param {string} text why the request drew nothing */
function noPicture(text) {
  const place = byId("pictures");
  place.querySelector(".preview")?.closest("figure")?.remove();
  progress(place.childElementCount === 0 ? text : `${text} Below is what an earlier request drew.`);
}

function showButtons() {
  byId("generate").disabled = running !== null || stats === null || !stats.serving;
  byId("cancel").disabled = running === null;
}

/**
 * @param {string} url
 * @param {number} share how much of the steps is done; the picture sharpens with it
 */
function showPreview(url, share) {
  const place = byId("pictures");
  let image = place.querySelector("img.preview");
  if (image === null) {
    image = element("img", { class: "preview", alt: "Preview" });
    place.replaceChildren(element("figure", {}, image));
  }
  image.src = url;
  image.style.filter = `blur(${((1 - share) * 4).toFixed(1)}px)`;
}

/**
 * @param {Record<string, any>} asked
 * @param {any} answer
 */
async function showImages(asked, answer) {
  for (const url of objectUrls) URL.revokeObjectURL(url);
  objectUrls = [];
  const figures = answer.images.map((/** @type {any} */ image, /** @type {number} */ number) => {
    const url = objectUrl(image.url);
    const kind = image.content_type.split("/")[1];
    const flagged = answer.has_nsfw_concepts?.[number] === true;
    return element(
      "figure",
      {},
      element("img", {
        src: url, width: image.width, height: image.height,
        alt: `Picture ${number + 1}: ${answer.prompt}`,
      }),
      element(
        "figcaption",
        {},
        element("span", { class: "seed" }, `seed ${image.seed}`),
        element("span", {}, `${image.width} × ${image.height}`),
        ...(flagged ? [element("span", { class: "flagged" }, "black: the safety checker flagged it")] : []),
        element("a", { href: url, download: `stepspan-${image.seed}.${kind}` }, "Download"),
      ),
    );
  });
  byId("pictures").replaceChildren(...figures);
  const count = answer.timings.steps_ms.length;
  progress(`Done: ${count} steps, ${time(answer.timings.inference * 1000)} in the model.` +
    (answer.prompt_truncated ? " The prompt was too long: its end was not read." : ""));
  request = { ...asked, seed: String(answer.seed) };
  showCode();
  const timeline = await readTimeline(answer.trace_id);
  if (timeline === null) {
    showNoTimeline(answer.trace_id);
    return;
  }
  keep({
    request,
    seed: String(answer.seed),
    thumbnail: await thumbnailOf(objectUrls[0] ?? ""),
    timeline,
  });
  showTimeline(timeline);
}

/**
 * A data URI as an address that can be downloaded whatever its length.
 * @param {string} url
 */
function objectUrl(url) {
  const [head, data] = url.split(",", 2);
  if (!head?.startsWith("data:") || data === undefined) return url;
  const letters = atob(data);
  const bytes = new Uint8Array(letters.length); // `Uint8Array.from` takes twenty times as long
  for (let at = 0; at < letters.length; at += 1) bytes[at] = letters.charCodeAt(at);
  const type = head.slice("data:".length).split(";")[0] ?? "";
  const made = URL.createObjectURL(new Blob([bytes], { type }));
  objectUrls.push(made);
  return made;
}

// Code

/** @type {string} */
let codeKind = "curl";
for (const button of document.querySelectorAll("[data-code]")) {
  button.addEventListener("click", () => {
    codeKind = /** @type {HTMLElement} */ (button).dataset.code ?? "curl";
    for (const each of document.querySelectorAll("[data-code]")) {
      each.setAttribute("aria-pressed", String(each === button));
    }
    showCode();
  });
}
byId("copy-code").addEventListener("click", () => copy(byId("copy-code"), byId("code-text").textContent));
byId("code").addEventListener("toggle", showCode);

function showCode() {
  let fields = request;
  if (fields === null) {
    try {
      fields = readForm();
    } catch {
      return; // a field is wrong
    }
  }
  byId("code-text").textContent = asCode(fields, codeKind, location.origin, keptKey() !== "");
}

// Where the time went

/** @param {Timeline} timeline */
function showTimeline(timeline) {
  if (compared?.trace_id === timeline.trace_id) compared = null;
  shown = timeline;
  drawTimeline();
  drawThumbnails();
}

/**
 * The page has no timeline of the last request, and another request's must not look like its own.
 * @param {string} traceId "": not known either
 */
function showNoTimeline(traceId) {
  shown = compared = null;
  byId("time-text").textContent = "The page has no times of this request.";
  byId("trace").hidden = traceId === "";
  byId("trace-id").textContent = traceId;
  byId("trace-link").hidden = true;
  byId("legend").hidden = true;
  byId("waterfall").replaceChildren();
  byId("figures").textContent = "";
  drawThumbnails();
}

function drawThumbnails() {
  drawRecent(shown?.trace_id ?? "", compared?.trace_id ?? "", onShow, onCompare);
}

function drawTimeline() {
  if (shown !== null) {
    const slow = shown.slow_reason === null ? "" : ` Slow because of: ${shown.slow_reason.replaceAll("_", " ")}.`;
    const ended = shown.outcome === "ok" ? "" : `Ended as ${shown.outcome.replaceAll("_", " ")}. `;
    const text = `${ended}${time(shown.duration_ms)} from its arrival to the last byte; ` +
      `${time(shown.unattributed_ms)} of them in no stage.${slow}`;
    byId("time-text").textContent = compared === null ? text : `${text} ${comparison(shown, compared)}`;
    byId("trace").hidden = false;
    byId("trace-id").textContent = shown.trace_id;
    const link = byId("trace-link");
    const template = stats?.trace_url ?? null;
    link.hidden = template === null || !shown.exported;
    if (!link.hidden) link.href = template?.replaceAll("{trace_id}", shown.trace_id);
    byId("legend").hidden = false;
    byId("legend-compare").hidden = compared === null;
    byId("compare-name").textContent = compared === null ? "" : `the other, ${time(compared.duration_ms)}`;
    byId("figures").textContent = "Point at a bar, or go to the bars with Tab and the arrow keys.";
    drawWaterfall(byId("waterfall"), shown, compared, (figures) => {
      byId("figures").textContent = figures;
    });
  }
}

/** @param {Kept} kept */
function onShow(kept) {
  if (running === null) {
    request = kept.request;
    fillForm(kept.request);
    showCode();
  }
  showTimeline(kept.timeline);
  focusThumbnail("show", kept);
}

/** @param {Kept} kept */
function onCompare(kept) {
  const again = compared?.trace_id === kept.timeline.trace_id;
  compared = again ? null : kept.timeline;
  drawTimeline();
  drawThumbnails();
  focusThumbnail("compare", kept);
}

/**
 * The thumbnails were drawn anew; the keyboard's focus stays where it was.
 * @param {string} kind
 * @param {Kept} kept
 */
function focusThumbnail(kind, kept) {
  const number = keptRequests().findIndex((each) => each.timeline.trace_id === kept.timeline.trace_id);
  /** @type {HTMLElement | null} */
  const button = byId("thumbnails").children[number]?.querySelector(`.${kind}`) ?? null;
  button?.focus();
}

byId("stop-compare").addEventListener("click", () => {
  compared = null;
  drawTimeline();
  drawThumbnails();
  byId("waterfall").querySelector("[tabindex='0']")?.focus();
});
byId("copy-trace").addEventListener("click", () => copy(byId("copy-trace"), byId("trace-id").textContent));

let drawnWidth = 0;
new ResizeObserver(() => {
  const width = byId("waterfall").clientWidth;
  if (width === drawnWidth) return;
  drawnWidth = width;
  if (shown !== null) drawTimeline();
  drawStrip();
}).observe(byId("waterfall"));

// The server

/** @type {ReturnType<typeof setTimeout>} */
let next;

async function poll() {
  /** @type {number | null} */
  let waitMs = POLL_MS;
  try {
    stats = await readStats();
    keyIsRight();
    byId("model").textContent = stats.model === "" ? "" : `${stats.model} on ${stats.device}`;
    showState(stats.state === "ready" && !stats.serving ? "unhealthy" : stats.state, stats.problem);
    showWarmup(stats);
    showStats(stats);
    byId("operator").hidden = !stats.operator_token;
    if (stats.serving) applyLimits(stats.request, stats.model);
    else waitMs = POLL_SOON_MS;
  } catch (error) {
    if (error instanceof KeyNeeded) {
      withoutKey();
      waitMs = null; // nothing to ask until there is another key
    } else if (error instanceof ServerGone) {
      if (stats !== null) stats = { ...stats, serving: false };
      showState("gone");
      waitMs = POLL_SOON_MS;
    } else {
      throw error;
    }
  } finally {
    showButtons();
    clearTimeout(next);
    // A page that nobody sees asks nothing.
    if (!document.hidden && waitMs !== null) next = setTimeout(poll, waitMs);
  }
}

function withoutKey() {
  if (stats !== null) stats = { ...stats, serving: false };
  showState("locked");
  askForKey();
}

/** Ask again at once. */
function soon() {
  clearTimeout(next);
  next = setTimeout(poll, 0);
}

document.addEventListener("visibilitychange", () => {
  if (!document.hidden) soon();
});

offerEverybody(showTimeline);
offerKey(() => {
  showCode();
  soon();
});
const [newest] = keptRequests();
if (newest !== undefined) showTimeline(newest.timeline);
showButtons();
void poll();
