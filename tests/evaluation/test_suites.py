"""Suites of tasks, their limits, and whether tasks let the models write."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.commands import TASKS
from pydantic import ValidationError

from llmprune.evaluation.lm_eval.generating_tasks import may_generate
from llmprune.evaluation.lm_eval.tasks import check_tasks
from llmprune.recipe.evaluation import Evaluation
from llmprune.recipe.suites import suites

OWN = {
    "choice.yaml": "task: own_choice\noutput_type: multiple_choice\ntag: own_tag\n",
    "writing.yaml": "task: own_writing\noutput_type: generate_until\n",
    "default.yaml": "task: own_default\n",
    "coded.yaml": "task: own_class\nclass: !function utils.Task\n",
    "group.yaml": "group: own_group\ntask: [own_choice, {group: inner, task: [own_choice]}]\n",
    "mixed.yaml": "group: own_mixed\ntask: [own_choice, {task: own_writing}]\n",
}


@pytest.mark.slow
def test_every_suite_exists_in_lm_eval() -> None:
    """lm-eval knows each name of each suite, and the general one has generating tasks."""
    for name in suites():
        evaluation = Evaluation(suite=name)
        check_tasks(evaluation)
        assert may_generate(evaluation)
        assert not may_generate(Evaluation(tasks=("arc_easy", "mmlu")))


def test_limits_of_a_suite() -> None:
    """A suite's limits hold for its tasks alone; the recipe's limit replaces them."""
    evaluation = Evaluation(suite="general", tasks=("blimp", "gsm8k"))
    assert evaluation.task_names == (*suites()["general"], "blimp")
    assert evaluation.limit_of("gsm8k") == suites()["general"]["gsm8k"]
    assert evaluation.limit_of("blimp") is None
    assert Evaluation(suite="general").limits == suites()["general"]
    assert {Evaluation(suite="general", limit=7).limit_of(name) for name in suites()["general"]} == {7}
    some = Evaluation(suite="general", tasks=("blimp",), limit={"mmlu": 40, "blimp": 9})
    assert some.limits == suites()["general"] | {"mmlu": 40, "blimp": 9}
    with pytest.raises(ValidationError, match="limit names pig, which the recipe does not evaluate; it evaluates: cow"):
        Evaluation(tasks=("cow",), limit={"pig": 4})


def test_an_unknown_suite_is_refused() -> None:
    """The message names a similar suite."""
    with pytest.raises(ValidationError, match="there is no suite 'genral'; did you mean 'general'"):
        Evaluation(suite="genral")


@pytest.mark.parametrize(
    ("task", "generates"),
    [
        ("own_choice", False),
        ("own_tag", False),
        ("own_group", False),
        ("own_writing", True),
        ("own_default", True),
        ("own_class", True),
        ("own_mixed", True),
        ("own_missing", True),
    ],
)
def test_generating_tasks_are_known_from_their_files(tmp_path: Path, task: str, generates: bool) -> None:
    """Tasks, tags and groups of choices only do not generate; what cannot be known may generate."""
    for name, text in OWN.items():
        (tmp_path / name).write_text(text)
    assert may_generate(Evaluation(tasks=(task,), include_path=str(tmp_path))) is generates


def test_the_projects_own_task_is_a_choice() -> None:
    """The smoke test of subject and verb does not generate."""
    assert not may_generate(Evaluation(tasks=("llmprune_agreement",), include_path=str(TASKS)))
