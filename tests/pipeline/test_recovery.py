"""A run with ``recover``: from the repaired checkpoint to a trained, verified model, with figures in the report."""

from __future__ import annotations

import itertools
import json
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.commands import command, report_in, save_model, verify_here, write_recipe, write_text
from safetensors.torch import load_file

from llmprune.recipe.model import ModelSource
from llmprune.recipe.recover import Recover
from llmprune.recover import timing
from llmprune.recover.arithmetic import Arithmetic


def recipe_of(folder: Path, *, hidden_size: int = 32, **sections: Any) -> Path:
    """Write a recipe that removes layers and neurons of a tiny model and trains the rest on other text."""
    text = write_text(folder / "text.txt")
    recover = {"tokens": 24 * 32, "batch_tokens": 4 * 32, "check_every": 2, "data": {"self_generated": False}}
    return write_recipe(
        folder / "recipe.yaml",
        save_model(folder / "dense", hidden_size=hidden_size, intermediate_size=3 * hidden_size),
        text,
        calibration={"dataset": str(text), "samples": 4, "sequence_length": 32, "self_generated": 0},
        evaluation={},
        **{"recover": recover} | sections,
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Return the weights of a run's model."""
    return load_file(folder / "model" / "model.safetensors")


def test_a_run_trains_what_it_repaired(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is nearer to the dense one than the repaired one is, which stays beside it; a second run reuses all."""
    verify_here(monkeypatch)
    recipe, run = recipe_of(tmp_path), tmp_path / "run"
    done = command("run", recipe, "--output", run)
    assert done.code == 0, done.err
    made, planned = report_in(run)["steps"], json.loads((run / "plan.json").read_text())["work"]["parts"]
    assert [step["name"] for step in made] == list(dict.fromkeys(part["step"] for part in planned))
    recovery = report_in(run)["recovery"]
    first, last = recovery["checks"][0], recovery["checks"][-1]
    assert recovery["tokens"] == last["tokens"] == 24 * 32
    assert last["divergence"].keys() == {str(tmp_path / "text.txt")}
    assert sum(last["divergence"].values()) < sum(first["divergence"].values())
    before = load_file(run / "repaired" / "model.safetensors")
    assert before.keys() == weights(run).keys()
    assert any(not torch.equal(before[name], tensor) for name, tensor in weights(run).items())
    assert not (run / "recover.partial").exists()
    made = (run / "recovery.json").stat().st_mtime_ns
    assert command("run", recipe, "--output", run).code == 0
    assert {step["name"]: step["reused"] for step in report_in(run)["steps"]}["recovery"]
    assert (run / "recovery.json").stat().st_mtime_ns == made
    shutil.rmtree(run / "model")
    assert command("run", recipe, "--output", run).code == 0
    assert (run / "model").is_dir()


def test_any_checkpoint_is_trained_against_its_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``llmprune recover`` trains a model that was pruned before, and compares it with the model it was pruned from."""
    verify_here(monkeypatch)
    recipe = recipe_of(tmp_path, recover=None)
    assert command("run", recipe, "--output", tmp_path / "run").code == 0
    recipe = recipe_of(tmp_path, recover=None, depth=None, width=None, budget={"parameters": 0.8})  # left out too
    done = command(
        *("recover", tmp_path / "run" / "model", "--against", tmp_path / "dense", "--tokens", str(24 * 32)),
        *("--recipe", recipe, "--output", tmp_path / "trained", "--set", "recover.data.self_generated=false"),
        *("--set", f"recover.batch_tokens={4 * 32}"),
    )
    assert done.code == 0, done.err
    report = report_in(tmp_path / "trained")
    checks = report["recovery"]["checks"]
    assert sum(checks[-1]["divergence"].values()) < sum(checks[0]["divergence"].values())
    assert report["recovery"]["against"] == str(tmp_path / "dense")
    assert report["dense"]["layers"] == 4
    assert report["pruned"]["layers"] == 2
    before, after = weights(tmp_path / "run"), weights(tmp_path / "trained")
    unchanged = {name for name, value in before.items() if torch.equal(after[name], value)}
    assert unchanged == {name for name in before if "embed" in name or "lm_head" in name}


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    """A dense model with another vocabulary cannot teach; the message says what to give."""
    recipe = recipe_of(tmp_path)
    other = save_model(tmp_path / "other", vocab_size=64)
    refused = command("plan", recipe, "--set", f"recover.against={other}")
    assert refused.code != 0
    assert "64" in refused.err
    assert "pruned from" in refused.err


def test_hours_become_tokens_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of windows follows from the first steps, is kept, and is the same when the run is repeated."""
    verify_here(monkeypatch)
    recover = {"hours": 0.0002, "batch_tokens": 2 * 32, "data": {"self_generated": False}}
    recipe, run = recipe_of(tmp_path, recover=recover), tmp_path / "run"
    assert command("run", recipe, "--output", run).code == 0
    trained = report_in(run)["recovery"]["tokens"]
    assert trained > 0
    assert trained == int((run / "recover-windows.txt").read_text()) // 2 * 2 * 32
    assert command("run", recipe, "--output", run).code == 0
    assert report_in(run)["recovery"]["tokens"] == trained


def test_fewer_windows_fit_beside_a_larger_dense_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its forward pass counts by its size; without its predictions it is not run."""
    seconds = itertools.count(0.0, 30.0)
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: next(seconds)))
    source = ModelSource(id=str(save_model(tmp_path / "base")))
    sample_NL = torch.zeros(4, 32, dtype=torch.int64)

    def windows(dense_pass: float, *, save_memory: bool = False, **settings: Any) -> int:
        return timing.windows_in(
            1.0,
            source,
            settings=Recover(hours=1.0, **settings),
            arithmetic=Arithmetic(torch.device("cpu"), False, save_memory),
            sample_NL=sample_NL,
            dense_pass=dense_pass,
        )

    assert windows(1.0, loss="language_model") == 360  # 10 seconds for each
    assert windows(1.0) == int(360 / (1 + 1 / 3))
    assert windows(3.0) == 180
    assert windows(3.0, save_memory=True) == int(360 / (1 + 3 / 4))
    assert windows(3.0, method="lora", hidden_states=1.0) == int(360 / (1 + 2 * 3 / 2))


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_sparse_model_stays_sparse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    """The pattern is counted in the saved file of the trained model; no group breaks it."""
    verify_here(monkeypatch)
    recover = {"tokens": 24 * 32, "batch_tokens": 4 * 32, "method": method, "learning_rate": 3e-3}
    sparsity = {"pattern": "2:4", "method": {"kind": "magnitude"}}
    recover["data"] = {"self_generated": False}
    recipe = recipe_of(tmp_path, recover=recover, sparsity=sparsity, depth=None, width=None, hidden_size=64)
    done = command("run", recipe, "--output", tmp_path / "run")
    assert done.code == 0, done.err
    report = report_in(tmp_path / "run")
    assert report["sparsity"]["violations"] == 0
    assert report["sparsity"]["zeros"] == report["sparsity"]["weights"] // 2
    assert report["recovery"]["best_step"] > 0


