// @ts-check
/** What the server does now: its state, the warm-up, and the strip of step latency. */

import { byId, element, svg, time } from "./dom.js";

/**
 * @typedef {import("./server.js").Stats} Stats
 * @typedef {import("./server.js").Steps} Steps
 */

const POINTS = 90;
/** @type {(Steps | null)[]} */
const history = [];

const STATES = /** @type {Record<string, string>} */ ({
  ready: "ready",
  starting: "warming up",
  failed: "failed to start",
  draining: "shutting down",
  unhealthy: "cannot draw",
  gone: "not reachable, trying again",
  locked: "needs a key",
});

/**
 * @param {string} state
 * @param {string} [problem]
 */
export function showState(state, problem = "") {
  const pill = byId("state");
  const text = STATES[state] ?? state;
  if (pill.textContent !== text) pill.textContent = text; // read out only when it changes
  pill.dataset.state = state;
  const place = byId("problem");
  place.hidden = problem === "" || state === "starting";
  if (place.textContent !== problem) place.textContent = problem;
}

/** @param {Stats} stats */
export function showWarmup(stats) {
  const { phases, phase, eta_ms: etaMs } = stats.warmup;
  const starting = stats.state === "starting";
  byId("warmup").hidden = !starting;
  if (!starting) return;
  const done = phases.filter((each) => each.ms !== null).length;
  const eta = etaMs === null ? "" : `, about ${time(Math.max(etaMs, 0))} left for the other sizes`;
  const text = `${phaseName(phase)}: ${done} of ${phases.length} phases are done${eta}.`;
  if (byId("warmup-text").textContent !== text) byId("warmup-text").textContent = text;
  byId("warmup-bar").max = phases.length;
  byId("warmup-bar").value = done;
  byId("warmup-phases").replaceChildren(...phases.map(({ name, ms }) => element(
    "li",
    { "data-state": ms !== null ? "done" : name === phase ? "now" : "next" },
    `${phaseName(name)}${ms === null ? (name === phase ? " …" : "") : `, ${time(ms)}`}`,
  )));
}

/** @param {string} name */
function phaseName(name) {
  const words = name.replaceAll("_", " ").replace(/^compile /, "warm up ")
    .replace(/^count flops/, "count FLOPs of");
  return words.charAt(0).toUpperCase() + words.slice(1);
}

/** @param {Stats} stats */
export function showStats(stats) {
  const { steps, memory, mfu } = stats;
  history.push(steps);
  if (history.length > POINTS) history.shift();
  /** @type {[string, string][]} */
  const rows = [
    ["in flight", String(stats.in_flight)],
    ["waiting", `${stats.waiting} of ${stats.max_waiting}`],
  ];
  if (steps !== null) {
    const budget = steps.budget_ms === null ? "" : ` (budget ${time(steps.budget_ms)})`;
    rows.push(
      ["median step", `${time(steps.median_ms)}${budget}`],
      ["95th percentile", time(steps.p95_ms)],
      ["steps of", `${steps.shape}, ${steps.batch_size} in a run, ${steps.count} in a minute`],
    );
  }
  if (mfu !== null) rows.push(["MFU", `${(mfu * 100).toFixed(1)}%`]);
  if (memory.gpu_allocated !== undefined) rows.push(["GPU memory", bytes(memory.gpu_allocated)]);
  if (memory.resident !== undefined) rows.push(["process memory", bytes(memory.resident)]);
  byId("stats").replaceChildren(...rows.map(([name, value]) =>
    element("div", {}, element("dt", {}, name), element("dd", {}, value))));
  drawStrip();
}

/** @param {number} count */
function bytes(count) {
  return count >= 1e9 ? `${(count / 1e9).toFixed(1)} GB` : `${Math.round(count / 1e6)} MB`;
}

/** Milliseconds upwards, the newest at the right. The scale holds the budget if it is near. */
export function drawStrip() {
  const strip = byId("strip");
  const width = Math.max(200, strip.clientWidth);
  const height = 88;
  const known = history.filter((each) => each !== null);
  strip.setAttribute("viewBox", `0 0 ${width} ${height}`);
  if (known.length === 0) {
    strip.replaceChildren(svg("text", { x: 4, y: 50 }, "No step in the last minute."));
    return;
  }
  const budget = known[known.length - 1]?.budget_ms ?? null;
  const highest = Math.max(...known.map((each) => each?.p95_ms ?? 0));
  const top = 1.15 * (budget !== null && budget < 12 * highest ? Math.max(budget, highest) : highest);
  /** @param {number} ms */
  const y = (ms) => height - 4 - (ms / top) * (height - 8);
  const parts = [svg("line", { class: "grid", x1: 0, x2: width, y1: y(0), y2: y(0) })];
  if (budget !== null && budget <= top) {
    parts.push(
      svg("line", { class: "budget", x1: 0, x2: width, y1: y(budget), y2: y(budget) }),
      svg("text", { x: 4, y: y(budget) + 13 }, `budget ${time(budget)}`),
    );
  }
  for (const name of /** @type {("median_ms" | "p95_ms")[]} */ (["p95_ms", "median_ms"])) {
    const points = history.map((each, number) => ({ each, number })).filter(({ each }) => each);
    const x = (/** @type {number} */ number) => width - 8 - (history.length - 1 - number) * (width / POINTS);
    const line = points.map(({ each, number }) => `${x(number)},${y(each?.[name] ?? 0)}`);
    if (line.length === 1) line.push(line[0]?.replace(/^[\d.]+/, String(width)) ?? "");
    parts.push(svg("polyline", { class: name === "p95_ms" ? "p95" : "median", points: line.join(" ") }));
  }
  strip.replaceChildren(...parts);
}
