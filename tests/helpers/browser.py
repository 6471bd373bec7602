"""Pages in a real Chromium: what a page must not do, and the checks that several tests share."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import axe_playwright_python
from playwright.sync_api import BrowserContext, Page, expect

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


# The form's own recipe runs, on the demo model, instead of the same form filled in for a tiny one.
QUICKSTART = os.environ.get("LLMPRUNE_BROWSER_QUICKSTART") == "1"


MINUTE = 60_000.0  # milliseconds, as Playwright counts


WIDE, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}


# Collects breaches of the policy, before any script of the page runs.
WATCH = """
window.violations = [];
document.addEventListener("securitypolicyviolation", (event) => window.violations.push(
  `${event.violatedDirective}: ${event.blockedURI}`));
"""


FOCUSED = """() => {
  let at = document.activeElement;
  while (at.shadowRoot?.activeElement) at = at.shadowRoot.activeElement;
  const words = [at.textContent, at.getAttribute("aria-label"), at.name];
  return {said: words.concat([...(at.labels ?? [])].map((label) => label.textContent)).join(" | "),
    outline: getComputedStyle(at).outlineStyle};
}"""


PASTE = """(at, text) => {
  const data = new DataTransfer();
  data.setData("text/plain", text);
  at.dispatchEvent(new ClipboardEvent("paste", {clipboardData: data, bubbles: true, cancelable: true}));
}"""


AXE = Path(axe_playwright_python.__file__).with_name("axe.min.js")


def quiet_page(context: BrowserContext, server: str, refusals: bool = False) -> Iterator[Page]:
    """Open a page, and assert at the end: no error on its console, no breach of its policy, no other host.

    With ``refusals`` the service may answer with a 4xx status.
    """
    context.add_init_script(WATCH)
    context.set_default_timeout(MINUTE / 2)
    page, faults = context.new_page(), list[str]()
    expected = "the server responded with a status of 4" if refusals else "\0"
    page.on("console", lambda line: None if line.type == "log" or expected in line.text else faults.append(line.text))
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("request", lambda asked: None if asked.url.startswith(server) else faults.append(f"asked {asked.url}"))
    page.on("framenavigated", lambda frame: faults.extend(violations(frame)))
    yield page
    assert faults + violations(page.main_frame) == []


def violations(frame: Any) -> list[str]:
    """Return what a document has tried against its policy."""
    return list(frame.evaluate("window.violations ?? []")) if not frame.parent_frame else []


def overflow(page: Page) -> int:
    """Return by how many pixels a page is wider than its window."""
    wider: int = page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
    return wider


def faults_of_access(page: Page) -> list[str]:
    """Return axe-core's findings against WCAG 2.2 AA: contrast, labels, names, order of headings."""
    page.evaluate(AXE.read_text(encoding="utf-8"))
    found = page.evaluate("axe.run({runOnly: ['wcag2a', 'wcag2aa', 'wcag21aa', 'wcag22aa', 'best-practice']})")
    return [f"{rule['id']}: {node['html'][:200]}" for rule in found["violations"] for node in rule["nodes"]]


def new_job(page: Page, path: str = "/submit") -> None:
    """Open the page for a new job without the draft that another test has left."""
    page.goto(path)
    discard = page.get_by_role("button", name="Discard it")
    if discard.count():
        discard.click()
        expect(discard).to_have_count(0)


def write_recipe(page: Page, text: str) -> None:
    """Paste a recipe in place of the one in the editor, or fill in the plain field where the editor is not built."""
    editor = page.locator("#editor .cm-content")
    if page.locator("script[src*='editor']").count():
        editor.focus()  # waits until the script has put it in place of the field
        page.keyboard.press("Control+a")
        editor.evaluate(PASTE, text)
    else:
        page.locator("#recipe").fill(text)
    expect(page.locator("#recipe")).to_have_value(text)


def tab_to(page: Page, wanted: str) -> None:
    """Press Tab until the element of this text, label or name has the focus, which must be visible at every stop."""
    for _ in range(60):
        page.keyboard.press("Escape")  # in the recipe's editor Tab indents otherwise
        page.keyboard.press("Tab")
        stop = page.evaluate(FOCUSED)
        assert stop["outline"] not in ("none", ""), stop
        if wanted in stop["said"]:
            return
    raise AssertionError(f"no stop for {wanted!r}")
