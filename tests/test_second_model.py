"""The benchmark's second model: its training makes a checkpoint that the quality benchmark prunes."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoTokenizer

from llmprune.data.begin_of_text import begin_tokens

BENCHMARKS = Path(__file__).parents[1] / "eval" / "benchmarks"
WORDS = "The river bends where the old mill stood, and nobody remembers who built it or why it burned down. "


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a little text of each kind."""
    folder = tmp_path_factory.mktemp("texts")
    choices = {"text": ["a mill", "a river"], "label": ["A", "B"]}
    question = {"answer": "12 + 30 = 42", "answerKey": "B", "choices": choices}
    for name in ("c4_en", "wikipedia", "gsm8k_train", "gsm8k_test", "arc_easy_train"):
        rows = [{**question, "question": f"{index}. {WORDS}", "text": f"{index}. {WORDS * 10}"} for index in range(40)]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (folder / "wikitext2_test.txt").write_text(f" = Mills = \n\n{WORDS * 40}\n", encoding="utf-8")
    return folder


def _script(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: str | Path) -> None:
    """Run a benchmark in this process."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(str(BENCHMARKS / name), run_name="__main__")


@pytest.mark.slow
@pytest.mark.usefixtures("in_one_process")
def test_a_model_is_trained_and_its_cuts_are_judged(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model is Gemma-shaped, its texts begin with <bos>, and a cut with and without refit is judged by kind."""
    trained = tmp_path / "second"
    small = ("--minutes", "0.01", "--layers", "4", "--hidden", "32", "--vocabulary", "300")
    _script(monkeypatch, "second_model.py", texts, trained, *small)
    config, tokenizer = AutoConfig.from_pretrained(trained), AutoTokenizer.from_pretrained(trained)
    assert config.model_type == "gemma3_text"
    assert begin_tokens(tokenizer) == (tokenizer.bos_token_id,) == (config.bos_token_id,)
    trained_on = json.loads((trained / "training.json").read_text())
    kinds = {"c4", "wikipedia", "wikitext", "gsm8k", "pydoc"}
    assert trained_on["steps"] > 0
    assert trained_on["losses"].keys() == kinds

    windows = ("--windows", "8", "2")
    _script(
        monkeypatch, "quality.py", texts, "mlp-25", "--unrepaired", "--model", trained, *windows, "--output", tmp_path
    )
    figures = json.loads((tmp_path / "quality-second.json").read_text())["figures"]
    assert [row["settings"] for row in figures["rows"]] == [[], ["refit=false"]]
    assert all(row["excess"].keys() == kinds for row in figures["rows"])
    assert figures["dense"].keys() == kinds
    assert "dense, perplexity" in capsys.readouterr().out

    peers = ("peers.py", texts, "mlp-25", "depth-1 and mlp-25", "--model", trained, "--output", tmp_path)
    few = ("--samples", "8", "--judged", "2")
    _script(monkeypatch, *peers, *few, "--tool", "ShortGPT", "FLAP")
    _script(monkeypatch, *peers, *few, "--tool", "ShortGPT", "FLAP", "PruneMe")  # only what is not there yet
    rows = json.loads((tmp_path / "peers.json").read_text())["figures"]["rows"]
    assert [(row["tool"], row["target"]) for row in rows] == [
        ("dense", "dense"),
        ("FLAP", "mlp-25"),
        ("ShortGPT, then FLAP", "depth-1 and mlp-25"),
    ]
    assert [len(row["removed"]) for row in rows] == [0, 0, 1]
    assert all(row["perplexity"].keys() == kinds and row["judged"] == 2 for row in rows)
