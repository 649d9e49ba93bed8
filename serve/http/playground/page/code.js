// @ts-check
/** A request as code for other clients. A seed becomes a number first: `007` is no Python. */

import { exactBody } from "./server.js";

/** @param {unknown} value */
function python(value) {
  // JSON's texts and numbers are Python's too; of the other values only these two occur.
  return JSON.stringify(value).replace(/^true$/, "True").replace(/^false$/, "False");
}

/**
 * @param {Record<string, any>} fields the request, its seed as text
 * @param {string} kind curl, openai or fal
 * @param {string} origin the server's
 * @param {boolean} keyed whether the server needs a key; the code reads it from a variable
 * @returns {string}
 */
export function asCode(fields, kind, origin, keyed) {
  const { preview, ...asked } = fields;
  if (kind === "openai") return openai(asked, origin, keyed);
  if (kind === "fal") return fal(asked);
  const body = exactBody(asked).replaceAll("'", "'\\''");
  const key = keyed ? ' \\\n  -H "Authorization: Bearer $SDXL_API_KEY"' : "";
  return `curl -s ${origin}/ -H 'content-type: application/json'${key} \\\n  -d '${body}'`;
}

/**
 * @param {Record<string, any>} asked
 * @param {string} origin
 * @param {boolean} keyed
 */
function openai(asked, origin, keyed) {
  const { prompt, width, height, num_images: count, format, seed, ...own } = asked;
  const extra = Object.entries(own).map(([name, value]) => `"${name}": ${python(value)}`);
  if (seed !== undefined) extra.push(`"seed": ${BigInt(seed)}`);
  const lines = [
    `    prompt=${python(prompt)},`,
    `    n=${count ?? 1},`,
    `    size="${width ? `${width}x${height}` : "auto"}",`,
    `    output_format="${format ?? "jpeg"}",`,
  ];
  if (extra.length > 0) lines.push(`    extra_body={${extra.join(", ")}},`);
  return [
    ...(keyed ? ["import os", ""] : []),
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url="${origin}/v1", api_key=${keyed ? 'os.environ["SDXL_API_KEY"]' : '"unused"'})`,
    "images = client.images.generate(",
    ...lines,
    ")",
    "print(images.data[0].b64_json[:40])",
  ].join("\n");
}

/** @param {Record<string, any>} asked */
function fal(asked) {
  const { seed, ...others } = asked;
  const lines = Object.entries(others).map(
    ([name, value]) => `        "${name}": ${python(value)},`,
  );
  if (seed !== undefined) lines.push(`        "seed": ${BigInt(seed)},`);
  return [
    "import fal_client",
    "",
    "# The app's name is in the output of `fal deploy sdxl`.",
    "result = fal_client.subscribe(",
    '    "YOUR-NAME/sdxl",',
    "    arguments={",
    ...lines,
    "    },",
    ")",
    'print(result["images"][0]["url"], result["seed"])',
  ].join("\n");
}
