"""lm-eval tasks on models in memory: determinism, metrics, few-shot examples, devices."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from helpers.lm_eval_tasks import AGREEMENT, CHOICE, TASKS, WRITTEN, evaluated, tiny_llama, write_tasks
from helpers.whole_models import timed

from llmprune.recipe.evaluation import Evaluation, Speed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def test_import_is_cheap() -> None:
    """Importing the package imports neither torch nor transformers nor lm-eval."""
    code = (
        "import sys; from llmprune.evaluation import gate, retention;"
        "from llmprune.evaluation.bench import generation_speed;"
        "from llmprune.evaluation.lm_eval import harness, store, tasks;"
        "sys.exit(' '.join({'torch', 'transformers', 'lm_eval', 'datasets', 'scipy'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_run_tasks_is_deterministic_and_quiet(
    tokenizer: PreTrainedTokenizerFast, capfd: pytest.CaptureFixture[str]
) -> None:
    """Two runs give the same value sample by sample, print nothing and leave the tokenizer as it was."""
    model = tiny_llama(layers=2)
    first, second = (evaluated(model, tokenizer, AGREEMENT) for _ in range(2))
    assert first == second
    (task,) = first.tasks
    assert (task.task, task.metric, task.higher_is_better, len(task.samples)) == (
        "llmprune_agreement",
        "acc",
        True,
        8,
    )
    assert task.value == sum(sample.value or 0.0 for sample in task.samples) / 8
    assert tokenizer.pad_token is None
    assert capfd.readouterr() == ("", "")


def test_an_offloaded_model_gives_the_same_results(tokenizer: PreTrainedTokenizerFast) -> None:
    """A model whose weights accelerate loads layer by layer can be evaluated and timed."""
    import torch
    from accelerate import cpu_offload

    model = tiny_llama(layers=2)
    resident = evaluated(model, tokenizer, AGREEMENT)
    offloaded = cpu_offload(model, execution_device=torch.device("cpu"))
    assert offloaded.device.type == "meta"
    assert evaluated(offloaded, tokenizer, AGREEMENT) == resident
    assert timed(offloaded, offloaded, Speed(prompt_tokens=4, new_tokens=2, repeats=1)).ratio > 0


def test_ignored_fewshot_is_a_warning(tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture) -> None:
    """A task that is defined without examples ignores num_fewshot with a warning."""
    with caplog.at_level(logging.WARNING, logger="llmprune"):
        evaluated(tiny_llama(layers=1), tokenizer, AGREEMENT.model_copy(update={"num_fewshot": 2}))
    assert "num_fewshot 2 does not apply" in caplog.text


def test_primary_metric_is_the_first_listed(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """The result has the first metric of the task's list, with its direction."""
    (tmp_path / "data.py").write_text(
        "from datasets import Dataset\n"
        "def rows(**_):\n"
        "    return {'test': Dataset.from_list([{'text': 'The key is', 'n': n} for n in range(3)])}\n"
    )
    common = "custom_dataset: !function data.rows\ntest_split: test\n"
    (tmp_path / "choice.yaml").write_text(
        f"task: choice\n{common}output_type: multiple_choice\n"
        'doc_to_text: "{{text}}"\ndoc_to_target: 0\ndoc_to_choice: [near, key]\n'
        "metric_list: [{metric: acc_norm}, {metric: acc}]\n"
    )
    (tmp_path / "rolling.yaml").write_text(
        f"task: rolling\n{common}output_type: loglikelihood_rolling\n"
        'doc_to_text: ""\ndoc_to_target: "{{text}}"\nmetric_list: [{metric: word_perplexity}]\n'
    )
    evaluation = Evaluation(tasks=("choice", "rolling"), include_path=str(tmp_path))
    choice, rolling = evaluated(tiny_llama(layers=1), tokenizer, evaluation).tasks
    assert (choice.metric, choice.higher_is_better, len(choice.samples)) == ("acc_norm", True, 3)
    assert (rolling.metric, rolling.higher_is_better) == ("word_perplexity", False)
    assert rolling.value > 1
    assert {sample.value for sample in rolling.samples} == {None}


def test_agreement_documents_are_balanced(tokenizer: PreTrainedTokenizerFast) -> None:
    """200 different documents, and a model that always prefers one side gets half of them."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=TASKS, include_defaults=False)
    documents = list(manager.load(["llmprune_agreement"])["tasks"]["llmprune_agreement"].test_docs())
    assert len({(document["subject"], *sorted(document["verbs"])) for document in documents}) == 200
    assert sum(document["correct"] for document in documents) == 100
    singular = ("is", "was", "has", "seems", "looks")
    assert sum(document["verbs"][document["correct"]] in singular for document in documents) == 100


def test_groups_metrics_and_answers(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Results name their group, have the chosen metric and filter, and keep generated texts."""
    tasks = write_tasks(tmp_path / "tasks", one=CHOICE, two=CHOICE, written=WRITTEN)
    (tasks / "both.yaml").write_text("group: both\ntask: [one, two]\n")
    evaluation = Evaluation(
        tasks=("both", "written"),
        include_path=str(tasks),
        metrics={"two": "acc_norm", "written": "exact_match,loose"},
    )
    one, two, written = evaluated(tiny_llama(layers=1), tokenizer, evaluation).tasks
    assert [(task.task, task.group) for task in (one, two, written)] == [
        ("one", "both"), ("two", "both"), ("written", None),
    ]  # fmt: skip
    assert (one.metric, two.metric, written.metric, written.filter) == ("acc", "acc_norm", "exact_match", "loose")
    assert one.values.keys() == {"acc,none", "acc_norm,none"}
    assert [answer.prompt for answer in written.answers] == ["The key is"] * 3
    assert one.documents == 3
