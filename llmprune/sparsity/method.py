"""What a sparsity method is.

A method is a frozen section of the recipe (its parameters) that chooses which weights of
one matrix stay, from sums over the inputs that the matrix gets on the pruned stream. Adding
a method takes one file here and one line in ``__init__.py``.

Shapes: O outputs of a matrix, I inputs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from llmprune.common.variants import Variant

if TYPE_CHECKING:
    from torch import Tensor

    from llmprune.sparsity.pattern import Pattern

DAMPING = "λ, in units of diag(XᵀX): of its mean for sparsegpt, of each input's own for alps."
Needs = Literal["nothing", "squares", "gram"]


class SparsityMethod(Variant, ABC):
    """Makes one matrix sparse.

    ``needs``: which sums over tokens of the matrix's inputs x it reads: none, Σ x² of each input, or XᵀX.
    """

    needs: ClassVar[Needs]
    refits_by_default: ClassVar[bool] = True

    refit: bool | None = Field(
        None,
        description="Solve what stays again by least squares, output projections towards the dense hidden states; "
        "default: yes, but not for magnitude and wanda, and never where the recipe says refit: false.",
    )

    @property
    def refits(self) -> bool:
        """Whether what stays is solved again, where the recipe does not forbid it."""
        return self.refits_by_default if self.refit is None else self.refit

    def sums(self, refit: bool) -> Needs:
        """Which sums are needed, with or without the refit of what stays."""
        return "gram" if refit else self.needs

    @abstractmethod
    def prune(self, weight_OI: Tensor, sums: Tensor | None, *, pattern: Pattern) -> tuple[Tensor, Tensor]:
        """The sparse weights and what stays of them, float32 and bool [O, I].

        ``sums``: XᵀX [I, I], or its diagonal [I] where the method needs no more, or None.
        """
