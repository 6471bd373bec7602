"""Stored results: continued evaluations, further samples, and results that must not be reused."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from helpers.lm_eval_tasks import AGREEMENT, CHOICE, CountingLoader, write_tasks
from helpers.task_results import result

from llmprune.common.errors import RecipeError
from llmprune.evaluation.lm_eval.harness import run_tasks
from llmprune.evaluation.lm_eval.store import ResultStore
from llmprune.evaluation.more_samples import next_limit
from llmprune.recipe.evaluation import Evaluation, limit_override
from llmprune.recipe.overrides import apply_override
from llmprune.results.figures.evaluation import BarFigures, GateFigures

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def test_interrupted_evaluation_continues(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Tasks finished before the interruption are not evaluated again, and a finished evaluation loads no model."""
    tasks = write_tasks(tmp_path / "tasks", one=CHOICE, two=CHOICE)
    evaluation = Evaluation(tasks=("one", "two"), include_path=str(tasks))
    store = ResultStore(tmp_path / "store", "model")
    with pytest.raises(KeyboardInterrupt):
        run_tasks(CountingLoader(tokenizer, fail_at=2), evaluation, store=store)
    second = CountingLoader(tokenizer)
    results = run_tasks(second, evaluation, store=store)
    assert second.calls == 1
    third = CountingLoader(tokenizer)
    assert run_tasks(third, evaluation, store=store) == results == run_tasks(CountingLoader(tokenizer), evaluation)
    assert third.loads == 0


