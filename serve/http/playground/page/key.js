// @ts-check
/** Asking for the key of a server that needs one. */

import { byId } from "./dom.js";
import { canBeSent, keepKey, keptKey } from "./server.js";

/** @param {() => void} onChange called when there is another key, or none any more */
export function offerKey(onChange) {
  byId("key-form").addEventListener("submit", (/** @type {Event} */ event) => {
    event.preventDefault();
    const field = byId("key");
    const key = field.value.trim();
    if (!canBeSent(key)) {
      sayWrong("A key has visible characters without spaces.");
      return;
    }
    field.value = "";
    keepKey(key);
    onChange();
  });
  byId("forget-key").addEventListener("click", () => {
    keepKey("");
    onChange();
  });
}

/** The server has refused the last request. */
export function askForKey() {
  const refused = keptKey() !== "";
  keepKey("");
  byId("forget-key").hidden = true;
  const first = byId("key-card").hidden;
  byId("key-card").hidden = false;
  if (refused) sayWrong("The server does not know this key.");
  if (first || refused) byId("key").focus();
}

/** The server has answered. */
export function keyIsRight() {
  byId("forget-key").hidden = keptKey() === "";
  if (byId("key-card").hidden) return;
  byId("key-card").hidden = true;
  sayWrong("");
  byId("prompt").focus();
}

/** @param {string} text "": nothing is wrong */
function sayWrong(text) {
  byId("key-error").textContent = text;
  if (text === "") byId("key").removeAttribute("aria-invalid");
  else byId("key").setAttribute("aria-invalid", "true");
}
