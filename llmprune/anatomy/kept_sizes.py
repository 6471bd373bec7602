"""Sizes that a cut leaves, as the pruned model's config states them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from llmprune.anatomy.types import Anatomy


@dataclass(frozen=True)
class KeptSizes:
    """The layers that a cut keeps, by index, and the number of units of every other kind.

    ``widths``: neurons by config field, of those that are cut. ``experts``, ``kv_groups``: in each layer. ``hidden``:
    residual channels. None where all are kept.
    """

    layers: tuple[int, ...]
    widths: Mapping[str, int] = field(default_factory=dict)
    experts: int | None = None
    kv_groups: int | None = None
    hidden: int | None = None

    @classmethod
    def of_dense(cls, anatomy: Anatomy) -> KeptSizes:
        """Return the sizes of the dense model."""
        return cls(
            tuple(range(anatomy.num_layers)),
            anatomy.widths,
            anatomy.experts.count if anatomy.experts else None,
            anatomy.heads.count if anatomy.heads else None,
        )

    def completed(self, anatomy: Anatomy) -> KeptSizes:
        """Return these sizes, with the dense model's number of neurons, experts and groups where all are kept."""
        dense = KeptSizes.of_dense(anatomy)
        return replace(
            self,
            widths={**dense.widths, **self.widths},
            experts=self.experts or dense.experts,
            kv_groups=self.kv_groups or dense.kv_groups,
        )
