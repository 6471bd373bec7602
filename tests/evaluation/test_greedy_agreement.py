"""Greedy agreement: counts along the dense model's answers, prompts, intervals, stored answers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from helpers.random_inputs import windows
from helpers.shaped_tokenizers import shaped_tokenizer
from helpers.tiny import tiny_tokenizer
from helpers.whole_models import side_by_side

from llmprune.common.errors import DeviceError, RecipeError
from llmprune.data.begin_of_text import begin_tokens
from llmprune.evaluation.answers import GreedyAnswers
from llmprune.evaluation.generation import answer_prompts, continue_prompts
from llmprune.evaluation.greedy_agreement import estimate_agreement, follow_answers
from llmprune.evaluation.lm_eval.harness import EvaluatedModel
from llmprune.evaluation.lm_eval.store import ResultStore
from llmprune.evaluation.prompts import ModelLimits, Prompts, make_prompts
from llmprune.evaluation.whole_model import WholeModel
from llmprune.recipe.evaluation import Evaluation, Generation
from llmprune.recipe.model import ModelSource
from llmprune.results.figures.evaluation import AnswerAgreement
from llmprune.testing import tiny_model

PROMPTS = Prompts(ids=((5, 6, 7), (8,), (9, 10, 11, 12, 13), (14, 15)), new_tokens=12, source="here")
LIMITS = ModelLimits(positions=512, vocabulary=260)
TEMPLATE = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}<answer>"


@dataclass
class Loads:
    """Number of times that a model was loaded."""

    count: int = 0


def test_a_model_agrees_with_itself() -> None:
    """Equal models agree on every token of every answer; the interval includes 1."""
    model = tiny_model("llama", vocab_size=260)
    settings = Generation(samples=5, new_tokens=8)
    figures = side_by_side(model, model, tokenizer=tiny_tokenizer(), windows_NL=None, settings=settings)
    found = figures.agreement
    assert found is not None
    assert (found.share, found.whole, found.interval.high, found.samples) == (1.0, 1.0, 1.0, 5)
    assert 0.5 < found.interval.low < 1
    assert found.first_mean == found.tokens / 5


@pytest.mark.parametrize("evaluation", [Evaluation(), Evaluation(generation=Generation())])
def test_answers_by_default_do_not_end_a_run(evaluation: Evaluation, tmp_path: Path) -> None:
    """Where a device has no memory for one they are left out with the reason, unless the recipe asks for them."""
    model = tiny_model("llama", vocab_size=260)

    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has no more.")

    model.forward = full
    subject = EvaluatedModel(
        ModelSource(id="here"), None, "here", ResultStore(tmp_path, "model"), WholeModel(lambda: model)
    )
    answers = GreedyAnswers(evaluation, PROMPTS)
    if evaluation.requires_generation:
        with pytest.raises(DeviceError, match="free generation of the dense model, a single prompt at a time"):
            answers.add("dense", subject)
        return
    answers.add("dense", subject)
    answers.add("pruned", subject)
    assert answers.figures(tiny_tokenizer()) is None
    assert "a single prompt at a time" in answers.left_out[0]


def test_counts_are_those_of_reading_token_by_token() -> None:
    """In batches of padded texts the counts equal those of each text alone, one token after the other."""
    dense, pruned = (tiny_model("llama", vocab_size=64, seed=seed) for seed in (0, 1))
    with torch.no_grad():  # near the dense model, so that some tokens agree
        for own, other in zip(pruned.parameters(), dense.parameters(), strict=True):
            own.copy_(other + 0.3 * (own - other))
    answers = continue_prompts(dense, PROMPTS, batch_size=3, side="dense", reductions=[])
    found = follow_answers(pruned, PROMPTS, answers=answers, batch_size=3, reductions=[])
    for prompt, answer, count in zip(PROMPTS.ids, answers, found, strict=True):
        text, same = list(prompt), []
        for token in answer.written:
            with torch.no_grad():
                same.append(int(pruned(torch.tensor([text])).logits[0, -1].argmax()) == token)
            text.append(token)
        first = same.index(False) if False in same else len(same)
        assert count == AnswerAgreement(same=sum(same), tokens=len(same), first=first)
    assert 0 < sum(count.same for count in found) < sum(count.tokens for count in found)


def test_logits_of_prompts_are_not_computed() -> None:
    """The head sees the answers, and of the prompts only what a batch of different lengths needs."""
    model = tiny_model("llama", vocab_size=64)
    prompts = Prompts(ids=(tuple(range(1, 31)), tuple(range(1, 29))), new_tokens=8, source="here")
    answers = continue_prompts(model, prompts, batch_size=2, side="dense", reductions=[])
    seen: list[int] = []
    model.get_output_embeddings().register_forward_hook(lambda _, __, logits: seen.append(logits.shape[1]))
    follow_answers(model, prompts, answers=answers, batch_size=2, reductions=[])
    assert seen == [8 + 30 - 28]


def test_prompts_of_different_lengths_are_answered_as_each_alone() -> None:
    """Padding before shorter prompts changes no answer."""
    model = tiny_model("llama", vocab_size=64)
    together = continue_prompts(model, PROMPTS, batch_size=4, side="dense", reductions=[])
    assert together == continue_prompts(model, PROMPTS, batch_size=1, side="dense", reductions=[])


def test_the_end_token_counts() -> None:
    """An answer that ends at once is one token, which the pruned model can miss."""
    silent, other = tiny_model("llama", vocab_size=64), tiny_model("llama", vocab_size=64, seed=1)
    silent.generation_config.eos_token_id = list(range(64))
    answers = continue_prompts(silent, PROMPTS, batch_size=4, side="dense", reductions=[])
    assert all(answer.ids == () and answer.end is not None for answer in answers)
    counts = follow_answers(other, PROMPTS, answers=answers, batch_size=4, reductions=[])
    assert [count.tokens for count in counts] == [1] * 4


def test_intervals_are_those_of_prompts() -> None:
    """Answers that agree or differ as a whole give a wide interval, however many tokens they have."""
    mixed = [AnswerAgreement(same=32, tokens=64, first=1)] * 16
    split = [AnswerAgreement(same=same, tokens=64, first=same) for same in (0, 64) * 8]
    narrow, wide = (estimate_agreement(counts, confidence=0.95) for counts in (mixed, split))
    assert narrow is not None
    assert wide is not None
    assert narrow.share == wide.share == 0.5
    assert wide.interval.high - wide.interval.low > 3 * (narrow.interval.high - narrow.interval.low)
    assert math.isclose(wide.interval.high - wide.interval.low, 2 * 1.96 * 0.5 / 4, rel_tol=0.15)
    assert (wide.first_mean, wide.whole) == (32.0, 0.5)
    assert estimate_agreement([], confidence=0.95) is None


def test_dense_answers_are_kept(tmp_path: Path) -> None:
    """The answers to the same prompts are read again without the model; other prompts are answered anew."""
    loads, settings = Loads(), Generation(samples=4)

    def load() -> object:
        loads.count += 1
        return tiny_model("llama", vocab_size=64)

    def subject() -> EvaluatedModel:
        store = ResultStore(tmp_path, "model", shared=True)
        return EvaluatedModel(ModelSource(id="here"), None, "here", store, WholeModel(load))  # type: ignore[arg-type]

    first = answer_prompts(subject(), "dense", prompts=PROMPTS, settings=settings)
    assert answer_prompts(subject(), "dense", prompts=PROMPTS, settings=settings) == first
    assert loads.count == 1
    shorter = Prompts(PROMPTS.ids, 8, "here")
    assert answer_prompts(subject(), "dense", prompts=shorter, settings=settings) != first
    assert loads.count == 2


def test_questions_go_through_the_chat_template() -> None:
    """A tokenizer with a chat template gets questions in it, even where there is held-out text."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    long_NL = torch.zeros(40, 96, dtype=torch.int64)
    found = make_prompts(Generation(samples=3), tokenizer, held_out_NL=long_NL, limits=LIMITS)
    assert found.source == "questions in the chat template"
    written = tokenizer.decode(list(found.ids[0]))
    assert written.startswith("<user>A shop sells pens")
    assert written.endswith("<answer>")
    held_out = make_prompts(Generation(samples=3, prompts="held_out"), tokenizer, held_out_NL=long_NL, limits=LIMITS)
    assert held_out.source == "held-out text"


