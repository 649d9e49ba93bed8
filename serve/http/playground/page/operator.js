// @ts-check
/** The last requests of everybody, for who has the operator's token. It is kept nowhere. */

import { byId, element, time } from "./dom.js";
import { canBeSent, readAllTimelines, RequestFailed, ServerGone } from "./server.js";

/** @typedef {import("./server.js").Timeline} Timeline */

/** @param {(timeline: Timeline) => void} onShow */
export function offerEverybody(onShow) {
  byId("operator-form").addEventListener("submit", (/** @type {Event} */ event) => {
    event.preventDefault();
    void showEverybody(onShow);
  });
}

/** @param {(timeline: Timeline) => void} onShow */
async function showEverybody(onShow) {
  const token = byId("token").value.trim();
  byId("token-error").textContent = canBeSent(token) ? "" : "A token has visible characters without spaces.";
  if (!canBeSent(token)) return;
  /** @type {Timeline[]} */
  let timelines;
  try {
    timelines = await readAllTimelines(token);
  } catch (error) {
    if (error instanceof RequestFailed) byId("token-error").textContent = error.message;
    else if (error instanceof ServerGone) byId("token-error").textContent = "The server cannot be reached.";
    else throw error;
    return;
  }
  byId("everybody").hidden = false;
  byId("everybody").tBodies[0].replaceChildren(...timelines.map((timeline) => {
    const { width, height, num_inference_steps: steps } = timeline.request;
    const show = element("button", { type: "button", "aria-label": `Show trace ${timeline.trace_id}` },
      timeline.trace_id.slice(0, 8));
    show.addEventListener("click", () => onShow(timeline));
    const cells = [
      `${timeline.outcome.replaceAll("_", " ")} (${timeline.status})`,
      time(timeline.duration_ms),
      width === undefined ? "" : `${width} × ${height}`,
      steps === undefined ? "" : String(steps),
      timeline.slow_reason?.replaceAll("_", " ") ?? "",
      show,
    ];
    return element("tr", {}, ...cells.map((cell) => element("td", {}, cell)));
  }));
}
