"""``llmprune eval``, ``reevaluate`` and ``bench``, and the gate of a run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers.commands import (
    TASKS,
    command,
    copy_of,
    forbid_weights,
    report_in,
    reused_steps,
    states,
    write_recipe,
)

from llmprune.checkpoint import model_memory
from llmprune.evaluation import evaluate

pytestmark = pytest.mark.usefixtures("in_one_process")


def test_evaluation_alone_and_against_the_base(done: Path, workspace: Path, tmp_path: Path) -> None:
    """``eval`` prints one model's figures, or two side by side, and writes them where asked."""
    options = ["--tasks", "llmprune_agreement", "--include-path", str(TASKS), "--limit", "4"]
    model = done / "model"
    alone = command("eval", model, *options, "--output", tmp_path / "alone")
    assert alone.code == 0, alone.err
    assert "llmprune_agreement" in alone.out
    assert json.loads((tmp_path / "alone" / "evaluation.json").read_text())["results"]["tasks"][0]["task"]
    against = command("eval", model, "--against", workspace / "base", *options, "--output", tmp_path / "two")
    assert against.code == 0, against.err
    assert "retention" in against.out
    written = json.loads((tmp_path / "two" / "evaluation.json").read_text())
    assert written["tasks"][0]["samples"] == 4
    assert written["settings"]["limit"] == 4


