// @ts-check
/** The form: its limits from the server, what it asks for, and errors at their fields. */

import { byId, element } from "./dom.js";

/**
 * @typedef {import("./server.js").Limits} Limits
 * @typedef {import("./server.js").Problem} Problem
 */

const DEMO_PROMPTS = [
  "a large red circle on the left on a white background",
  "small yellow star at the top, blue background",
  "a red circle left of a blue square on a white background",
  "tiny green triangle under a big orange star on black",
];
const PROMPTS = [
  "a lighthouse on a cliff at dusk, oil painting",
  "macro photo of a dew drop on a fern, soft morning light",
  "an astronaut reading in a library, watercolour",
];

const NUMBERS = ["num_inference_steps", "guidance_scale", "num_images"];
const FIELDS = ["prompt", "negative_prompt", "size", ...NUMBERS, "seed", "format", "loras"];

/** A field's text is no number; only the page can say so. */
export class NotANumber extends Error {
  /** @param {Problem[]} problems */
  constructor(problems) {
    super("Some fields are not allowed as they are.");
    this.problems = problems;
  }
}

/**
 * Fill the choices and placeholders. What a person has entered stays.
 * @param {Limits} limits
 * @param {string} model
 */
export function applyLimits(limits, model) {
  const size = byId("size");
  const sizes = limits.shapes.map(([width, height]) => `${width}x${height}`);
  fillSelect(size, sizes, (each) => each.replace("x", " × "));
  fillSelect(byId("format"), limits.formats, (each) => each);
  for (const name of ["num_inference_steps", "guidance_scale", "num_images"]) {
    const bounds = limits[/** @type {"num_images"} */ (name)];
    const field = byId(name);
    field.placeholder = String(bounds.default ?? "");
    field.title = `${bounds.minimum} to ${bounds.maximum}`;
  }
  byId("seed").title = `${limits.seed.minimum} to ${limits.seed.maximum}; empty: random`;
  byId("preview-row").hidden = !limits.previews;
  const rows = byId("lora-rows");
  byId("loras").hidden = limits.loras.length === 0;
  const shown = [...rows.querySelectorAll("[data-lora]")].map((each) => each.dataset.lora);
  if (shown.join() !== limits.loras.join()) {
    rows.replaceChildren(...limits.loras.map((name, number) => element(
      "div",
      { class: "lora" },
      element("input", { type: "checkbox", id: `lora-${number}`, "data-lora": name }),
      element("label", { for: `lora-${number}` }, name),
      element("input", {
        id: `lora-scale-${number}`, inputmode: "decimal", value: "1",
        "aria-label": `Scale of ${name}`, "aria-describedby": "loras-error",
      }),
    )));
  }
  const examples = byId("examples");
  if (examples.childElementCount === 0) {
    for (const prompt of model === "demo" ? DEMO_PROMPTS : PROMPTS) {
      const button = element("button", { type: "button" }, prompt);
      button.addEventListener("click", () => {
        byId("prompt").value = prompt;
        byId("prompt").focus();
      });
      examples.append(button);
    }
    if (byId("prompt").value === "") byId("prompt").value = examples.firstChild.textContent;
  }
}

/**
 * @param {HTMLSelectElement} select
 * @param {string[]} values
 * @param {(value: string) => string} text
 */
function fillSelect(select, values, text) {
  if ([...select.options].map((each) => each.value).join() === values.join()) return;
  const chosen = select.value;
  select.replaceChildren(...values.map((each) => element("option", { value: each }, text(each))));
  if (values.includes(chosen)) select.value = chosen;
}

/**
 * The request that the form describes. An empty field is left to the server. The seed is text, so
 * that it stays exact.
 * @returns {Record<string, any>}
 * @throws {NotANumber}
 */
