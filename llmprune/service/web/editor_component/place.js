// The place of the cursor in a recipe: the keys around it, and whether a key or a value is written there.
import { syntaxTree } from "@codemirror/language";

const KEY = /^(\s*(?:- +)*)([\w.-]+):(?:\s|$)/;

// Return {path, part, from}: the keys from the outermost section inwards, "key" or "value", and where the word begins.
// Return null in a comment and where no word can stand.
export function placeAt(state, position) {
  const line = state.doc.lineAt(position), before = line.text.slice(0, position - line.from);
  if (/(^|\s)#/.test(before)) return null;
  return inBraces(state, position, before) ?? inBlock(state, line, before, position);
}

// The keys of a block mapping are found by their indentation, because a line that is being written is no valid YAML.
function inBlock(state, line, before, position) {
  const value = /^(\s*(?:- +)*)([\w.-]+): +(?:\[(?:[^\]]*, *)?)?(\S*)$/.exec(before);
  if (value) {
    return { path: [...keysAbove(state, line.number, value[1].length), value[2]], part: "value", from: position - value[3].length };
  }
  const key = /^(\s*(?:- +)*)(\w*)$/.exec(before);
  if (!key) return null;
  return { path: keysAbove(state, line.number, key[1].length), part: "key", from: position - key[2].length };
}

function keysAbove(state, number, indent) {
  const keys = [];
  for (let above = number - 1; above > 0 && indent > 0; above--) {
    const found = KEY.exec(state.doc.line(above).text);
    if (found && found[1].length < indent) {
      keys.unshift(found[2]);
      indent = /^\s*/.exec(found[1])[0].length || found[1].length;
      if (found[1].length === 0) break;
    }
  }
  return keys;
}

function inBraces(state, position, before) {
  let node = syntaxTree(state).resolveInner(position, -1);
  const pairs = [];
  let inside = false;
  for (; node; node = node.parent) {
    if (node.name === "FlowMapping") inside = true;
    if (node.name === "Pair" && inside) pairs.unshift(node);
    if (node.name === "Pair" && !inside) pairs.unshift(node);
  }
  if (!inside) return null;
  const word = /[\w.-]*$/.exec(before)[0], head = before.slice(0, before.length - word.length).trimEnd();
  const part = head.endsWith(":") ? "value" : "key";
  let path = pairs.map((pair) => state.sliceDoc(pair.firstChild.from, pair.firstChild.to));
  const last = pairs.at(-1);
  // the pair that is being written, whose key is the word itself
  if (part === "key" && last && last.from >= position - word.length) path = path.slice(0, -1);
  return { path, part, from: position - word.length };
}
