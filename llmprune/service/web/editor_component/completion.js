// Completion of keys and values, and the description of the key under the pointer.
import { startCompletion } from "@codemirror/autocomplete";
import { hoverTooltip } from "@codemirror/view";
import { placeAt } from "./place.js";
import { alternatives, describe, keysAt, loadSchema, valuesAt } from "./schema.js";

export async function complete(context) {
  const place = placeAt(context.state, context.pos);
  const word = place && context.state.sliceDoc(place.from, context.pos);
  if (!place || (!word && !context.explicit)) return null;
  const root = await loadSchema();
  if (!root) return null;
  const options = place.part === "key" ? keyOptions(root, place.path) : valueOptions(root, place.path);
  return options.length ? { from: place.from, options, validFor: /^[\w.-]*$/ } : null;
}

function keyOptions(root, path) {
  return [...keysAt(root, path)].map(([key, schema]) => {
    const isSection = alternatives(root, schema).some((one) => one.properties);
    return {
      label: key, type: "property", detail: isSection ? "section" : kind(root, schema), info: describe(root, schema) || undefined,
      apply: (view, _, from, to) => insertKey(view, `${key}:`, isSection, from, to),
    };
  });
}

function valueOptions(root, path) {
  return valuesAt(root, path).filter((one) => one !== null).map((one) => ({ label: String(one), type: "constant" }));
}

const KINDS = { integer: "whole number", number: "number", string: "text", boolean: "true or false", array: "list", object: "mapping" };

function kind(root, schema) {
  const kinds = alternatives(root, schema).map((one) => (one.enum || one.const !== undefined ? "choice" : KINDS[one.type]));
  return [...new Set(kinds)].filter(Boolean).join(", ");
}

// Write the key; after a section's, the line for its first key, in braces a space.
function insertKey(view, key, isSection, from, to) {
  const line = view.state.doc.lineAt(from), before = line.text.slice(0, from - line.from);
  const opens = isSection && /^\s*(?:- +)*$/.test(before) && to === line.to;
  const insert = key + (opens ? `\n${" ".repeat(before.length + 2)}` : " ");
  view.dispatch({
    changes: { from, to, insert }, selection: { anchor: from + insert.length }, userEvent: "input.complete", scrollIntoView: true,
  });
  startCompletion(view);
}

export const descriptions = hoverTooltip(async (view, position) => {
  const word = view.state.wordAt(position);
  const line = word && view.state.doc.lineAt(word.from);
  if (!word || !view.state.sliceDoc(word.to, line.to).startsWith(":")) return null;
  const place = placeAt(view.state, word.to), root = await loadSchema();
  const schema = place && root && place.part === "key" && keysAt(root, place.path).get(view.state.sliceDoc(word.from, word.to));
  const words = schema && describe(root, schema);
  if (!words) return null;
  const create = () => {
    const dom = document.createElement("div");
    dom.className = "cm-hover";
    dom.textContent = words;
    return { dom };
  };
  return { pos: word.from, end: word.to, above: true, create };
});