export function readForm() {
  /** @type {Record<string, any>} */
  const fields = { prompt: byId("prompt").value };
  /** @type {Problem[]} */
  const problems = [];
  const negative = byId("negative_prompt").value;
  if (negative !== "") fields.negative_prompt = negative;
  const [width, height] = byId("size").value.split("x").map(Number);
  if (width && height) Object.assign(fields, { width, height });
  for (const name of NUMBERS) {
    const text = byId(name).value.trim();
    if (text === "") continue;
    if (Number.isFinite(Number(text))) fields[name] = Number(text);
    else problems.push({ loc: ["body", name], msg: "must be a number" });
  }
  const seed = byId("seed").value.trim();
  if (/^-?\d+$/.test(seed)) fields.seed = seed;
  else if (seed !== "") problems.push({ loc: ["body", "seed"], msg: "must be a whole number" });
  fields.format = byId("format").value || "jpeg";
  /** @type {{path: string, scale?: number}[]} */
  const loras = [];
  for (const { name, scale } of chosenLoras()) {
    const text = scale.value.trim();
    if (!Number.isFinite(Number(text))) {
      problems.push({ loc: ["body", "loras", loras.length], msg: "the scale must be a number" });
    }
    loras.push(text === "" ? { path: name } : { path: name, scale: Number(text) });
  }
  if (loras.length > 0) fields.loras = loras;
  if (byId("preview").checked && !byId("preview-row").hidden) fields.preview = true;
  if (problems.length > 0) throw new NotANumber(problems);
  return fields;
}

/** The LoRAs that are chosen, in the order in which a request names them. */
function chosenLoras() {
  /** @type {HTMLInputElement[]} */
  const boxes = [...document.querySelectorAll(/** @type {"input"} */ ("[data-lora]"))];
  return boxes.map((box, number) => ({
    chosen: box.checked,
    name: box.dataset.lora ?? "",
    scale: byId(`lora-scale-${number}`),
  })).filter((each) => each.chosen);
}

/**
 * Put a request back into the form.
 * @param {Record<string, any>} fields
 */
export function fillForm(fields) {
  byId("prompt").value = fields.prompt;
  byId("negative_prompt").value = fields.negative_prompt ?? "";
  if (fields.width) byId("size").value = `${fields.width}x${fields.height}`;
  for (const name of [...NUMBERS, "seed"]) byId(name).value = fields[name] ?? "";
  byId("format").value = fields.format;
  document.querySelectorAll("[data-lora]").forEach((box, number) => {
    const field = /** @type {HTMLInputElement} */ (box);
    const used = (fields.loras ?? []).find((/** @type {any} */ each) => each.path === field.dataset.lora);
    field.checked = used !== undefined;
    byId(`lora-scale-${number}`).value = used?.scale ?? 1;
  });
}

export function clearErrors() {
  for (const name of FIELDS) {
    byId(`${name}-error`).textContent = "";
    byId(name).removeAttribute("aria-invalid");
  }
  for (const each of byId("loras").querySelectorAll("[aria-invalid]")) {
    each.removeAttribute("aria-invalid");
  }
  byId("form-error").textContent = "";
}

/**
 * Each problem at its field, and the first such field focused. The others go below the form.
 * @param {string} message
 * @param {Problem[]} problems
 */
export function showErrors(message, problems) {
  /** @type {string[]} */
  const general = problems.length === 0 ? [message] : [];
  let first = null;
  for (const { loc, msg } of problems) {
    const inBody = String(loc[1] ?? "");
    const name = ["width", "height", "image_size"].includes(inBody) ? "size" : inBody;
    if (!FIELDS.includes(name)) {
      general.push(`${loc.slice(1).join(" ")} ${msg}`);
      continue;
    }
    const lora = name === "loras" ? chosenLoras()[Number(loc[2])] : undefined;
    const field = lora === undefined ? byId(name) : lora.scale;
    byId(`${name}-error`).textContent = lora === undefined ? msg : `${lora.name}: ${msg}`;
    field.setAttribute("aria-invalid", "true");
    first ??= field;
  }
  byId("form-error").textContent = general.join(" ");
  first?.focus();
}
