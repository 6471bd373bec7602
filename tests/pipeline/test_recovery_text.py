"""Windows for the training after the cut that the dense model writes: chats, a source of its own, kept batches."""

from __future__ import annotations

from pathlib import Path

import torch
from helpers.commands import save_model, write_recipe, write_text
from helpers.tiny import tiny_tokenizer
from safetensors.torch import load_file

from llmprune.evaluation.chat_windows import ChatTurns
from llmprune.pipeline.batches import Batches
from llmprune.pipeline.context import RunContext
from llmprune.pipeline.inputs import RunInputs
from llmprune.pipeline.recovery_windows import Writing, recovery_windows, write_windows
from llmprune.planning.plan import plan_and_check
from llmprune.recipe.recipe import Recipe
from llmprune.results.run_folder.folder import RunFolder


def _context(folder: Path, **recover: object) -> RunContext:
    """Return the context of a run with a training, in ``folder``."""
    text, model = write_text(folder / "text.txt"), save_model(folder / "dense")
    recipe = write_recipe(folder / "recipe.yaml", model, text, recover={"tokens": "1K", "batch_tokens": 128} | recover)
    found = plan_and_check(Recipe.load(recipe))
    (plan, anatomy), settled = found.require(), found.texts.recipe
    inputs = RunInputs(settled, anatomy, texts=found.texts)
    run_folder = RunFolder.open(folder / "run", recipe={})
    run_folder.begin({}, "origin")
    return RunContext(settled, plan, inputs, run_folder, Batches.planned(plan.batch_sizes))


def test_the_model_writes_half_of_its_training_text(tmp_path: Path) -> None:
    """Its windows are a source with windows held out; every second one is a conversation; none is calibration's."""
    context = _context(tmp_path)
    windows = recovery_windows(context)
    assert windows.names == (str(tmp_path / "text.txt"), "self_generated")
    assert windows.train_sources_N.bincount().tolist() == [16, 16]
    assert windows.held_out_sources_N.bincount().tolist() == [8, 6]
    generated_NL = load_file(tmp_path / "run" / "recover-generated.safetensors")["windows"]
    begun = [text.startswith("<user>") for text in tiny_tokenizer().batch_decode(generated_NL)]
    assert sum(begun) == len(begun) // 2
    assert not (tmp_path / "run" / "recover-generated.partial").exists()
    steps = len(context.folder.steps)
    again = recovery_windows(context)
    assert torch.equal(again.train_NL, windows.train_NL)
    assert context.folder.steps[steps:][0].reused
    context.folder.close()


def test_a_killed_generation_goes_on_where_it_was(tmp_path: Path) -> None:
    """Batches that are in the folder stay; the windows are those of an uninterrupted run."""
    inputs = _context(tmp_path).inputs
    writing = Writing(66, 16, 1.3, 5, ChatTurns((60, 61), (10,)))
    whole_NL = write_windows(inputs, writing, parts=tmp_path / "parts")
    assert whole_NL.shape == (66, 16)
    assert len(torch.unique(whole_NL, dim=0)) == 66
    first, last = sorted((tmp_path / "parts").iterdir())
    kept = first.stat().st_mtime_ns
    last.unlink()
    assert torch.equal(write_windows(inputs, writing, parts=tmp_path / "parts"), whole_NL)
    assert first.stat().st_mtime_ns == kept
