"""The evaluation room: lm-eval on models in memory, retention, the gate, generation speed."""

from __future__ import annotations

import logging
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from llmprune.errors import EvaluationError, RecipeError
from llmprune.evaluation.harness import in_memory, run_tasks
from llmprune.evaluation.results import TaskResults
from llmprune.evaluation.section import Evaluation, Speed
from llmprune.evaluation.speed import compare_speed
from llmprune.evaluation.tasks import check_tasks

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

TASKS = str(Path(__file__).parents[1] / "eval" / "tasks")
AGREEMENT = Evaluation(tasks=("llmprune_agreement",), include_path=TASKS, limit=8)


def asked(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, evaluation: Evaluation) -> TaskResults:
    """The results of a model in memory."""
    return run_tasks(lambda: in_memory(model, tokenizer, evaluation.batch_size), evaluation)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer over the words of the agreement task's first documents, without a pad token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = (
        "[UNK]",
        "</s>",
        "The",
        "key",
        "keys",
        "near",
        "the",
        "cabinet",
        "cabinets",
        "is",
        "are",
        "was",
        "were",
    )
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="</s>")


def tiny_llama(layers: int, seed: int = 0) -> LlamaForCausalLM:
    """A random Llama small enough to run in milliseconds."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config).eval()


def test_import_is_cheap() -> None:
    """Importing the room imports neither torch nor transformers nor lm-eval."""
    code = (
        "import sys; from llmprune.evaluation import gate, harness, retention, speed, store, tasks;"
        "sys.exit(' '.join({'torch', 'transformers', 'lm_eval', 'datasets', 'scipy'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_known_tasks_pass() -> None:
    """A task of the include folder and lm-eval's own tasks, groups and tags are known, quickly."""
    check_tasks(AGREEMENT)
    check_tasks(Evaluation(tasks=("llmprune_agreement", "arc_easy", "mmlu", "ai2_arc"), include_path=TASKS))


def test_unknown_task_names_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every misspelt task is named with its nearest valid name, before anything runs."""
    from llmprune.evaluation import tasks

    own = tasks._manager(Path(TASKS))  # lm-eval's full index takes 13 s
    monkeypatch.setattr(tasks, "_all_tasks", lambda folder: own)
    with pytest.raises(RecipeError) as caught:
        check_tasks(Evaluation(tasks=("llmprune_agrement", "nonsense"), include_path=TASKS))
    assert len(caught.value.problems) == 2
    assert "'llmprune_agrement'; did you mean 'llmprune_agreement'?" in caught.value.problems[0]


def test_missing_include_path() -> None:
    """An include folder that does not exist is named, even without tasks."""
    with pytest.raises(RecipeError, match=r"include_path: .*nowhere is not a folder"):
        check_tasks(Evaluation(include_path="nowhere"))


def test_run_tasks_is_deterministic_and_quiet(
    tokenizer: PreTrainedTokenizerFast, capfd: pytest.CaptureFixture[str]
) -> None:
    """Two runs give the same value sample by sample, print nothing and leave the tokenizer as it was."""
    model = tiny_llama(layers=2)
    first, second = (asked(model, tokenizer, AGREEMENT) for _ in range(2))
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


def test_offloaded_model_is_used_where_it_lies(tokenizer: PreTrainedTokenizerFast) -> None:
    """A model whose weights accelerate brings in layer by layer gives the same results."""
    import torch
    from accelerate import cpu_offload

    model = tiny_llama(layers=2)
    resident = asked(model, tokenizer, AGREEMENT)
    offloaded = cpu_offload(model, execution_device=torch.device("cpu"))
    assert offloaded.device.type == "meta"
    assert asked(offloaded, tokenizer, AGREEMENT) == resident
    assert compare_speed(offloaded, offloaded, Speed(prompt_tokens=4, new_tokens=2, repeats=1)).ratio > 0


def test_ignored_fewshot_is_said(tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture) -> None:
    """A task that is defined without examples ignores num_fewshot, and says so."""
    with caplog.at_level(logging.WARNING, logger="llmprune"):
        asked(tiny_llama(layers=1), tokenizer, AGREEMENT.model_copy(update={"num_fewshot": 2}))
    assert "num_fewshot 2 does not apply" in caplog.text


def test_primary_metric_is_the_first_listed(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Each task gives its first listed metric, with its direction."""
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
    choice, rolling = asked(tiny_llama(layers=1), tokenizer, evaluation).tasks
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


def test_unreachable_data(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Data that cannot be read is named with its task and with what to set."""
    (tmp_path / "gone.yaml").write_text(
        "task: gone\ndataset_path: json\ndataset_kwargs: {data_files: /nowhere/gone.jsonl}\n"
        "test_split: train\noutput_type: multiple_choice\n"
        "doc_to_text: x\ndoc_to_target: 0\ndoc_to_choice: [a, b]\n"
    )
    with pytest.raises(EvaluationError, match=r"'gone' or its data \(json\) .*gone\.jsonl.*HF_ENDPOINT"):
        asked(tiny_llama(layers=1), tokenizer, Evaluation(tasks=("gone",), include_path=str(tmp_path)))


def test_speed_is_measured_pair_by_pair(capfd: pytest.CaptureFixture[str]) -> None:
    """A model of many layers is slower than one of few; generation settings stay, nothing is printed."""
    dense, pruned = tiny_llama(layers=12), tiny_llama(layers=1)
    dense.generation_config.temperature, dense.generation_config.do_sample = 0.3, True
    before = deepcopy(dense.generation_config)
    figures = compare_speed(dense, pruned, Speed(batch_size=2, prompt_tokens=8, new_tokens=8, repeats=3))
    assert figures.ratio > 1
    assert figures.ratio_low <= figures.ratio <= figures.ratio_high
    assert (figures.repeats, figures.new_tokens) == (3, 8)
    assert figures.device.startswith("CPU")
    assert dense.generation_config == before
    assert capfd.readouterr() == ("", "")


def test_speed_needs_positions() -> None:
    """Prompt and new tokens that exceed the model's positions are refused with the limit."""
    model = tiny_llama(layers=1)
    with pytest.raises(RecipeError, match="exceed the model's 64 positions"):
        compare_speed(model, model, Speed(prompt_tokens=60, new_tokens=8))
