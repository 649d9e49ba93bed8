// @ts-check
/** The last requests of this tab, kept in the browser: thumbnails, requests and timelines. */

import { byId, element, time } from "./dom.js";

/**
 * @typedef {import("./server.js").Timeline} Timeline
 * @typedef {{request: Record<string, any>, seed: string, thumbnail: string,
 *   timeline: Timeline}} Kept
 */

const KEY = "stepspan.recent";
const MOST = 50;
const SIDE = 96;

/** @returns {Kept[]} the newest first */
export function keptRequests() {
  try {
    return JSON.parse(sessionStorage.getItem(KEY) ?? "[]");
  } catch {
    return [];
  }
}

/** @param {Kept} request */
export function keep(request) {
  let kept = [request, ...keptRequests()].slice(0, MOST);
  // The browser gives a few megabytes; when they are full, the older half goes.
  while (kept.length > 0) {
    try {
      sessionStorage.setItem(KEY, JSON.stringify(kept));
      return;
    } catch {
      kept = kept.slice(0, Math.floor(kept.length / 2));
    }
  }
}

/**
 * A small copy of a picture, as a data URI.
 * @param {string} url
 * @returns {Promise<string>}
 */
export async function thumbnailOf(url) {
  const image = new Image();
  image.src = url;
  await image.decode();
  const scale = SIDE / Math.max(image.naturalWidth, image.naturalHeight);
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(image.naturalWidth * scale));
  canvas.height = Math.max(1, Math.round(image.naturalHeight * scale));
  canvas.getContext("2d")?.drawImage(image, 0, 0, canvas.width, canvas.height);
  return canvas.toDataURL("image/jpeg", 0.8);
}

/**
 * @param {string} shown the trace id of the request whose time is shown; "": none
 * @param {string} compared that of the one laid over it
 * @param {(kept: Kept) => void} onShow
 * @param {(kept: Kept) => void} onCompare
 */
export function drawRecent(shown, compared, onShow, onCompare) {
  byId("thumbnails").replaceChildren(...keptRequests().map((kept) => {
    const { trace_id: id, duration_ms: ms } = kept.timeline;
    const show = element(
      "button",
      { type: "button", class: "show", "aria-pressed": String(id === shown),
        title: kept.request.prompt, "aria-label": `Show ${kept.request.prompt}, ${time(ms)}` },
      element("img", { src: kept.thumbnail, alt: "" }),
      element("span", { class: "ms" }, time(ms)),
    );
    const compare = element(
      "button",
      { type: "button", class: "compare", "aria-pressed": String(id === compared),
        "aria-label": `Compare with ${kept.request.prompt}, ${time(ms)}` },
      "Compare",
    );
    compare.disabled = shown === "" || id === shown;
    show.addEventListener("click", () => onShow(kept));
    compare.addEventListener("click", () => onCompare(kept));
    return element("li", {}, show, compare);
  }));
}
