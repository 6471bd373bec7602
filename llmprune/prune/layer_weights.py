"""The tensors of one layer while pass 2 works on it.

Shapes: D hidden size, F neurons or inputs of a projection, I inputs of an up projection.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from llmprune.anatomy.selection import outputs_first
from llmprune.anatomy.types import FusedSlice, PrunableDim
from llmprune.cut.apply import add_to_slice
from llmprune.layerwise.decoder import Decoder, Tensors
from llmprune.prune.layer_step import LayerStep


@dataclass
class LayerWeights:
    """Tensors of a kept layer by their names in it.

    ``uncut``: those of the dense model, with the repairs that are valid without the cut too. ``cut``: those of the
    pruned model, cut, repaired, made sparse, and then written.
    """

    uncut: Tensors
    cut: Tensors

    @classmethod
    def cut_out(cls, step: LayerStep, dense: Decoder, *, pruned: Decoder) -> LayerWeights:
        """Cut a layer of the pruned model out of its dense layer; neither decoder holds the tensors afterwards."""
        weights = cls(dense.tensors(step.old), pruned.tensors(step.new))
        dense.drop_held()
        pruned.drop_held()
        return weights

    def add_to_projection(self, weight: PrunableDim, delta_DF: Tensor) -> None:
        """Add Δ to the weight of an output projection of the cut layer, in the weight's own layout and dtype."""
        tensor = self.cut[weight.name]
        self.cut[weight.name] = (tensor.float() + outputs_first(delta_DF, weight)).to(tensor.dtype)

    def add_to_slice(self, part: FusedSlice, delta_FI: Tensor) -> None:
        """Add Δ to one slice of a fused tensor of the cut layer, such as the up projections of gate and up."""
        name = part.tensor.name
        self.cut[name] = add_to_slice(self.cut[name], part, delta_FI=delta_FI)

    def drop_uncut(self) -> None:
        """Free the dense layer's tensors."""
        self.uncut = {}
