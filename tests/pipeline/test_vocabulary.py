"""Runs that cut the vocabulary: alone, and after layers and neurons."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.commands import (
    TASKS,
    command,
    perplexity_of,
    report_in,
    reused_steps,
    save_model,
    states,
    verify_here,
    write_recipe,
)
from helpers.recipes import problems
from helpers.trained_tokenizers import USED, trained_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmprune.cut.decision import Cut

ROWS = 512


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model whose tokenizer has merges, and text of half of its words."""
    folder: Path = tmp_path_factory.mktemp("vocabulary-run")
    save_model(folder / "base", tokenizer=False, vocab_size=ROWS, tie_word_embeddings=True)
    trained_tokenizer("bytes").save_pretrained(folder / "base")
    (folder / "text.txt").write_text("\n\n".join(USED))
    return folder


def recipe_of(place: Path, name: str, **sections: object) -> Path:
    """Write a recipe on the model, without layers and neurons to remove unless ``sections`` say so."""
    left_out = {"depth": None, "width": None} | sections
    return write_recipe(place / f"{name}.yaml", place / "base", place / "text.txt", **left_out)


@pytest.fixture(scope="module")
def alone(place: Path) -> Path:
    """Recipe of a model that loses tokens alone, whose run is in the folder ``alone``."""
    evaluation = perplexity_of(place / "text.txt")
    recipe = recipe_of(place, "alone", vocabulary={"tokens": 320, "multiple": 32}, evaluation=evaluation)
    with pytest.MonkeyPatch.context() as patch:
        verify_here(patch)
        done = command("run", recipe, "--output", place / "alone")
    assert done.code == 0, done.err
    return recipe


def test_vocabulary_alone(place: Path, alone: Path) -> None:
    """Only embedding, head and files are written anew; the report has the figures of the cut, and a second run none."""
    planned = command("plan", alone)
    assert "Vocabulary: 320 of 512 tokens kept, each takes 32 parameters; they make up" in planned.out
    report = report_in(place / "alone")
    found = report["vocabulary"]
    assert (found["kept"], found["tokens"], found["largest_logit_difference"]) == (320, ROWS, 0)
    assert report["dense"]["parameters"] - report["pruned"]["parameters"] == (ROWS - 320) * 32
    assert report["perplexity"] is None
    assert all(bits > 0 for bits in found["bits_per_byte"])
    assert report["base_files"]["rewritten"][0] == "tokenizer.json"
    assert {"pass 1", "pass 2"}.isdisjoint(step["name"] for step in report["steps"])
    base, model = (AutoModelForCausalLM.from_pretrained(place / name) for name in ("base", "alone/model"))
    keep_K = Cut.load(place / "alone" / "cut.json").vocabulary
    ids = AutoTokenizer.from_pretrained(place / "alone/model")(USED[0], return_tensors="pt").input_ids
    assert keep_K is not None
    with torch.no_grad():
        assert torch.equal(model(ids).logits, base(keep_K[ids]).logits[..., keep_K])
    assert command("run", alone, "--output", place / "alone").code == 0
    assert reused_steps(place / "alone") == {"vocabulary": True, "evaluation": True}


@pytest.fixture(scope="module")
def both(place: Path) -> Path:
    """Run folder of a model that lost layers and neurons, then tokens."""
    evaluation = perplexity_of(place / "text.txt", generation={"samples": 2, "prompt_tokens": 8, "new_tokens": 8})
    sections = {"depth": {"remove": 1}, "width": {"neurons": 64}, "evaluation": evaluation}
    recipe = recipe_of(place, "both", vocabulary={"coverage": 0.9, "multiple": 32}, **sections)
    with pytest.MonkeyPatch.context() as patch:
        verify_here(patch)
        done = command("run", recipe, "--output", place / "both")
    assert done.code == 0, done.err
    (place / "both.out").write_text(done.out)
    return place / "both"


