"""Figures of a cut of the vocabulary."""

from __future__ import annotations

from pydantic import Field

from llmprune.results.figures.base import Figures


class VocabularySource(Figures):
    """One source of the text that the vocabulary was kept for; the tokens are those of its held-out documents."""

    name: str
    characters: int  # read
    held_out_bytes: int
    tokens_before: int
    tokens_after: int
    lines: int
    same_lines: int  # that encode into the same tokens

    @property
    def longer(self) -> float | None:
        """Tokens after the cut / tokens before; None without held-out text."""
        return self.tokens_after / self.tokens_before if self.tokens_before else None


class VocabularyFigures(Figures):
    """Outcome of the cut of a vocabulary."""

    tokens: int  # of the dense model
    kept: int
    required: dict[str, int] = Field({})  # tokens that stay whatever the text, by the reason
    coverage: float  # share of the token occurrences in the held-out documents that are kept tokens
    sources: tuple[VocabularySource, ...]
    largest_logit_difference: float  # of the kept tokens, from those of the whole vocabulary
    bits_per_byte: tuple[float, float] | None = None  # on the text for perplexity: dense and final model
