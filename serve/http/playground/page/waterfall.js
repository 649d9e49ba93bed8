// @ts-check
/** Draws a request's timeline to scale, or two of them, row beside row. */

import { svg, time } from "./dom.js";

/**
 * @typedef {import("./server.js").Span} Span
 * @typedef {import("./server.js").Timeline} Timeline
 * @typedef {{name: string, depth: number, first: Span[], second: Span[]}} Row
 */

const ROW = 24;
const HEAD = 26;
const STEP = "denoise_step";

/** @param {Span} span */
function label(span) {
  return span.name === STEP ? `step ${span.index}` : span.name;
}

/**
 * Rows in the order of the tree, by name; all steps of a run share one. A stage that happens again,
 * as in the second run of a request, has a row of its own.
 * @param {Timeline} timeline
 * @returns {Map<string, {name: string, depth: number, spans: Span[]}>}
 */
export function rowsOf(timeline) {
  const rows = new Map();
  /** @type {Map<string, number>} */
  const seen = new Map();
  for (const span of timeline.spans) {
    const again = span.name === STEP && (span.index ?? 0) > 0;
    const count = (seen.get(span.name) ?? 0) + (again ? 0 : 1);
    seen.set(span.name, count);
    const key = `${span.name} ${count}`;
    const row = rows.get(key) ?? { name: span.name, depth: span.depth, spans: [] };
    row.spans.push(span);
    rows.set(key, row);
  }
  return rows;
}

/**
 * @param {Timeline} first
 * @param {Timeline | null} second
 * @returns {Row[]}
 */
function merged(first, second) {
  const others = second === null ? new Map() : rowsOf(second);
  /** @type {Row[]} */
  const rows = [];
  for (const [key, row] of rowsOf(first)) {
    rows.push({ ...row, first: row.spans, second: others.get(key)?.spans ?? [] });
    others.delete(key);
  }
  for (const row of others.values()) rows.push({ ...row, first: [], second: row.spans });
  return rows;
}

/**
 * One span in a sentence.
 * @param {Span} span
 * @param {Span | undefined} other the same part of the other request
 */
export function figures(span, other) {
  const clock = span.clock === "host" ? "host clock" : "GPU clock";
  const parts = [`${label(span)}: ${time(span.ms)}`, `starts at ${time(span.start_ms)}`, clock];
  if (span.gpu_queue_ms !== undefined && span.clock !== "host") {
    parts.push(`waited ${time(span.gpu_queue_ms)} in the GPU's queue`);
  }
  if ((span.batch_size ?? 1) > 1) parts.push(`a run of ${span.batch_size} images`);
  if (span.failed) parts.push("failed here");
  if (other !== undefined) {
    const more = span.ms - other.ms;
    parts.push(`the other: ${time(other.ms)} (${more < 0 ? "−" : "+"}${time(Math.abs(more))})`);
  }
  return parts.join(" · ");
}

/**
 * Draw into `place`. The bars are one stop of the Tab key; arrow keys, Home and End move among them.
 * @param {HTMLElement} place
 * @param {Timeline} first
 * @param {Timeline | null} second laid over it
 * @param {(text: string) => void} show gets the figures of the chosen span
 */
