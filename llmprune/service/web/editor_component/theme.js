// Colours and sizes of the editor, from the variables of the page's style.css.
import { HighlightStyle, syntaxHighlighting } from "@codemirror/language";
import { EditorView } from "@codemirror/view";
import { tags } from "@lezer/highlight";

const FONT = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'Liberation Mono', monospace";
const POPUP = { backgroundColor: "var(--field)", color: "var(--ink)", border: "1px solid var(--rule)", borderRadius: "6px" };

const theme = EditorView.theme({
  "&": {
    color: "var(--ink)", backgroundColor: "var(--field)", border: "1px solid var(--rule)", borderRadius: "6px",
    fontSize: ".875rem", minHeight: "16rem", maxHeight: "max(20rem, 45vh)",
  },
  "@media (max-width: 52rem)": { "&": { minHeight: "12rem", maxHeight: "22rem" } },
  "&.cm-focused": { outline: "2px solid var(--pruned)", outlineOffset: "2px" },
  ".cm-scroller": { fontFamily: FONT, lineHeight: "1.6", borderRadius: "6px", overflow: "auto" },
  ".cm-content": { padding: ".6rem 0", caretColor: "var(--ink)" },
  ".cm-content:focus-visible": { outline: "1px solid transparent" },
  ".cm-cursor": { borderLeftColor: "var(--ink)" },
  ".cm-gutters": { backgroundColor: "var(--soft)", color: "var(--quiet)", border: "0", borderRight: "1px solid var(--rule)" },
  ".cm-activeLine, .cm-activeLineGutter": { backgroundColor: "transparent" },
  "&.cm-focused .cm-activeLine": { backgroundColor: "color-mix(in srgb, var(--tint) 55%, transparent)" },
  "&.cm-focused > .cm-scroller > .cm-selectionLayer .cm-selectionBackground, .cm-selectionBackground": {
    backgroundColor: "color-mix(in srgb, var(--pruned) 28%, transparent)",
  },
  ".cm-tooltip": POPUP,
  ".cm-tooltip.cm-completionInfo": { maxWidth: "24rem", padding: ".4rem .6rem", fontSize: ".8125rem" },
  ".cm-tooltip.cm-tooltip-autocomplete > ul": { fontFamily: FONT, maxHeight: "14rem" },
  ".cm-tooltip.cm-tooltip-autocomplete > ul > li": { padding: ".2rem .5rem" },
  ".cm-tooltip.cm-tooltip-autocomplete > ul > li[aria-selected]": { backgroundColor: "var(--pruned)", color: "var(--on-pruned)" },
  ".cm-completionDetail": { fontStyle: "normal", opacity: ".8", marginLeft: "1em" },
  ".cm-hover": { maxWidth: "26rem", padding: ".4rem .6rem", fontSize: ".8125rem" },
  ".cm-diagnostic": { padding: ".35rem .6rem", fontFamily: "inherit", whiteSpace: "normal" },
  ".cm-diagnostic-error": { borderLeft: "4px solid var(--bad)" },
  // lint's own marks are data: images, which the page's policy refuses
  ".cm-lint-marker-error": { content: "''", width: ".55rem", height: ".55rem", margin: ".45rem .2rem", borderRadius: "50%", backgroundColor: "var(--bad)" },
  ".cm-lintRange-error": { backgroundImage: "none", textDecoration: "underline wavy var(--bad) 1px", textUnderlineOffset: ".2em" },
  ".cm-lintRange-active": { backgroundColor: "var(--bad-tint)" },
  ".cm-panels": { backgroundColor: "var(--soft)", color: "var(--ink)" },
});

const highlight = HighlightStyle.define([
  { tag: [tags.propertyName, tags.definition(tags.propertyName)], color: "var(--pruned)" },
  { tag: tags.comment, color: "var(--quiet)" },
  { tag: [tags.string, tags.content], color: "var(--ink)" },
  { tag: [tags.punctuation, tags.separator, tags.squareBracket, tags.brace], color: "var(--quiet)" },
]);

export const look = [theme, syntaxHighlighting(highlight)];
