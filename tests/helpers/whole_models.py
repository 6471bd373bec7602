"""Free generation and timing of models in memory, and lm-eval's interface to them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmprune.evaluation.bench.generation_speed import compare_speed
from llmprune.evaluation.whole_model import WholeModel

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from llmprune.recipe.evaluation import Generation, Speed
    from llmprune.results.figures.evaluation import GenerationFigures, SpeedFigures


def timed(dense: PreTrainedModel, pruned: PreTrainedModel, settings: Speed, *, together: bool = True) -> SpeedFigures:
    """Time two models in memory."""
    return compare_speed(WholeModel(lambda: dense), WholeModel(lambda: pruned), settings=settings, together=together)


def side_by_side(
    dense: PreTrainedModel,
    pruned: PreTrainedModel,
    *,
    tokenizer: PreTrainedTokenizerBase,
    windows_NL: Tensor | None,
    settings: Generation,
) -> GenerationFigures:
    """Answer prompts with two models in memory, and compare the answers."""
    from llmprune.evaluation.generation import compare_generation, continue_prompts
    from llmprune.evaluation.greedy_agreement import estimate_agreement, follow_answers
    from llmprune.evaluation.prompts import ModelLimits, make_prompts

    config, size = dense.config, settings.batch_size
    limits = ModelLimits(config.max_position_embeddings, config.vocab_size)
    prompts = make_prompts(settings, tokenizer, held_out_NL=windows_NL, limits=limits)
    answers, others = (
        continue_prompts(model, prompts, batch_size=size, side="", reductions=[]) for model in (dense, pruned)
    )
    counts = follow_answers(pruned, prompts, answers=answers, batch_size=size, reductions=[])
    figures = compare_generation(answers, others, prompts=prompts, tokenizer=tokenizer)
    return figures.model_copy(update={"agreement": estimate_agreement(counts, confidence=0.95)})


def lm_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> Any:
    """Return lm-eval's interface to a model in memory."""
    from llmprune.evaluation.lm_eval.model_in_memory import ModelInMemory

    return ModelInMemory(model, tokenizer, batch_size=batch_size, side="dense", reductions=[])
