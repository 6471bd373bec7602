"""A job from the form, by mouse, by keyboard and without script, and the draft of a recipe.

With LLMPRUNE_BROWSER_QUICKSTART=1 the form's own recipe runs, on the demo model, instead of the same form filled in
for a tiny one.
"""

from __future__ import annotations

import re

from helpers.browser import FOCUSED, MINUTE, QUICKSTART, WIDE, new_job, quiet_page, tab_to, write_recipe
from helpers.service import recipe
from playwright.sync_api import Browser, Page, expect

from llmprune.service.client.sync.client import Client
from llmprune.service.settings import Settings


def fill_in(page: Page) -> None:
    """Fill in the form for the tiny model; the quickstart keeps the other initial answers."""
    if not QUICKSTART:
        page.get_by_role("button", name="tiny", exact=True).click()
        page.get_by_label("My own text").check()
        page.get_by_label("Data set").fill("text.txt")
        expect(page.locator("#recipe")).to_have_value(re.compile("text.txt"))
    page.get_by_text("More: layers and widths").click()
    page.get_by_label("Choose layers and widths").check()
    page.get_by_label("Layers to remove").fill("2" if QUICKSTART else "1")
    if not QUICKSTART:
        page.get_by_label("Windows").fill("4")
        page.get_by_label("Tokens per window").fill("32")
        page.get_by_label("Perplexity on split").fill("")


def test_submit_by_the_form_watch_it_finish_and_open_the_report(page: Page) -> None:
    """A person clicks from the first page to the report; recipe, plan and progress are shown live."""
    new_job(page)
    page.goto("/")
    page.get_by_role("link", name="New job").click()
    fill_in(page)
    expect(page.locator("#recipe")).to_have_value(re.compile(f"remove: {2 if QUICKSTART else 1}\n"))
    expect(page.locator("#outcome")).to_contain_text("Parameters", timeout=2 * MINUTE)
    page.get_by_label("Layers to remove").fill("9999")
    expect(page.get_by_role("alert")).to_contain_text("depth.remove")
    page.get_by_label("Layers to remove").fill("2")
    expect(page.locator("#outcome tr", has_text="Layers")).to_contain_text("−", timeout=MINUTE)
    page.get_by_role("button", name="Submit").click()
    expect(page.locator("#live .state")).to_have_text("running", timeout=MINUTE)
    # the passes over a tiny model may end between two refreshes; the verification takes longer
    steps = re.compile("Score|Cut and repair|Save|Verify|Evaluate")
    expect(page.locator("#live")).to_contain_text(steps, timeout=5 * MINUTE)
    expect(page.locator("#live .state")).to_have_text("succeeded", timeout=(15 if QUICKSTART else 3) * MINUTE)
    report = page.frame_locator("iframe.report")
    expect(report.get_by_role("heading", level=1)).to_contain_text("pruned")
    assert page.locator("iframe.report").evaluate("frame => frame.clientHeight") > WIDE["height"]
    page.get_by_role("button", name="Copy").click()
    expect(page.get_by_role("button", name=re.compile("Copied|Selected"))).to_be_visible()
    page.get_by_role("link", name="Open the report page").click()
    expect(page.get_by_role("heading", level=1)).to_contain_text("pruned")


def test_a_late_response_takes_no_answer_back(page: Page) -> None:
    """A response to the recipe before arrives just after another answer was given: that answer stays, and is sent."""
    new_job(page)
    page.get_by_text("More: layers and widths").click()
    arrive = """async () => {
      const recipe = new URLSearchParams({recipe: document.getElementById("recipe").value});
      const answer = await (await fetch("/submit/check?typed=true", {method: "POST", body: recipe})).text();
      document.querySelector('input[name="by"][value=""]').click();
      htmx.swap("#outcome", answer, {swapStyle: "innerHTML"});
    }"""
    page.evaluate(arrive)
    page.get_by_label("Layers to remove").fill("1")
    expect(page.locator("#recipe")).to_have_value(re.compile("remove: 1\n"))


