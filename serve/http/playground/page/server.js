// @ts-check
/** What the page asks of the server: figures, timelines, and a picture as a stream of events. */

/**
 * @typedef {{name: string, depth: number, clock: string, start_ms: number, ms: number,
 *   index?: number, gpu_queue_ms?: number, batch_size?: number, failed?: boolean}} Span
 * @typedef {{trace_id: string, exported: boolean, endpoint: string, status: number,
 *   outcome: string, slow_reason: string | null, started_at: number, duration_ms: number,
 *   unattributed_ms: number, request: {width?: number, height?: number,
 *   num_inference_steps?: number}, spans: Span[]}} Timeline
 * @typedef {{default?: number, minimum?: number, maximum?: number, maxLength?: number}} Bounds
 * @typedef {{prompt: Bounds, num_inference_steps: Bounds, guidance_scale: Bounds,
 *   num_images: Bounds, lora_scale: Bounds, seed: {minimum: string, maximum: string},
 *   shapes: [number, number][], loras: string[], formats: string[], previews: boolean}} Limits
 * @typedef {{shape: string, batch_size: number, count: number, median_ms: number, p95_ms: number,
 *   budget_ms: number | null}} Steps
 * @typedef {{phase: string, phases: {name: string, ms: number | null}[],
 *   eta_ms: number | null}} Warmup
 * @typedef {{state: string, serving: boolean, problem: string, model: string, device: string,
 *   warmup: Warmup, in_flight: number, waiting: number, max_waiting: number,
 *   batch_size: number | null, steps: Steps | null, mfu: number | null,
 *   memory: {resident?: number, gpu_allocated?: number, gpu_peak?: number}, request: Limits,
 *   operator_token: boolean, trace_url: string | null}} Stats
 * @typedef {{loc: (string | number)[], msg: string}} Problem
 */

const KEY = "stepspan.key";

/** A whole number too large for a JavaScript number is read as text: each seed. */
const SEED = /"seed":\s*(-?\d+)/g;

/** The server cannot be reached. */
export class ServerGone extends Error {}

/** The server needs a key, and has none from here or another one. */
export class KeyNeeded extends Error {}

/** The server refused the request, or failed at it. */
export class RequestFailed extends Error {
  /**
   * @param {string} message
   * @param {Problem[]} problems those of single fields
   * @param {string} traceId
   */
  constructor(message, problems, traceId) {
    super(message);
    this.problems = problems;
    this.traceId = traceId;
  }
}

/**
 * JSON with every seed as text. A quotation mark inside a string is escaped, so `"seed":` can only
 * be a key.
 * @param {string} text
 * @returns {any}
 */
export function parseExact(text) {
  return JSON.parse(text.replace(SEED, '"seed":"$1"'));
}

/**
 * A request's body. Its seed is text with digits, and becomes a number of as many digits.
 * @param {Record<string, unknown>} fields
 */
export function exactBody(fields) {
  const { seed, ...others } = fields;
  const text = JSON.stringify(others);
  return seed === undefined ? text : `${text.slice(0, -1)},"seed":${BigInt(String(seed))}}`;
}

/**
 * Whether a text can be a key or an operator's token. The server has none with other characters, and
 * a browser cannot send every one of those in a header.
 * @param {string} key
 */
export function canBeSent(key) {
  return /^[!-~]+$/.test(key);
}

/** The key, where the browser keeps nothing for this page: its user has forbidden it. */
let unkeptKey = "";

/** The key that requests are sent with; "": none. This tab's session keeps it, nothing else. */
export function keptKey() {
  try {
    return sessionStorage.getItem(KEY) ?? "";
  } catch {
    return unkeptKey;
  }
}

/** @param {string} key "": forget it */
export function keepKey(key) {
  try {
    if (key === "") sessionStorage.removeItem(KEY);
    else sessionStorage.setItem(KEY, key);
  } catch {
    unkeptKey = key;
  }
}

/**
 * @param {string} path
 * @param {RequestInit} [options]
 */
