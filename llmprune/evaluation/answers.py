"""Greedy answers of dense and pruned model to the same prompts, while each of the models is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmprune.common.errors import DeviceError
from llmprune.common.progress import report_progress
from llmprune.evaluation.generation import answer_prompts, compare_generation
from llmprune.evaluation.greedy_agreement import follow_answers
from llmprune.evaluation.lm_eval.harness import EvaluatedModel
from llmprune.evaluation.prompts import Prompts
from llmprune.recipe.evaluation import Evaluation
from llmprune.results.figures.evaluation import AnswerAgreement, GenerationFigures, GreedyAnswer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class GreedyAnswers:
    """Answers of both models, and the agreement of the pruned one along the dense one's.

    Where a device has no memory for them, answers that the recipe does not ask for are left out: ``left_out`` says why.
    """

    def __init__(self, evaluation: Evaluation, prompts: Prompts | None) -> None:
        self._settings, self._prompts = evaluation.generation, prompts
        self._required = evaluation.requires_generation
        self._by_side: dict[str, tuple[GreedyAnswer, ...]] = {}
        self.agreement: tuple[AnswerAgreement, ...] = ()
        self.left_out: tuple[str, ...] = ()

    def add(self, side: str, model: EvaluatedModel) -> None:
        """Have one model answer; the dense model comes first. Raises DeviceError if the recipe asks for answers."""
        try:
            self._add(side, model)
        except DeviceError as error:
            if self._required:
                raise
            self._prompts, self._by_side, self.agreement = None, {}, ()
            self.left_out = (f"the answers of both models were not compared: {error}",)

    def figures(self, tokenizer: PreTrainedTokenizerBase | None) -> GenerationFigures | None:
        """Compare the answers of both models; None where there are none."""
        if self._prompts is None or not self._by_side:
            return None
        dense, pruned = self._by_side["dense"], self._by_side["pruned"]
        return compare_generation(dense, pruned, prompts=self._prompts, tokenizer=tokenizer)

    def _add(self, side: str, model: EvaluatedModel) -> None:
        settings, prompts = self._settings, self._prompts
        if settings is None or prompts is None:
            return
        report_progress(f"free generation: {side}")
        self._by_side[side] = answer_prompts(model, side, prompts=prompts, settings=settings)
        if side == "pruned":
            self.agreement = follow_answers(
                model.whole.get(),
                prompts,
                answers=self._by_side["dense"],
                batch_size=settings.batch_size,
                reductions=model.whole.reductions,
            )