@pytest.mark.parametrize("template", [None, TEMPLATE, "{{ bos_token }}" + TEMPLATE])
def test_questions_begin_once_as_the_recipe_says(template: str | None) -> None:
    """The tokenizer's ids, or those that the recipe asks for, stand once in front of each question or not at all.

    It makes no difference whether the chat template writes them.
    """
    tokenizer = shaped_tokenizer("llama3")
    tokenizer.chat_template = template
    begin, limits = begin_tokens(tokenizer), ModelLimits(2048, len(tokenizer))

    def ids_of(wanted: tuple[int, ...] | None) -> tuple[tuple[int, ...], ...]:
        return make_prompts(Generation(samples=3), tokenizer, held_out_NL=None, limits=limits, begin=wanted).ids

    assert ids_of(None) == ids_of(begin)
    assert [ids.count(begin[0]) for ids in ids_of(())] == [0, 0, 0]
    assert ids_of(begin) == tuple(begin + ids for ids in ids_of(()))


def test_text_that_is_too_short_gives_way_to_questions() -> None:
    """Without a chat template held-out text is continued where it suffices, else questions are answered."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    short = make_prompts(Generation(samples=2), tokenizer, held_out_NL=windows(), limits=LIMITS)
    assert short.source == "questions"
    assert short.text is None
    enough = make_prompts(
        Generation(samples=2, prompt_tokens=8, new_tokens=8), tokenizer, held_out_NL=windows(), limits=LIMITS
    )
    assert enough.source == "held-out text"
    assert enough.ids == tuple(tuple(row) for row in windows()[:2, :8].tolist())


def test_prompts_fit_the_positions() -> None:
    """Prompt and answer together are no longer than the model's positions."""
    limits = ModelLimits(positions=48, vocabulary=260)
    found = make_prompts(Generation(), tiny_tokenizer(), held_out_NL=None, limits=limits)
    assert found.new_tokens + max(map(len, found.ids)) == 48


@pytest.mark.parametrize(
    ("settings", "limits", "said"),
    [
        (Generation(samples=65), LIMITS, "there are 64 questions"),
        (Generation(), ModelLimits(512, 100), "the model knows 0 to 99"),
    ],
)
def test_impossible_prompts(settings: Generation, limits: ModelLimits, said: str) -> None:
    """More prompts than questions, and a tokenizer of another model, are refused with the limit."""
    with pytest.raises(RecipeError, match=said):
        make_prompts(settings, tiny_tokenizer(), held_out_NL=None, limits=limits)


def test_a_broken_chat_template_is_named() -> None:
    """A template that refuses a question ends the run before the work, with the remedy."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('only tools') }}"
    with pytest.raises(RecipeError, match=r"cannot write a question \(only tools\); set generation.prompts"):
        make_prompts(Generation(), tokenizer, held_out_NL=None, limits=LIMITS)
    tokenizer.chat_template = "{# nothing #}"
    with pytest.raises(RecipeError, match="makes nothing of a question"):
        make_prompts(Generation(), tokenizer, held_out_NL=None, limits=LIMITS)
    with pytest.raises(RecipeError, match="has no tokenizer"):
        make_prompts(Generation(), None, held_out_NL=None, limits=LIMITS)