async function ask(path, options) {
  const key = keptKey();
  const headers = new Headers(options?.headers);
  if (key !== "" && !headers.has("Authorization")) headers.set("Authorization", `Bearer ${key}`);
  try {
    const answer = await fetch(path, { cache: "no-store", ...options, headers });
    if (answer.status === 401) throw new KeyNeeded();
    return answer;
  } catch (error) {
    if (error instanceof KeyNeeded) throw error;
    if (error instanceof DOMException && error.name === "AbortError") throw error;
    throw new ServerGone();
  }
}

/** @returns {Promise<Stats>} */
export async function readStats() {
  const answer = await ask("/stats", { signal: AbortSignal.timeout(5000) }).catch((error) => {
    throw error instanceof KeyNeeded ? error : new ServerGone();
  });
  if (!answer.ok) throw new ServerGone();
  return answer.json();
}

/**
 * A finished request's timeline. The server waits a moment for it; null: it is not there.
 * @param {string} traceId
 * @returns {Promise<Timeline | null>}
 */
export async function readTimeline(traceId) {
  const answer = await ask(`/timeline/${traceId}`).catch(() => null);
  return answer !== null && answer.ok ? answer.json() : null;
}

/**
 * The last requests of everybody, the newest first. For operators.
 * @param {string} token SDXL_ADMIN_TOKEN
 * @returns {Promise<Timeline[]>}
 */
export async function readAllTimelines(token) {
  const answer = await ask("/debug/requests", { headers: { Authorization: `Bearer ${token}` } });
  if (!answer.ok) throw await failure(answer);
  return (await answer.json()).requests;
}

/**
 * Ask for a picture. Yields the stream's events, in order.
 * @param {string} body
 * @param {AbortSignal} signal aborting it ends the work
 * @returns {AsyncGenerator<any>}
 */
export async function* drawEvents(body, signal) {
  const answer = await ask("/stream", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body,
    signal,
  });
  if (!answer.ok || answer.body === null) throw await failure(answer);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  const split = blocks();
  let ended = false;
  while (!ended) {
    let part;
    try {
      part = await reader.read();
    } catch (error) {
      if (signal.aborted) throw error;
      throw new ServerGone();
    }
    ended = part.done;
    for (const block of split(part.value ?? "")) {
      const data = block.split("\n").find((line) => line.startsWith("data: "));
      if (data === undefined) continue; // a comment that keeps the connection open
      const event = parseExact(data.slice(6));
      if (event.type === "error") throw failed(event);
      yield event;
      if (event.type === "image") return;
    }
  }
  throw new ServerGone(); // the stream ended without a picture
}

/**
 * Splits arriving text at empty lines. Each part of it is read once, because an event of several
 * images is many megabytes in hundreds of parts.
 * @returns {(text: string) => string[]} gets the next part, and gives the blocks that it completes
 */
function blocks() {
  /** @type {string[]} */
  let parts = [];
  let held = ""; // a line break, if what follows may begin with the second one
  return (text) => {
    const joined = held + text;
    held = /(?:^|[^\n])\n$/.test(joined) ? "\n" : "";
    const [first = "", ...others] = joined.slice(0, joined.length - held.length).split("\n\n");
    parts.push(first);
    const complete = [];
    for (const next of others) {
      complete.push(parts.join(""));
      parts = [next];
    }
    return complete;
  };
}

/** @param {Response} answer of the server, or of a proxy before it, whose body may be anything */
async function failure(answer) {
  const body = await answer.text().then(parseExact).catch(() => null);
  if (typeof body?.detail === "string" || Array.isArray(body?.detail)) return failed(body);
  return new RequestFailed(`The server answered with status ${answer.status}.`, [], "");
}

/** @param {any} body with `detail` */
function failed(body) {
  const several = Array.isArray(body.detail);
  const message = several ? "Some fields are not allowed as they are." : body.detail;
  return new RequestFailed(message, several ? body.detail : [], String(body.trace_id ?? ""));
}