def test_more_samples_continue_after_the_earlier_ones(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Only further documents are evaluated, and the result equals that of all at once; then none is left."""
    whole = AGREEMENT.model_copy(update={"limit": 24})
    store = ResultStore(tmp_path / "store", "model")
    first = run_tasks(CountingLoader(tokenizer), AGREEMENT, store=store).tasks[0]
    further = CountingLoader(tokenizer)
    continued = run_tasks(further, whole, store=store, earlier=AGREEMENT)
    assert continued == run_tasks(CountingLoader(tokenizer), whole)
    assert continued.tasks[0].samples[:8] == first.samples
    assert further.requests == 2 * (24 - 8)  # two choices of each document
    assert run_tasks(CountingLoader(tokenizer), whole, store=store) == continued


@pytest.mark.parametrize(
    "text",
    [
        CHOICE + "num_fewshot: 1\nfewshot_split: test\n",
        CHOICE.replace("[{metric: acc}, {metric: acc_norm}]", "[{metric: mcc}]"),
    ],
)
def test_tasks_whose_samples_depend_on_each_other_are_evaluated_again(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, text: str
) -> None:
    """Drawn examples and a metric that is not a mean: all documents are evaluated again."""
    tasks = write_tasks(tmp_path / "tasks", one=text)
    short, long = (Evaluation(tasks=("one",), include_path=str(tasks), limit=limit) for limit in (2, 3))
    store = ResultStore(tmp_path / "store", "model")
    run_tasks(CountingLoader(tokenizer), short, store=store)
    again = CountingLoader(tokenizer)
    assert run_tasks(again, long, store=store, earlier=short) == run_tasks(CountingLoader(tokenizer), long)
    assert again.requests == 2 * 3


def test_how_many_samples_a_gate_needs() -> None:
    """The bar that needs most decides, up to the number of documents; useless numbers are refused."""
    bar = {"name": "mean", "minimum": 0.9, "measured": 0.95, "interval": None, "verdict": "not enough samples"}
    gate = GateFigures(
        min_retention=0.9,
        confidence=0.95,
        retention=0.95,
        passed=False,
        verdict="not enough samples",
        bars=tuple(BarFigures(**bar | {"samples": 100, "samples_needed": needed}) for needed in (250, 320)),
    )
    some = Evaluation(tasks=("a", "b"), limit=50)
    assert next_limit(gate, some, documents=[("a", 1000), ("b", None)], wanted=None) == 160
    assert next_limit(gate, some, documents=[("a", 120)], wanted=None) == 120
    assert next_limit(None, some, documents=[("a", 120)], wanted=80) == 80
    infeasible = gate.model_copy(update={"bars": (gate.bars[0].model_copy(update={"samples_needed": None}),)})
    for figures, limit, wanted, said in (
        (gate, None, 80, "every document"),
        (gate, 120, 200, "every document"),
        (gate, 50, 50, "give a larger number"),
        (None, 50, None, "does not need more samples"),
        (infeasible, 50, None, "no feasible number"),
    ):
        with pytest.raises(RecipeError, match=said):
            next_limit(figures, Evaluation(tasks=("a",), limit=limit), documents=[("a", 120)], wanted=wanted)


def test_limits_of_tasks_grow_in_proportion() -> None:
    """Each limit of its own grows by the gate's factor up to the task's documents; tasks without one stay whole."""
    before = Evaluation(tasks=("a", "b", "whole"), limit={"a": 400, "b": 20})
    bar = BarFigures(
        name="mean", minimum=0.9, measured=0.95, interval=None, verdict="not enough samples",
        samples=100, samples_needed=320,
    )  # fmt: skip
    gate = GateFigures(
        min_retention=0.9, confidence=0.95, retention=0.95, passed=False, verdict="not enough samples", bars=(bar,)
    )  # fmt: skip
    documents = [("a", 1000), ("b", 100), ("b", 300), ("whole", 50)]
    larger = next_limit(gate, before, documents=documents, wanted=None)
    assert larger == {"a": 1000, "b": 64}
    assert next_limit(None, before, documents=documents, wanted=200) == {"a": 400, "b": 200}
    again = before.model_copy(update={"limit": larger})
    assert next_limit(None, again, documents=documents, wanted=10**6) == {"a": 1000, "b": 300}
    with pytest.raises(RecipeError, match="20 samples per task are evaluated already"):
        next_limit(None, before, documents=documents, wanted=20)
    override = limit_override(larger)
    assert override == "evaluation.limit={a: 1000, b: 64}"
    data: dict[str, Any] = {}
    apply_override(data, override)
    assert data == {"evaluation": {"limit": larger}}


def test_results_of_another_model_setting_or_file_are_not_reused(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Another model, another limit, a changed task file, or a damaged file: the task is evaluated again."""
    tasks = write_tasks(tmp_path / "tasks", one=CHOICE)
    evaluation = Evaluation(tasks=("one",), include_path=str(tasks))

    def calls(evaluation: Evaluation = evaluation, identity: str = "model") -> int:
        loader = CountingLoader(tokenizer)
        run_tasks(loader, evaluation, store=ResultStore(tmp_path / "store", identity))
        return loader.calls

    assert (calls(), calls()) == (1, 0)
    assert (calls(identity="pruned"), calls(identity="pruned")) == (1, 0)
    assert calls(evaluation.model_copy(update={"limit": 2}), "pruned") == 1
    (tmp_path / "tasks" / "data.py").write_text((tmp_path / "tasks" / "data.py").read_text() + "\n# changed\n")
    assert (calls(), calls()) == (1, 0)
    (tmp_path / "store" / "one.json").write_text('{"fingerprint": ')
    assert (calls(), calls()) == (1, 0)
    assert "the task is evaluated again" in caplog.text


def test_a_shared_store_keeps_models_apart(tmp_path: Path) -> None:
    """The cache of base models stores results of several models."""

    stores = [ResultStore(tmp_path, identity, shared=True) for identity in ("a", "b")]
    for store, value in zip(stores, (1.0, 0.0), strict=True):
        store.put(result(value, task="group/task"), "settings")
    kept = [store.get("group/task", "settings") for store in stores]
    assert [found and found.value for found in kept] == [1.0, 0.0]
    assert stores[0].get("group/task", "other settings") is None


def test_a_store_that_cannot_be_written_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The evaluation continues without storing the result."""

    (tmp_path / "file").write_text("")
    ResultStore(tmp_path / "file", "a").put(result(1.0), "settings")
    assert "cannot be stored for reuse" in caplog.text
