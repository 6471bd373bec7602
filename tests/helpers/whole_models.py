"""Free generation and timing of models in memory, and lm-eval's interface to them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmprune.evaluation.bench.generation_speed import compare_speed
from llmprune.evaluation.whole_model import WholeModel

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from llmprune.recipe.evaluation import Generation, Speed
    from llmprune.results.evaluation_figures import GenerationFigures, SpeedFigures


def timed(dense: PreTrainedModel, pruned: PreTrainedModel, settings: Speed, *, together: bool = True) -> SpeedFigures:
    """Time two models in memory."""
    return compare_speed(WholeModel(lambda: dense), WholeModel(lambda: pruned), settings=settings, together=together)


def side_by_side(
    dense: PreTrainedModel,
    pruned: PreTrainedModel,
    *,
    tokenizer: PreTrainedTokenizerBase,
    windows_NL: Tensor,
    settings: Generation,
) -> GenerationFigures:
    """Continue windows with two models in memory."""
    from llmprune.evaluation.generation import Continuations, compare_generation, continue_windows

    both = Continuations(
        *(continue_windows(model, windows_NL, settings=settings, side="", reductions=[]) for model in (dense, pruned))
    )
    return compare_generation(both, windows_NL, tokenizer=tokenizer, settings=settings)


def lm_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> Any:
    """Return lm-eval's interface to a model in memory."""
    from llmprune.evaluation.lm_eval.model_in_memory import ModelInMemory

    return ModelInMemory(model, tokenizer, batch_size=batch_size, side="dense", reductions=[])