def test_a_stopped_training_is_continued_or_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C says where the training is; ``--end-recovery`` goes on with its best weights, and the report says so.

    The hidden states after the kept layers are compared too, which keeps no run from being stopped.
    """
    verify_here(monkeypatch)
    recipe, run = recipe_of(tmp_path), tmp_path / "run"
    smaller = ("--set", "recover.hidden_states=0.1", "--set", "recover.learning_rate=1e-3")
    arguments = ("run", recipe, "--output", run, *smaller)
    refused = command(*arguments, "--end-recovery")
    assert refused.code == 2
    assert "none was begun in" in refused.err
    step = torch.optim.AdamW.step

    def press(self: torch.optim.AdamW, closure: None = None) -> None:
        signal.raise_signal(signal.SIGINT)
        monkeypatch.setattr(torch.optim.AdamW, "step", step)
        step(self, closure)

    monkeypatch.setattr(torch.optim.AdamW, "step", press)
    stopped = command(*arguments)
    assert stopped.code == 130
    last = stopped.err.splitlines()[-1]
    assert last == (
        "llmprune: stopped at step 2 of 6, best so far step 2; run the same command again to continue; "
        "--end-recovery takes the best weights so far"
    )
    assert not (run / "model").exists()
    ended = command(*arguments, "--end-recovery")
    assert ended.code == 0, ended.err
    recovery = report_in(run)["recovery"]
    assert (recovery["steps"], recovery["best_step"]) == (2, 2)
    assert recovery["notes"] == ["the training was ended with --end-recovery after 2 of 6 steps"]
    assert (run / "model" / "config.json").is_file()
    assert not (run / "recover.partial").exists()


def test_hidden_states_of_unknown_layers_are_refused(tmp_path: Path) -> None:
    """Where it is not known which layers were removed, both models need equally many."""
    recipe = recipe_of(tmp_path)
    other = save_model(tmp_path / "other", num_hidden_layers=6)
    refused = command("plan", recipe, "--set", f"recover.against={other}", "--set", "recover.hidden_states=0.5")
    assert refused.code != 0
    assert "has 4 layers while" in refused.err
    assert "prune and recover in one run" in refused.err
