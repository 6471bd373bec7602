"""Base class of the sparsity methods.

A method is a frozen section of the recipe: its parameters. It chooses which weights of one matrix are kept, from second
moments of the inputs that the matrix gets in the pruned model. To add a method, add a file to ``methods`` with a
subclass that declares its ``kind``; nothing else changes.

Shapes: O outputs of a matrix, I inputs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from llmprune.common.variants import Variant
from llmprune.sparsity.importance import compensated_importance

if TYPE_CHECKING:
    from torch import Tensor

    from llmprune.sparsity.pattern import Pattern

InputMoments = Literal["nothing", "squares", "gram"]


class SparsityMethod(Variant, ABC):
    """Makes one matrix sparse.

    ``requires``: moments of the inputs x that it reads, summed over tokens: none, Σ x² of each input, or XᵀX.
    ``refits_by_default``: the kept weights are solved again unless the recipe says otherwise.
    """

    requires: ClassVar[InputMoments]
    refits_by_default: ClassVar[bool] = True

    refit: bool | None = Field(
        None,
        description="Solve the kept weights again by least squares, output projections towards dense hidden states; "
        "default: yes, but not for magnitude and wanda, and never where the recipe says refit: false.",
    )

    @property
    def refits(self) -> bool:
        """True where the kept weights are solved again, unless the recipe turns the refit off."""
        return self.refits_by_default if self.refit is None else self.refit

    def required_moments(self, refit: bool) -> InputMoments:
        """Return the moments to sum over tokens, with or without the refit of the kept weights."""
        return "gram" if refit else self.requires

    @abstractmethod
    def prune(self, weight_OI: Tensor, moments: Tensor | None, *, pattern: Pattern) -> tuple[Tensor, Tensor]:
        """Return the sparse weights, float32 [O, I], and the mask of those that are kept, bool [O, I].

        ``moments``: XᵀX [I, I], its diagonal [I] where the method requires only that, or None.
        """

    def importance(self, weight_OI: Tensor, moments: Tensor | None) -> Tensor:
        """Return the increase of the squared error if a weight is pruned, as the method estimates it, [O, I].

        It judges orders of the inputs (``input_order``). ``moments``: as in ``prune``, or XᵀX where the kept weights
        are solved again. By default the squared weights times the energy of their inputs (Wanda, arXiv 2306.11695).
        """
        if moments is None:
            return weight_OI.square()
        return weight_OI.square() * (moments.diagonal() if moments.ndim == 2 else moments)

    def operations(self, outputs: int, inputs: int) -> float:
        """Return the float32 operations of pruning a matrix of this shape, where they are many."""
        return 0.0


class CompensatingMethod(SparsityMethod):
    """Prunes a weight by the error that is left once other weights of its output compensate for it."""

    requires: ClassVar[InputMoments] = "gram"

    damping: float = Field(
        0.01,
        gt=0,
        description="λ, in units of diag(XᵀX): of its mean for sparsegpt, of each input's own for alps.",
    )

    def importance(self, weight_OI: Tensor, moments: Tensor | None) -> Tensor:
        """Return the error after all other weights compensate, whichever of them are pruned later."""
        assert moments is not None, "required"
        return compensated_importance(weight_OI, moments, damping=self.damping)
