"""The questions of a new job and the editor of its recipe, which follow each other."""

from __future__ import annotations

import re

import pytest
from helpers.browser import faults_of_access, new_job, write_recipe
from playwright.sync_api import Page, expect

from llmprune.service.web.render import static_file


def test_questions_and_editor_follow_each_other(page: Page) -> None:
    """The questions follow the editor, an answer changes its value in the editor, and nothing else is lost."""
    new_job(page)
    recipe = page.locator("#recipe")
    write_recipe(page, "# mine\nmodel: {id: org/model}\ncalibration: {dataset: org/text}\ndepth: {remove: 5}\n")
    expect(page.get_by_label("Layers to remove")).to_have_value("5")
    page.get_by_label("Layers to remove").fill("7")
    expect(recipe).to_have_value(re.compile("# mine\n.*remove: 7", re.DOTALL))
    expect(page.get_by_label("Layers to remove")).to_be_focused()
    write_recipe(page, "model: [")
    expect(page.get_by_text("once the recipe can be read")).to_be_visible()
    write_recipe(page, "model: {id: org/model}\ncalibration: {dataset: org/text}\ndepth: {remove: 6}\n")
    expect(page.get_by_label("Layers to remove")).to_have_value("6")


def test_the_four_questions_by_keyboard(page: Page) -> None:
    """Arrow keys and Enter answer model, size, use and time; the recipe follows, and the focus stays."""
    new_job(page)
    recipe = page.locator("#recipe")
    page.get_by_role("button", name="tiny", exact=True).press("Enter")
    expect(recipe).to_have_value(re.compile("id: tiny\n"))
    expect(page.get_by_role("button", name="tiny", exact=True)).to_have_attribute("aria-pressed", "true")
    page.get_by_role("slider", name="Keep % of the parameters").press("ArrowLeft")
    expect(recipe).to_have_value(re.compile("parameters: 0.74\n"))
    expect(page.locator("output")).to_have_text("74")
    expect(page.get_by_role("radio", name="A first look")).to_be_checked()
    page.get_by_role("radio", name="A first look").press("ArrowDown")
    expect(recipe).not_to_have_value(re.compile("quick"))
    expect(page.get_by_label("Layers to remove")).to_be_hidden()
    page.get_by_role("radio", name="General").press("ArrowDown")
    expect(recipe).to_have_value(re.compile("asyncio"))
    expect(page.get_by_role("radio", name="Code")).to_be_focused()
    page.get_by_role("radio", name="Standard").press("ArrowDown")
    page.get_by_role("radio", name="More: train").press("ArrowDown")
    expect(recipe).to_have_value(re.compile("recover:\n +tokens: 50K"))
    expect(page.get_by_label("Tokens to train on")).to_have_value("50K")


@pytest.mark.skipif(static_file("editor.js") is None, reason="the recipe editor is not built: make editor")
def test_the_editor_completes_shows_problems_at_their_lines_and_lets_the_focus_go(page: Page) -> None:
    """Keys come from the schema; a problem marks its line and leads to it; Escape and Tab leave the editor."""
    new_job(page)
    write_recipe(page, "model: {id: tiny}\ncalibration: {dataset: text.txt, samples: 4, sequence_length: 32}\n")
    page.keyboard.press("Control+End")
    page.keyboard.type("wid")
    page.get_by_role("option", name="width").click()  # Enter is not heeded in a list's first moments
    expect(page.get_by_role("option", name="heads_criterion")).to_be_visible()
    page.keyboard.press("Escape")
    page.keyboard.type("mlp: 7")
    expect(page.locator("#recipe")).to_have_value(re.compile("width:\n  mlp: 7$"))
    problem = page.locator("#outcome li", has_text="width.mlp")
    expect(problem).to_have_attribute("data-line", "4")
    expect(page.locator("#editor .cm-lintRange-error")).to_have_text(["mlp: 7"])
    assert faults_of_access(page) == []
    page.keyboard.press("Control+Home")
    problem.get_by_role("button", name="line 4").click()
    page.keyboard.type("5")
    expect(page.locator("#recipe")).to_have_value(re.compile("mlp: 75$"))
    expect(page.get_by_text("leaves the editor")).to_be_visible()
    page.keyboard.press("Tab")
    assert "cm-content" in page.evaluate("document.activeElement.shadowRoot?.activeElement?.className ?? ''")
    page.keyboard.press("Escape")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") != "editor"
