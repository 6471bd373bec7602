// The recipe's editor on the page New job. The textarea stays in the form and in step with it: without this script the
// textarea is the editor. A shadow root makes CodeMirror use adopted style sheets, which the page's policy allows;
// it allows no style element.
import { autocompletion, closeBrackets, closeBracketsKeymap, completionKeymap } from "@codemirror/autocomplete";
import { defaultKeymap, history, historyKeymap, indentWithTab } from "@codemirror/commands";
import { yaml } from "@codemirror/lang-yaml";
import { bracketMatching, indentUnit } from "@codemirror/language";
import { lintGutter, lintKeymap, setDiagnostics } from "@codemirror/lint";
import { EditorState, Prec } from "@codemirror/state";
import { EditorView, drawSelection, highlightActiveLine, keymap, lineNumbers } from "@codemirror/view";
import { complete, descriptions } from "./completion.js";
import { look } from "./theme.js";

const LABEL = { tabindex: "0", "aria-label": "Recipe", "aria-description": "Press Escape, then Tab, to leave the editor." };
const host = document.getElementById("editor");
let area = null;
let isCopying = false; // from the textarea: the textarea has the text already

const writeBack = EditorView.updateListener.of((update) => {
  if (!update.docChanged || isCopying) return;
  area.value = update.state.doc.toString();
  area.dispatchEvent(new Event("input", { bubbles: true }));
});

// After Esc, Tab leaves the editor: also where Esc has closed a list, and however long one waits. Typing ends it.
const escape = Prec.highest(EditorView.domEventHandlers({
  keydown(event, view) {
    if (event.key === "Escape") view.setTabFocusMode(true);
    return false;
  },
  beforeinput(_, view) { view.setTabFocusMode(false); return false; },
  blur(_, view) { view.setTabFocusMode(false); return false; },
}));

function extensions() {
  return [
    lineNumbers(), lintGutter(), history(), drawSelection(), highlightActiveLine(), bracketMatching(), closeBrackets(), yaml(),
    indentUnit.of("  "), autocompletion({ override: [complete], activateOnTyping: true, icons: false }), descriptions,
    keymap.of([...closeBracketsKeymap, ...completionKeymap, ...lintKeymap, ...historyKeymap, ...defaultKeymap, indentWithTab]),
    EditorView.contentAttributes.of(LABEL), escape, writeBack, look,
  ];
}

// Take over the text of the textarea, which htmx may have replaced; only what differs changes, so the cursor stays.
function copyText(view) {
  area = document.getElementById("recipe");
  area.hidden = true;
  const now = view.state.doc.toString(), next = area.value;
  if (now === next) return;
  let from = 0, tail = 0;
  const most = Math.min(now.length, next.length);
  while (from < most && now[from] === next[from]) from++;
  while (tail < most - from && now[now.length - 1 - tail] === next[next.length - 1 - tail]) tail++;
  isCopying = true;
  view.dispatch({ changes: { from, to: now.length - tail, insert: next.slice(from, next.length - tail) } });
  isCopying = false;
}

// Mark the lines that the problems below the editor name.
function markProblems(view) {
  const found = [];
  for (const one of document.querySelectorAll("#outcome [data-line]")) {
    const number = Number(one.dataset.line);
    if (number < 1 || number > view.state.doc.lines) continue;
    const line = view.state.doc.line(number), indent = /^\s*/.exec(line.text)[0].length;
    found.push({ from: line.from + indent, to: line.to, severity: "error", message: one.dataset.message });
  }
  view.dispatch(setDiagnostics(view.state, found));
}

function goTo(view, number) {
  const line = view.state.doc.line(Math.min(Math.max(number, 1), view.state.doc.lines));
  view.dispatch({ selection: { anchor: line.to }, effects: EditorView.scrollIntoView(line.from, { y: "center" }) });
  view.focus();
}

function start() {
  area = document.getElementById("recipe");
  host.hidden = false;
  const root = host.attachShadow({ mode: "open" });
  const state = EditorState.create({ doc: area.value, extensions: extensions() });
  const view = new EditorView({ state, parent: root, root });
  document.querySelectorAll(".with-editor").forEach((one) => { one.hidden = false; });
  copyText(view);
  markProblems(view);
  document.querySelector('label[for="recipe"]').addEventListener("click", () => view.focus());
  document.addEventListener("htmx:afterSwap", () => { copyText(view); markProblems(view); });
  document.addEventListener("click", (event) => {
    const link = event.target.closest?.("#outcome [data-line] button");
    if (link) goTo(view, Number(link.closest("[data-line]").dataset.line));
  });
}

if (host) start();
