"""Agreement of the pruned model with the dense model's own greedy answers.

The pruned model reads each prompt with the dense model's answer once (teacher forcing). Each token of the answer is
compared with the token that the pruned model ranks first at its place. Up to the first difference that is the text that
the pruned model would write itself.

Answers that a model computes in a lower precision than float32, token by token, can differ from its own teacher-forced
choices where two tokens are almost equally likely: agreement of 1 is then not reached even without a cut.

Shapes: B sequences of a batch, P positions from the end of the shortest prompt on, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING

from llmprune.common.devices import input_device
from llmprune.common.out_of_memory import BatchSize
from llmprune.evaluation.prompts import Ids, Prompts
from llmprune.evaluation.statistics import interval, mean_and_median_draws, share_draws
from llmprune.layerwise.layer_calls import takes_positions
from llmprune.results.figures.evaluation import AgreementFigures, AnswerAgreement, GreedyAnswer, Interval

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class _Sequence:
    """A prompt with its answer; ``start``: place of the answer's first token."""

    ids: Ids
    start: int


def follow_answers(
    model: PreTrainedModel,
    prompts: Prompts,
    *,
    answers: Sequence[GreedyAnswer],
    batch_size: int,
    reductions: list[str],
) -> tuple[AnswerAgreement, ...]:
    """Count along each of the dense model's answers where ``model`` ranks the same token first.

    ``reductions`` gets a sentence where a device runs out of memory and the batch is halved.
    """
    sequences = [
        _Sequence((*prompt, *answer.written), len(prompt)) for prompt, answer in zip(prompts.ids, answers, strict=True)
    ]

    def work(size: int) -> tuple[AnswerAgreement, ...]:
        batches = [sequences[start : start + size] for start in range(0, len(sequences), size)]
        return tuple(counted for batch in batches for counted in _follow(model, batch))

    batch = BatchSize(batch_size, "answers", alone=True, reductions=reductions)
    return batch.run("greedy agreement of the pruned model", work)


def estimate_agreement(counts: Sequence[AnswerAgreement], *, confidence: float) -> AgreementFigures | None:
    """Return the agreement over all answers with intervals, which are clustered by prompt; None without answers."""
    import numpy as np

    if not counts:
        return None
    same_N, tokens_N, first_N = (
        np.array([getattr(count, name) for count in counts], dtype=np.float64) for name in ("same", "tokens", "first")
    )
    mean_B, median_B = mean_and_median_draws(first_N, name="first difference")
    share, mean, median = float(same_N.sum() / tokens_N.sum()), float(first_N.mean()), float(np.median(first_N))

    def span(draws_B: np.ndarray, point: float) -> Interval:
        low, high = interval(draws_B, point, confidence=confidence)
        return Interval(low=low, high=high, confidence=confidence)

    return AgreementFigures(
        share=share,
        interval=span(share_draws(same_N, tokens_N, name="greedy agreement"), share),
        first_mean=mean,
        first_mean_interval=span(mean_B, mean),
        first_median=median,
        first_median_interval=span(median_B, median),
        whole=float((first_N == tokens_N).mean()),
        tokens=int(tokens_N.sum()),
        samples=len(counts),
    )


def _follow(model: PreTrainedModel, batch: Sequence[_Sequence]) -> list[AnswerAgreement]:
    """Return the counts of one batch. Padding comes last, where no token before it can attend to it.

    Logits are computed from the end of the shortest prompt on, if the model's forward can leave out the others: those
    of long prompts and a large vocabulary take gigabytes.
    """
    import torch

    length = max(len(sequence.ids) for sequence in batch) - 1
    rows = [[*sequence.ids[:-1], *[0] * (length + 1 - len(sequence.ids))] for sequence in batch]
    shortest = min(sequence.start for sequence in batch)
    positions = length + 1 - shortest
    kept = {"logits_to_keep": positions} if takes_positions(model) else {}
    with torch.no_grad():
        output = model(input_ids=torch.tensor(rows, device=input_device(model)), use_cache=False, **kept)
    first_BP = output.logits[:, -positions:].argmax(-1).tolist()
    return [
        _count(sequence.ids[sequence.start :], first[sequence.start - shortest :])
        for sequence, first in zip(batch, first_BP, strict=True)
    ]


def _count(answer: Ids, first: Sequence[int]) -> AnswerAgreement:
    same = [token == other for token, other in zip(answer, first, strict=False)]
    return AnswerAgreement(same=sum(same), tokens=len(same), first=len(list(takewhile(bool, same))))