def test_gate_decides_the_exit_code(workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gate that is not met exits with 3, after the report; one that is met with 0, without pruning again."""
    from llmprune.evaluation.lm_eval.results import Sample, TaskResult, TaskResults

    def ask(model: Any, side: str, *, evaluation: Any) -> TaskResults:
        right = 400 if side == "dense" else 200
        samples = tuple(
            Sample(doc_id=n, doc_hash=f"{n}", prompt_hash=f"{n}", value=float(n < right)) for n in range(500)
        )
        task = TaskResult(
            task="llmprune_agreement",
            metric="acc",
            filter="none",
            higher_is_better=True,
            value=right / 500,
            samples=samples,
        )
        return TaskResults(tasks=(task,))

    monkeypatch.setattr(evaluate, "evaluate_tasks", ask)
    asked = {"tasks": ["llmprune_agreement"], "include_path": str(TASKS), "limit": 4}
    recipe = write_recipe(
        tmp_path / "gated.yaml",
        workspace / "base",
        workspace / "text.txt",
        evaluation=asked | {"gate": {"min_retention": 0.9}},
    )
    missed = command("run", recipe, "--output", tmp_path / "out")
    assert missed.code == 3
    assert "at least 90.00%" in missed.err
    assert "50.00%" in missed.err
    assert "Gate not passed" in missed.out
    assert report_in(tmp_path / "out")["gate"]["passed"] is False
    assert (tmp_path / "out" / "report.html").is_file()
    for least, code, verdict in ((0.5, 3, "not enough samples"), (0.4, 0, "pass")):
        override = f"evaluation.gate.min_retention={least}"
        outcome = command("run", recipe, "--output", tmp_path / "out", "--set", override)
        assert (outcome.code, report_in(tmp_path / "out")["gate"]["verdict"]) == (code, verdict)
    assert set(reused_steps(tmp_path / "out").values()) == {True}


def test_reevaluate_asks_more_samples_and_prunes_nothing(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An undecided gate names the command, which continues the samples and makes report and verdict anew.

    The base may have moved since: ``--base`` says where it is.
    """
    base, moved = shutil.copytree(workspace / "base", tmp_path / "base"), tmp_path / "moved"
    asked = {"tasks": ["llmprune_agreement"], "include_path": str(TASKS), "limit": 4}
    recipe = write_recipe(
        tmp_path / "gated.yaml",
        base,
        workspace / "text.txt",
        evaluation=asked | {"gate": {"min_retention": 0.9}},
    )
    out = tmp_path / "out"
    first = command("run", recipe, "--output", out)
    assert (first.code, "llmprune reevaluate" in first.err) == (3, True)
    model, before = states(out / "model"), report_in(out)
    made = [(out / name).stat().st_mtime_ns for name in ("scores.safetensors", "pruning.json")]
    base.rename(moved)
    lost = command("reevaluate", out, "--limit", 12)
    assert (lost.code, "give the folder that it has now with --base" in lost.err) == (2, True), lost.err
    wrong = command("reevaluate", out, "--limit", 12, "--base", tmp_path / "none")
    assert (wrong.code, f"is no folder; give the folder of {base}" in wrong.err) == (2, True), wrong.err
    more = command("reevaluate", out, "--limit", 12, "--base", moved)
    moved.rename(base)
    assert made == [(out / name).stat().st_mtime_ns for name in ("scores.safetensors", "pruning.json")]
    assert (more.code in (0, 3), states(out / "model") == model) == (True, True), more.err
    after = report_in(out)
    assert (before["tasks"][0]["samples"], after["tasks"][0]["samples"]) == (4, 12)
    assert after["gate"]["bars"][0]["samples"] == 12
    assert {"evaluation.limit=12", f'model.id="{moved}"'} == {*after["overrides"]}
    for side in ("dense_tasks", "pruned_tasks"):
        samples = json.loads((out / "evaluation.json").read_text())[side]["tasks"][0]["samples"]
        assert [sample["doc_id"] for sample in samples] == list(range(12))
    fewer = command("run", recipe, "--output", out)
    assert (fewer.code, "add --set evaluation.limit=12" in fewer.err, report_in(out)) == (2, True, after), fewer.err
    (out / "report.json").write_text("{}")  # as by another version
    unknown = command("run", recipe, "--output", out)
    assert (unknown.code, "delete it, and this run writes it anew" in unknown.err) == (2, True), unknown.err
    (out / "report.json").write_text(json.dumps(after))
    refused = command("reevaluate", out, "--limit", 12)
    assert (refused.code, "12 samples per task are evaluated already" in refused.err) == (2, True)
    for text in ("{", None):
        (out / "evaluation.json").unlink() if text is None else (out / "evaluation.json").write_text(text)
        refused = command("reevaluate", out, "--limit", 14)
        assert (refused.code, "evaluation.json cannot be read" in refused.err) == (2, True)


@pytest.mark.parametrize("limit", [(), ("--limit", 9)])
def test_reevaluate_needs_tasks(limit: tuple[str | int, ...], done: Path) -> None:
    """Of a run that evaluated none it says so, and not that every document was asked."""
    refused = command("reevaluate", done, *map(str, limit))
    assert (refused.code, "evaluated no task" in refused.err) == (2, True), refused.err


def test_evaluation_uses_the_chosen_gpus(done: Path, workspace: Path, tmp_path: Path) -> None:
    """``--devices`` of ``eval`` and ``bench`` chooses as a recipe does, and absent GPUs are refused; ``reevaluate``
    takes the recipe's.
    """
    model, tasks = done / "model", ["--tasks", "llmprune_agreement", "--include-path", str(TASKS), "--limit", "2"]
    for devices, said in (("3", "3 GPUs asked"), ("0,2", "GPUs 0, 2 asked"), ("[1]", "GPU 1 asked")):
        refused = command("eval", model, *tasks, "--devices", devices)
        assert (refused.code, f"devices: {said}, and torch sees no GPU" in refused.err) == (2, True), refused.err
    wrong = command("bench", model, "--against", workspace / "base", "--devices", "two")
    assert (wrong.code, "--devices 'two': give all, a number" in wrong.err) == (2, True), wrong.err
    again = copy_of(done, tmp_path)
    report = report_in(again)
    report["overrides"] = ["devices=2"]
    report["tasks"] = [
        {
            "task": "t",
            "metric": "acc",
            "dense": 1.0,
            "pruned": 1.0,
            "retention": 1.0,
            "samples": 2,
            "lost": 0,
            "gained": 0,
        }
    ]
    (again / "report.json").write_text(json.dumps(report))
    (again / "evaluation.json").write_text("{}")
    refused = command("reevaluate", again, "--limit", "4")
    assert (refused.code, "devices: 2 GPUs asked" in refused.err) == (2, True), refused.err


def test_bench_prints_and_writes(done: Path, workspace: Path, tmp_path: Path) -> None:
    """``bench`` says sizes, times and the estimate for what it is, and writes the same as JSON."""
    options = ["--batch-sizes", "1", "--contexts", "8", "--new-tokens", "4", "--repeats", "1"]
    output = tmp_path / "new" / "bench.json"
    outcome = command("bench", done / "model", "--against", workspace / "base", *options, "--output", output)
    assert outcome.code == 0, outcome.err
    for said in ("first token", "decode/s", "weights on disk", "(estimate)", "640 pJ"):
        assert said in outcome.out
    found = json.loads(output.read_text())
    assert found["model_size"]["disk"] == (done / "model" / "model.safetensors").stat().st_size
    assert found["model_size"]["joules"] < found["base_size"]["joules"]
    assert found["points"][0]["context"] == 8


def test_bench_says_what_two_models_need(done: Path, workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Models that do not fit in memory together are not loaded; the error states both sizes and what is free."""
    monkeypatch.setattr(model_memory, "free_memory", lambda: 100_000)
    forbid_weights(monkeypatch)
    refused = command("bench", done / "model", "--against", workspace / "base")
    assert refused.code == 2
    assert "in memory together" in refused.err
    assert "90 KB are free" in " ".join(refused.err.split())


def test_evaluation_has_a_gate_and_continues(
    done: Path, workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``eval --min-retention`` exits with 3 where the interval does not clear it; again, no weights are read."""
    options = [
        "--tasks",
        "llmprune_agreement",
        "--include-path",
        str(TASKS),
        "--limit",
        "4",
        "--output",
        tmp_path / "out",
    ]
    model = done / "model"
    arguments = ["eval", model, "--against", workspace / "base", *options]
    first = command(*arguments, "--min-retention", "0.99")
    assert first.code == 3, first.err
    assert "--limit" in first.err or "prune less" in first.err
    forbid_weights(monkeypatch)
    again = command(*arguments, "--min-retention", "0.01")
    assert again.code == 0, again.err
    same = command("eval", workspace / "base", "--against", workspace / "base", *options[:-2], "--min-retention", "1")
    assert same.code == 0, same.err
