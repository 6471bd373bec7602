"""The recipe's ``vocabulary`` section: which tokens keep their rows in embedding and head."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from llmprune.common.schema import Positive, Section
from llmprune.recipe.text_source import TextSource

COVERAGE = 0.9999
CHARACTERS = 10_000_000


class Vocabulary(Section):
    """Removal of tokens that the text of the use does not need, by the coverage of that text or by a number."""

    keep_for: tuple[TextSource, ...] | None = Field(
        None,
        strict=False,
        min_length=1,
        description="Sources of text whose tokens are counted, each by its weight and not by its length; default: "
        "those of the calibration. Every other text still encodes, into more tokens.",
    )
    coverage: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None,
        description=f"Share of the token occurrences in documents of that text which are held out that the kept tokens "
        f"make up; default: {COVERAGE}, where neither tokens nor keep is given.",
    )
    tokens: Positive | None = Field(None, description="Number of tokens kept, in place of coverage.")
    keep: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="Fraction of the tokens kept, in place of coverage."
    )
    characters: Positive = Field(
        CHARACTERS,
        description="Number of characters that are read, of all sources together, shared by weight. A tenth of the "
        "documents is not counted: on these the cut is measured.",
    )
    multiple: Positive | None = Field(
        None,
        description="The number of tokens kept is rounded up to a multiple of this, with further tokens, not padding; "
        "default: 128, or the largest power of two that divides the vocabulary.",
    )

    @model_validator(mode="after")
    def _one_target(self) -> Self:
        given = [name for name in ("coverage", "tokens", "keep") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"needs at most one of coverage, tokens, keep; {' and '.join(given)} given: leave one out")
        if any(source.images_field for source in self.keep_for or ()):
            raise ValueError("keep_for counts the tokens of text; leave images_field out")
        return self

    @property
    def wanted_coverage(self) -> float | None:
        """Share of the token occurrences to cover; None where the number of tokens is given."""
        if self.tokens is not None or self.keep is not None:
            return None
        return COVERAGE if self.coverage is None else self.coverage
