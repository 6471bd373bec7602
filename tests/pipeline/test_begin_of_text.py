"""Runs of a model whose tokenizer begins a text with a begin-of-text token."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.commands import command, perplexity_of, report_in, save_model, write_recipe, write_text
from helpers.shaped_tokenizers import shaped_tokenizer
from safetensors.torch import save_file

from llmprune.planning.plan import make_plan
from llmprune.recipe.recipe import Recipe

BEGIN = "<|begin_of_text|> (0)"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """Save a tiny model with a tokenizer that is shaped like Llama 3's."""
    folder = save_model(tmp_path / "base", tokenizer=False)
    shaped_tokenizer("llama3").save_pretrained(folder)
    write_text(tmp_path / "text.txt")
    return folder


@pytest.mark.usefixtures("in_one_process")
def test_a_run_says_what_windows_begin_with(base: Path, tmp_path: Path) -> None:
    """Plan, report and its page name the token."""
    text = tmp_path / "text.txt"
    evaluation = perplexity_of(text, generation={"samples": 2, "prompt_tokens": 8, "new_tokens": 8})
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "out"
    write_recipe(recipe, base, text, width=None, evaluation=evaluation)
    assert f"each begins with {BEGIN}" in command("plan", recipe).out
    assert command("run", recipe, "--output", out).code == 0
    report = report_in(out)
    assert report["provenance"]["begin_of_text"] == report["perplexity"]["begin_of_text"] == BEGIN
    assert report["perplexity"]["tokens"] < 4 * 31  # windows have several documents
    assert "windows begin with <code>&lt;|begin_of_text|&gt; (0)</code>" in (out / "report.html").read_text()


def test_ready_tokens_without_it_are_warned_of(base: Path, tmp_path: Path) -> None:
    """The plan says how many windows lack the token, and the remedy, which silences it."""
    tokens_NL = torch.arange(10, 74).view(4, 16)
    tokens_NL[0, 0] = 0
    save_file({"ids": tokens_NL}, tmp_path / "ids.safetensors")
    ready = {"tokens": str(tmp_path / "ids.safetensors"), "key": "ids"}
    evaluation = {"perplexity": {**ready, "bos": False}}
    recipe = write_recipe(tmp_path / "recipe.yaml", base, "unused", calibration=ready, evaluation=evaluation)
    (warning,) = (note for note in make_plan(Recipe.load(recipe)).notes if "begin" in note)
    assert f"calibration.tokens: 3 of 4 windows do not begin with {BEGIN}" in warning
    assert "set calibration.bos: true" in warning
    for bos in ("true", "false"):
        plan = make_plan(Recipe.load(recipe, [f"calibration.bos={bos}"]))
        assert not any("begin" in note for note in plan.notes)
        assert plan.begin_of_text == (BEGIN if bos == "true" else None)