def test_by_keyboard_alone(page: Page, live: tuple[Client, Settings]) -> None:
    """Tab and Enter lead from the first page to a submitted job, with a visible focus at every stop."""
    page.goto("/")
    page.keyboard.press("Tab")
    assert "To the content" in page.evaluate(FOCUSED)["said"]
    tab_to(page, "New job")
    page.keyboard.press("Enter")
    expect(page).to_have_title(re.compile("New job"))
    tab_to(page, "Recipe")
    write_recipe(page, recipe(by="keyboard"))
    expect(page.locator("#outcome")).not_to_contain_text("Checking")
    tab_to(page, "Submit")
    page.keyboard.press("Enter")
    expect(page.locator("#live .state")).to_have_text("succeeded")
    assert live[0].job(page.url.rsplit("/", 1)[-1]).refresh().recipe == recipe(by="keyboard")


def test_the_draft_is_kept_through_reload_and_another_page(page: Page) -> None:
    """Recipe and fields are restored, the questions follow, secrets are not stored, and a button begins anew."""
    new_job(page)
    recipe = page.locator("#recipe")
    write_recipe(page, "# mine\nmodel: {id: org/model}\ncalibration: {dataset: org/text}\ndepth: {remove: 5}\n")
    page.get_by_text("Name, devices, limits").click()
    page.get_by_label("Hub token for this job").fill("hf_secret")
    page.get_by_label("Name", exact=True).fill("by hand")
    page.get_by_role("link", name="Jobs", exact=True).click()  # before a second has passed
    page.get_by_role("link", name="New job").click()
    expect(recipe).to_have_value(re.compile("# mine\n.*remove: 5", re.DOTALL))
    expect(page.get_by_label("Layers to remove")).to_have_value("5")
    expect(page.locator("input[name=name]")).to_have_value("by hand")
    expect(page.locator("input[name=hub_token]")).to_have_value("")
    page.get_by_label("Layers to remove").fill("7")
    expect(page.get_by_text("Draft saved.")).to_be_visible()
    page.reload()
    expect(recipe).to_have_value(re.compile("# mine\n.*remove: 7", re.DOTALL))
    page.get_by_role("button", name="Discard it").click()
    expect(recipe).to_have_value(re.compile("^model:\n"))
    assert "hf_secret" not in page.evaluate("JSON.stringify([history.state, {...sessionStorage}, {...localStorage}])")


def test_a_submitted_recipe_comes_back_with_back(page: Page) -> None:
    """After submission Back shows the editor with the submitted recipe and a new key; a new page starts anew."""
    new_job(page)
    text, key = recipe(by="back"), page.locator("input[name=key]").input_value()
    write_recipe(page, text)
    page.get_by_role("button", name="Submit").click()
    expect(page).to_have_url(re.compile(r"/jobs/\w+$"))
    page.go_back()
    expect(page.locator("#recipe")).to_have_value(text)
    assert page.locator("input[name=key]").input_value() != key
    page.get_by_role("link", name="New job").click()
    expect(page.locator("#recipe")).to_have_value(re.compile("^model:\n"))


def test_without_script_the_plain_field_is_the_editor(browser: Browser, live: tuple[Client, Settings]) -> None:
    """A browser that runs no script shows the recipe as text and submits it."""
    context = browser.new_context(base_url=live[0].server, java_script_enabled=False)
    page = context.new_page()
    page.goto("/submit")
    page.get_by_label("Recipe", exact=True).fill(recipe(by="no script"))
    page.get_by_role("button", name="Submit").click()
    expect(page).to_have_url(re.compile(r"/jobs/\w+$"))
    context.close()


def test_mistakes_stay_in_the_editor(browser: Browser, live: tuple[Client, Settings]) -> None:
    """Problems are shown while typing and after submission, and the recipe is kept."""
    context = browser.new_context(base_url=live[0].server, viewport=WIDE)
    for page in quiet_page(context, live[0].server, refusals=True):
        new_job(page)
        write_recipe(page, "model: {id: /etc/passwd}\ncalibration: {dataset: org/text}\n")
        expect(page.get_by_role("alert")).to_contain_text("not allowed here")
        page.get_by_role("button", name="Submit").click()
        expect(page.get_by_role("alert").first).to_contain_text("model.id")
        expect(page.locator("#recipe")).to_have_value(re.compile("/etc/passwd"))
    context.close()
