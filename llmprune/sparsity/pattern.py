"""Sparsity patterns of a matrix: N of every M neighbouring inputs stay, or a share of each output's inputs is pruned.

Sparse tensor cores run 2:4 along the dimension that a product sums over (Mishra et al., arXiv 2104.08378): the inputs
of a matrix that is applied as x Wᵀ.

Shapes: O outputs of a matrix, I inputs, G groups of M neighbouring inputs.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

ROUNDING = 0.001  # largest shortfall of the share of zeros from the one in the recipe, where blocks are rounded


@dataclass(frozen=True)
class Pattern:
    """Keeps ``kept`` of every ``of`` inputs; without ``of``, all but a ``share`` of each output's inputs."""

    kept: int = 0
    of: int | None = None
    share: float = 0.0

    @classmethod
    def parse(cls, value: str | float) -> Pattern:
        """Return the pattern of ``"2:4"`` or ``0.5``. Raises ValueError."""
        if isinstance(value, int | float):
            if not 0 < value < 1:
                raise ValueError(f"{value:g} is not a share of weights to remove; give one between 0 and 1, or N:M")
            return cls(share=float(value))
        found = re.fullmatch(r"\s*(\d{1,4}):(\d{1,4})\s*", value)
        if found is None:
            raise ValueError(f'{value!r} is neither N:M, such as "2:4", nor a share of weights to remove, such as 0.5')
        kept, of = int(found[1]), int(found[2])
        if not 0 < kept < of:
            raise ValueError(f"{value}: {kept} of every {of} weights cannot be kept; N is at least 1 and below M")
        return cls(kept, of)

    @property
    def removed(self) -> float:
        """Share of the weights that are pruned."""
        return self.share if self.of is None else 1 - self.kept / self.of

    @property
    def on_hardware(self) -> bool:
        """True for 2:4, the pattern that sparse tensor cores run."""
        return (self.kept, self.of) == (2, 4)

    def __str__(self) -> str:
        return f"{self.share:g}" if self.of is None else f"{self.kept}:{self.of}"

    def refusal(self, outputs: int, inputs: int) -> str | None:
        """Return the reason why a matrix of this shape cannot have the pattern; None where it can.

        For 2:4 the limits are those of ``torch.sparse.to_sparse_semi_structured`` for 16-bit matrices.
        """
        if self.of is not None and inputs % self.of:
            return f"its {inputs} inputs are not a multiple of {self.of}"
        if self.on_hardware and (outputs % 32 or inputs % 64):
            return f"hardware requires multiples of 32 outputs and 64 inputs, and it has {outputs} and {inputs}"
        return None

    def kept_inputs(self, inputs: int) -> int:
        """Return the number of inputs of each output that are kept."""
        return inputs - round(self.share * inputs) if self.of is None else inputs // self.of * self.kept

    def mask(self, scores_OI: Tensor) -> Tensor:
        """Return the mask of the highest scores of each group, or of each output, bool [O, I]."""
        import torch

        outputs, inputs = scores_OI.shape
        if self.on_hardware:
            return _two_of_four(scores_OI.reshape(-1, 4)).view(outputs, inputs)
        group, kept = (inputs, self.kept_inputs(inputs)) if self.of is None else (self.of, self.kept)
        scores_OGM = scores_OI.reshape(outputs, -1, group)
        highest = scores_OGM.topk(kept, dim=-1, sorted=False).indices
        mask_OGM = torch.zeros_like(scores_OGM, dtype=torch.bool).scatter_(-1, highest, value=True)
        return mask_OGM.view(outputs, inputs)

    def towards(self, part: float) -> Pattern:
        """Return the pattern that prunes a ``part`` of the weights that this one prunes, rounded in each group."""
        if self.of is None:
            return Pattern(share=self.share * part)
        return Pattern(self.of - round((self.of - self.kept) * part), self.of)


def _two_of_four(scores_G4: Tensor) -> Tensor:
    """Return the mask of the two highest of each four, bool [G, 4]; comparisons are much faster than ``topk``."""
    import torch

    first, second, third, fourth = scores_G4.unbind(1)
    high, low = torch.maximum(first, second), torch.minimum(first, second)
    high_too, low_too = torch.maximum(third, fourth), torch.minimum(third, fourth)
    least_G = torch.maximum(torch.minimum(high, high_too), torch.maximum(low, low_too))
    mask_G4 = scores_G4 >= least_G[:, None]
    if int(mask_G4.count_nonzero()) > 2 * len(least_G):
        tied_G = mask_G4.sum(1) > 2
        highest = scores_G4[tied_G].topk(2, dim=1).indices
        mask_G4[tied_G] = torch.zeros_like(mask_G4[tied_G]).scatter_(1, highest, value=True)
    return mask_G4