export function drawWaterfall(place, first, second, show) {
  const width = Math.max(280, place.clientWidth);
  const narrow = width < 560;
  const names = narrow ? 112 : 150;
  const times = narrow ? 70 : 84;
  const rows = merged(first, second);
  const totalMs = Math.max(first.duration_ms, second?.duration_ms ?? 0, 0.001);
  const height = HEAD + ROW * rows.length + 4;
  const scale = (width - names - times) / totalMs;
  /** @param {number} ms */
  const x = (ms) => names + ms * scale;
  const picture = svg("svg", {
    viewBox: `0 0 ${width} ${height}`, height, role: "group",
    "aria-label": `Waterfall of ${rows.length} rows, ${time(first.duration_ms)} in all. ` +
      "Arrow keys go from bar to bar.",
  });
  for (const ms of ruler(totalMs, Math.max(2, (width - names - times) / 75))) {
    picture.append(
      svg("line", { class: "grid", x1: x(ms), x2: x(ms), y1: HEAD - 6, y2: height }),
      svg("text", { x: x(ms), y: 14, "text-anchor": "middle" }, `${ms} ms`),
    );
  }
  /** @type {SVGElement[]} */
  const bars = [];
  rows.forEach((row, number) => {
    const y = HEAD + ROW * number;
    const shown = row.first.length > 0 ? row.first : row.second;
    const name = row.name === STEP && shown.length > 1 ? `${shown.length} steps` : row.name;
    picture.append(
      svg("text", { class: "name", x: 2 + row.depth * (narrow ? 6 : 10), y: y + 16 }, name),
    );
    const others = new Map(row.second.map((span) => [span.index ?? -1, span]));
    row.first.forEach((span, place_) => {
      const left = x(span.start_ms);
      const wide = Math.max(1.5, span.ms * scale);
      const classes = ["bar", span.clock === "host" ? "host" : "gpu"];
      if (place_ % 2 === 1) classes.push("odd");
      if (span.name === "text-to-image" || span.name === "inference" || span.name === "denoise") {
        classes.push("parent");
      }
      if (span.failed) classes.push("failed");
      const text = figures(span, others.get(span.index ?? -1));
      const bar = svg("rect", {
        class: classes.join(" "), x: left, y: y + 4, width: wide, height: ROW - 8, rx: 2,
        tabindex: bars.length === 0 ? 0 : -1, role: "img", "aria-label": text,
        "data-name": span.name, "data-index": span.index ?? -1,
        "data-start-ms": span.start_ms, "data-ms": span.ms,
      });
      const choose = () => {
        for (const each of bars) each.classList.toggle("chosen", each === bar);
        show(text);
      };
      for (const event of ["mouseenter", "focus", "click"]) bar.addEventListener(event, choose);
      bars.push(bar);
      picture.append(bar);
      if (span.clock !== "host") {
        picture.append(svg("rect", { class: "mark", x: left, y: y + 4, width: wide, height: 3 }));
      }
      if (span.gpu_queue_ms && span.clock !== "host") {
        const wait = Math.min(span.gpu_queue_ms, span.start_ms);
        picture.append(svg("rect", {
          class: "wait", x: x(span.start_ms - wait), y: y + ROW - 3, width: wait * scale, height: 2,
        }));
      }
    });
    for (const span of row.second) {
      picture.append(svg("rect", {
        class: "bar other", x: x(span.start_ms), y: y + 7, width: Math.max(1.5, span.ms * scale),
        height: ROW - 14, "pointer-events": "none",
      }));
    }
    const summed = shown.reduce((sum, span) => sum + span.ms, 0);
    picture.append(
      svg("text", { x: width - 2, y: y + 16, "text-anchor": "end" }, time(summed)),
    );
  });
  picture.addEventListener("keydown", (/** @type {KeyboardEvent} */ event) => {
    const at = bars.indexOf(/** @type {any} */ (document.activeElement));
    const to = { ArrowRight: at + 1, ArrowDown: at + 1, ArrowLeft: at - 1, ArrowUp: at - 1,
      Home: 0, End: bars.length - 1 }[event.key];
    const next = to === undefined ? undefined : bars[to];
    if (at < 0 || next === undefined) return;
    event.preventDefault();
    bars[at]?.setAttribute("tabindex", "-1");
    next.setAttribute("tabindex", "0");
    next.focus();
  });
  place.replaceChildren(picture);
}

/**
 * Round numbers of milliseconds for the ruler.
 * @param {number} totalMs
 * @param {number} most
 */
function ruler(totalMs, most) {
  let step = 1;
  for (let power = 1; totalMs / step >= most; power *= 10) {
    for (const digit of [1, 2, 5]) {
      step = digit * power;
      if (totalMs / step < most) break;
    }
  }
  const marks = [];
  for (let ms = 0; ms <= totalMs; ms += step) marks.push(ms);
  return marks;
}

/**
 * A bar for each step that has ended, with room for those to come.
 * @param {SVGElement} place
 * @param {number[]} stepsMs
 * @param {number} total
 * @param {string} clock
 */
export function drawStepBars(place, stepsMs, total, clock) {
  const highest = Math.max(...stepsMs, 0.001);
  const wide = 100 / Math.max(total, 1);
  place.setAttribute("viewBox", "0 0 100 30");
  place.setAttribute("preserveAspectRatio", "none");
  place.replaceChildren(...stepsMs.map((ms, index) => svg("rect", {
    class: `bar ${clock}${index % 2 ? " odd" : ""}`, x: index * wide, width: wide * 0.85,
    y: 30 - (ms / highest) * 28, height: (ms / highest) * 28,
  })));
}

/**
 * Two requests in one sentence.
 * @param {Timeline} first
 * @param {Timeline} second
 */
export function comparison(first, second) {
  const [one, two] = [first, second].map((timeline) => {
    const steps = timeline.spans.filter((span) => span.name === STEP).map((span) => span.ms);
    steps.sort((a, b) => a - b);
    return { all: timeline.duration_ms, step: steps[Math.floor(steps.length / 2)] };
  });
  if (one === undefined || two === undefined) return "";
  const steps = one.step && two.step ? `, median step ${time(one.step)} and ${time(two.step)}` : "";
  return `This one and the other: ${time(one.all)} and ${time(two.all)}${steps}.`;
}

