"""Choice of the tokens that a model keeps, by how often they occur in the text of its use.

Shapes: V tokens of the dense model, K tokens kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmprune.common.errors import RecipeError
from llmprune.data.vocabulary.required import RequiredTokens
from llmprune.data.vocabulary.segmentation import Segmentation
from llmprune.data.vocabulary.text import CountedText

if TYPE_CHECKING:
    from torch import Tensor

_ROUNDING = 1e-9  # of the sums of shares


@dataclass(frozen=True)
class VocabularyTarget:
    """Size of a vocabulary of ``tokens`` tokens that is asked for: a number kept, or a share of the text covered.

    ``number``: None where ``coverage`` decides, and the other way round. The result is a multiple of ``multiple``.
    """

    tokens: int
    multiple: int
    number: int | None = None
    coverage: float | None = None

    def require(self, required: RequiredTokens) -> None:
        """Raise RecipeError where the number asked for is below the tokens that must stay."""
        needed = len(required.all)
        if self.number is not None and self.number < needed:
            raise RecipeError(
                f"vocabulary: {self.number:,} of {self.tokens:,} tokens are fewer than the {needed:,} that must stay "
                f"({required}); keep at least {self.rounded(needed):,}"
            )

    def rounded(self, number: int) -> int:
        """Return the next multiple that is not below ``number``, at most the whole vocabulary."""
        return min(-(-number // self.multiple) * self.multiple, self.tokens)


def choose_tokens(
    text: CountedText, segmentation: Segmentation, *, required: RequiredTokens, target: VocabularyTarget
) -> Tensor:
    """Return the ids of the tokens kept, ascending, int64 [K]: the required ones, then the most frequent.

    A token is kept with those that its encoding passes through. Of equally frequent tokens the one with the lower id
    is kept: ids follow the frequency in the text that the tokenizer was trained on. So tokens that the text does not
    have are added in that order until the held-out documents are covered.
    """
    import torch

    kept = set(required.all)
    shares = text.shares_V.tolist()
    order = sorted((index for index in range(target.tokens) if index not in kept), key=lambda index: -shares[index])
    frequent = _Additions(kept, segmentation)
    if target.coverage is not None:
        frequent.cover(order, text.judging_V.tolist(), share=target.coverage)
    frequent.fill(order, target.number or target.rounded(len(kept)))
    return torch.tensor(sorted(kept))


@dataclass(frozen=True)
class _Additions:
    """Additions to the set of ``kept`` tokens, each with all that it needs."""

    kept: set[int]
    segmentation: Segmentation

    def cover(self, order: list[int], shares: list[float], *, share: float) -> None:
        """Add tokens in their order until the kept ones make up a share of the text. ``shares``: of each token."""
        missing = sum(value for index, value in enumerate(shares) if index not in self.kept)
        for index in order:
            if missing <= 1 - share + _ROUNDING:
                return
            new = self.segmentation.needs(index) - self.kept
            missing -= sum(shares[one] for one in new)
            self.kept.update(new)

    def fill(self, order: list[int], number: int) -> None:
        """Add tokens in their order up to a number, leaving out those that need more than the rest of it."""
        for index in self._missing(order):
            if len(self.kept) >= number:
                return
            new = self.segmentation.needs(index) - self.kept
            if len(self.kept) + len(new) <= number:
                self.kept.update(new)

    def _missing(self, order: list[int]) -> Iterator[int]:
        return (index for index in order if index not in self.kept)
