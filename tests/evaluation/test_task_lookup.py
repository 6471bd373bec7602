"""Lookup of lm-eval tasks before a run: unknown names, unreachable data, bars and metrics that do not fit."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from shutil import copytree
from typing import TYPE_CHECKING, Any

import pytest
from helpers.lm_eval_tasks import AGREEMENT, CHOICE, TASKS, evaluated, tiny_llama, write_tasks
from helpers.tiny import tiny_tokenizer

from llmprune.common.errors import EvaluationError, RecipeError
from llmprune.evaluation.lm_eval.tasks import check_tasks, fetch_tasks
from llmprune.evaluation.lm_eval.tokenizers import require_same_tokenizer
from llmprune.recipe.evaluation import Evaluation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def test_known_tasks_pass() -> None:
    """A task of the include folder and lm-eval's own tasks, groups and tags are known, quickly."""
    check_tasks(AGREEMENT)
    check_tasks(Evaluation(tasks=("llmprune_agreement", "arc_easy", "mmlu", "ai2_arc"), include_path=TASKS))


@pytest.mark.usefixtures("small_index")
def test_unknown_task_names_the_nearest(tmp_path: Path) -> None:
    """Every misspelt task is named with its nearest valid name, before anything runs."""
    copytree(TASKS, tmp_path / "tasks")
    with pytest.raises(RecipeError) as caught:
        check_tasks(Evaluation(tasks=("llmprune_agrement", "nonsense"), include_path=str(tmp_path / "tasks")))
    assert len(caught.value.problems) == 2
    assert "'llmprune_agrement'; did you mean 'llmprune_agreement'?" in caught.value.problems[0]


def test_missing_include_path() -> None:
    """An include folder that does not exist is named, even without tasks."""
    with pytest.raises(RecipeError, match=r"include_path: .*nowhere is not a folder"):
        check_tasks(Evaluation(include_path="nowhere"))


def test_unreachable_data(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """The error names the data, its task and the settings to check."""
    (tmp_path / "gone.yaml").write_text(
        "task: gone\ndataset_path: json\ndataset_kwargs: {data_files: /nowhere/gone.jsonl}\n"
        "test_split: train\noutput_type: multiple_choice\n"
        "doc_to_text: x\ndoc_to_target: 0\ndoc_to_choice: [a, b]\n"
    )
    with pytest.raises(EvaluationError, match=r"'gone' or its data \(json\) .*gone\.jsonl.*HF_ENDPOINT"):
        evaluated(tiny_llama(layers=1), tokenizer, Evaluation(tasks=("gone",), include_path=str(tmp_path)))


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"metrics": {"one": "acc_nrom"}}, "did you mean 'acc_norm'"),
        ({"metrics": {"other": "acc"}}, "'other' is not an evaluated task"),
        ({"metrics": {"one": "acc,strict"}}, "no filter 'strict'"),
        ({"gate": {"min_retention": 0.9, "per_task": {"on": 0.9}}}, "'on' is not evaluated; did you mean 'one'"),
    ],
)
def test_names_that_the_tasks_do_not_have(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, section: dict[str, Any], said: str
) -> None:
    """A metric, filter or task of the gate that does not exist is refused with the nearest name."""
    tasks = write_tasks(tmp_path / "tasks", one=CHOICE)
    evaluation = Evaluation.model_validate({"tasks": ("one",), "include_path": str(tasks), **section})
    with pytest.raises(RecipeError, match=said):
        evaluated(tiny_llama(layers=1), tokenizer, evaluation)


@pytest.mark.usefixtures("small_index")
def test_a_bar_for_a_group_without_a_common_score_is_refused_before_the_run(tmp_path: Path) -> None:
    """A group whose tasks have different metrics, and a tag, are refused when tasks are loaded; one metric is not."""
    tasks = write_tasks(tmp_path / "tasks", one=CHOICE, two=CHOICE + "tag: both_by_tag\n")
    (tasks / "both.yaml").write_text("group: both\ntask: [one, two]\n")

    def fetch(bar: str, **metrics: str) -> None:
        gate = {"min_retention": 0.9, "per_task": {bar: 0.9}}
        names = ("both_by_tag",) if bar == "both_by_tag" else ("both",)
        given = {"tasks": names, "include_path": str(tasks), "metrics": metrics, "gate": gate}
        fetch_tasks(Evaluation.model_validate(given))

    fetch("both")
    with pytest.raises(RecipeError, match=r"'both' have different metrics \(one by acc, two by acc_norm\)"):
        fetch("both", two="acc_norm")
    fetch("both", one="acc_norm", two="acc_norm")
    with pytest.raises(RecipeError, match="'both_by_tag' has no score of its own; name single tasks, such as two"):
        fetch("both_by_tag")


def test_tokenizers_that_differ(tokenizer: PreTrainedTokenizerFast) -> None:
    """Another vocabulary or end token is named in the error; a copy is equal."""

    require_same_tokenizer("a", tokenizer, model="b", other=deepcopy(tokenizer))
    with pytest.raises(EvaluationError, match="the tokenizers of a and b differ: 13 tokens and 257"):
        require_same_tokenizer("a", tokenizer, model="b", other=tiny_tokenizer())
    other = deepcopy(tokenizer)
    other.eos_token = "the"
    with pytest.raises(EvaluationError, match="eos_token_id is 1 and 6"):
        require_same_tokenizer("a", tokenizer, model="b", other=other)
