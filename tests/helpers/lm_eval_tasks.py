"""Small lm-eval tasks, a tokenizer and a model to evaluate them with."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.whole_models import lm_of
from llmprune.evaluation.lm_eval.harness import run_tasks
from llmprune.evaluation.lm_eval.results import TaskResults
from llmprune.recipe.evaluation import Evaluation

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

TASKS = str(Path(__file__).parents[2] / "eval" / "tasks")
AGREEMENT = Evaluation(tasks=("llmprune_agreement",), include_path=TASKS, limit=8)
CHOICE = (
    'output_type: multiple_choice\ndoc_to_text: "{{text}}"\ndoc_to_target: 0\ndoc_to_choice: [near, key]\n'
    "metric_list: [{metric: acc}, {metric: acc_norm}]\n"
)

WRITTEN = (
    'output_type: generate_until\ndoc_to_text: "{{text}}"\ndoc_to_target: "near"\n'
    "generation_kwargs: {until: [x], max_gen_toks: 4, do_sample: false}\nmetric_list: [{metric: exact_match}]\n"
    "filter_list:\n"
    "- {name: strict, filter: [{function: take_first}]}\n- {name: loose, filter: [{function: take_first}]}\n"
)


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer over the words of the agreement task's first documents, without a pad token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["[UNK]", "</s>", "The", "key", "keys", "near", "the", "cabinet", "cabinets", "is", "are", "was", "were"]
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


def evaluated(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, evaluation: Evaluation) -> TaskResults:
    """Evaluate a model in memory."""
    return run_tasks(lambda: lm_of(model, tokenizer, evaluation.batch_size), evaluation)


def write_tasks(folder: Path, **tasks: str) -> Path:
    """Task files over three documents; the texts are added to what they have in common."""
    folder.mkdir(exist_ok=True)
    (folder / "data.py").write_text(
        "from datasets import Dataset\n"
        "def rows(**_):\n"
        "    return {'test': Dataset.from_list([{'text': 'The key is', 'n': n} for n in range(3)])}\n"
    )
    for name, text in tasks.items():
        (folder / f"{name}.yaml").write_text(
            f"task: {name}\ncustom_dataset: !function data.rows\ntest_split: test\n{text}"
        )
    return folder


class CountingLoader:
    """Loader of one model that counts loads and requests; ``fail_at``: call at which it is interrupted."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, fail_at: int | None = None) -> None:
        self.loads, self.calls, self.requests, self.fail_at = 0, 0, 0, fail_at
        self._tokenizer = tokenizer

    def __call__(self) -> Any:
        """Load the model."""
        self.loads += 1
        lm = lm_of(tiny_llama(layers=1), self._tokenizer, 2)
        original = lm.loglikelihood

        def counted(requests: Any, **more: Any) -> Any:
            self.calls += 1
            self.requests += len(requests)
            if self.calls == self.fail_at:
                raise KeyboardInterrupt
            return original(requests, **more)

        lm.loglikelihood = counted
        return lm