def test_vocabulary_after_layers_and_neurons(place: Path, both: Path) -> None:
    """The rest of the run has the dense model's tokens; perplexity is that of the model before its tokens were cut."""
    report = report_in(place / "both")
    assert report["pruned"]["layers"] == 3
    assert report["pruned"]["vocabulary"] % 32 == 0
    assert report["vocabulary"]["coverage"] >= 0.9
    assert report["perplexity"]["pruned"] > 0
    assert report["generation"] is not None
    said = " ".join((place / "both.out").read_text().split())
    assert "are those of the model before its vocabulary was cut" in said
    assert json.loads((place / "both/model/config.json").read_text())["vocab_size"] == report["pruned"]["vocabulary"]
    assert (place / "both/full-vocabulary/config.json").is_file()


def test_another_size_and_the_same_again(place: Path, both: Path, tmp_path: Path, in_one_process: None) -> None:
    """Another size reuses the scores and cuts the same tokens, and the same again gives the same bytes."""
    sections = {"width": {"neurons": 64}, "vocabulary": {"coverage": 0.9, "multiple": 32}}
    for name, layers, options in (("size", 2, ("--scores-of", both)), ("again", 1, ())):
        recipe = recipe_of(place, name, depth={"remove": layers}, **sections)
        done = command("run", recipe, "--output", tmp_path / name, *options)
        assert done.code == 0, done.err
        shown = command("report", tmp_path / name, "--output", tmp_path / f"{name}.html")
        kept = report_in(both)["vocabulary"]["kept"]
        assert f"{kept} of {ROWS} tokens kept" in " ".join(shown.out.split())
        assert f"{kept} of {ROWS} tokens kept" in (tmp_path / f"{name}.html").read_text()
        assert report_in(tmp_path / name)["vocabulary"]["kept"] == kept
    assert (reused_steps(tmp_path / "size")["pass 1"], report_in(tmp_path / "size")["pruned"]["layers"]) == (True, 2)
    assert states(tmp_path / "again" / "model") == states(both / "model")


@pytest.mark.parametrize(
    ("vocabulary", "said"),
    [
        ({"tokens": 64}, "vocabulary: 128 of 512 tokens are fewer than the"),
        ({"tokens": 600}, "vocabulary: all 512 tokens are kept"),
        ({"keep_for": [{"dataset": "missing.txt"}], "keep": 0.5}, "vocabulary.keep_for: the data file missing.txt"),
    ],
)
def test_a_plan_refuses(place: Path, vocabulary: dict[str, object], said: str) -> None:
    """A vocabulary without the tokens that must stay, one that loses none, and text that does not exist."""
    done = command("plan", recipe_of(place, "refused", vocabulary=vocabulary))
    assert done.code != 0
    assert said in " ".join(done.err.split())


def test_a_recipe_has_one_target() -> None:
    """Coverage, tokens and keep exclude each other."""
    recipe = "model: {id: org/model}\n"
    assert "needs at most one of coverage, tokens, keep" in problems(f"{recipe}vocabulary: {{tokens: 9, keep: 0.5}}")[0]


@pytest.mark.usefixtures("alone", "in_one_process")
def test_a_model_without_some_tokens_learns_from_its_base(place: Path) -> None:
    """The base predicts the kept tokens under their new ids: what only lost tokens is at no distance from it."""
    generation = {"samples": 2, "prompt_tokens": 8, "new_tokens": 8, "prompts": "held_out"}
    recover = {"batch_tokens": 64, "data": {"self_generated": {"samples": 2}}, "hidden_states": 0.1}
    tasks = {"tasks": ["llmprune_agreement"], "include_path": str(TASKS), "limit": 1}
    evaluation = perplexity_of(place / "text.txt", generation=generation, **tasks)
    settings = recipe_of(place, "recover", recover=recover | {"tokens": 128}, evaluation=evaluation)
    done = command(
        *("recover", place / "alone" / "model", "--against", place / "base", "--tokens", "128"),
        *("--recipe", settings, "--output", place / "learned"),
    )
    assert done.code == 0, done.err
    report = report_in(place / "learned")
    assert sum(report["recovery"]["checks"][0]["divergence"].values()) < 1e-4  # stored in 16 bits
    assert report["perplexity"]["dense"] == pytest.approx(report["perplexity"]["pruned"], rel=1e-6)
    assert report["divergence"]["same_first"] == report["generation"]["agreement"]["share"] == 1
    assert any("has 512 tokens in its vocabulary" in warning for warning in report["warnings"])
