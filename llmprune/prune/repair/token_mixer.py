"""The repair of a layer's token mixer, its attention or what it has in that place: the output projection solved again.

It goes after two errors:

    lost:        what the groups of heads that go wrote
    inherited:   by how much the hidden states between mixer and MLP are not the dense ones, behind a gap

The MLP's refit comes after it, on what is left. Where no heads go and no layer went before, the mixer stays as it is:
with only neurons gone, the MLPs' refit alone kept as much (SmolLM2 with three quarters of them).

Shapes: B batch, L sequence length, D hidden size, F inputs of the projection, K of them kept.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from llmprune.anatomy.selection import outputs_first, rows_of
from llmprune.anatomy.types import Anatomy, AttentionUnit, PrunableDim, unit_key
from llmprune.common.distributed import sum_over_processes
from llmprune.common.linalg.cross_validated_ridge import Repair
from llmprune.cut.decision import Cut
from llmprune.layerwise.forward import Decoder, LayerwiseForward, Tensors
from llmprune.layerwise.hidden_states import HiddenStates
from llmprune.layerwise.staged_layer import StagedLayer
from llmprune.prune.repair.activations import lost_rows
from llmprune.prune.repair.folds import Folds
from llmprune.prune.repair.residual_writers import LayerTopology, ResidualWriter
from llmprune.recipe.refit import Refit


@dataclass(frozen=True)
class DenseMixerOutput:
    """The writer to solve again, and what the dense stream has behind it (``ResidualWriter.behind``)."""

    outline: LayerTopology
    writer: ResidualWriter
    wanted: HiddenStates


class Mixers:
    """Of one run of pass 2. ``folds`` judge the repairs."""

    def __init__(
        self, refit: Refit | None, dense: Decoder, *, pruned: Decoder, anatomy: Anatomy, cut: Cut, folds: Folds
    ) -> None:
        self.refit, self.dense, self.pruned, self.anatomy, self.cut = refit, dense, pruned, anatomy, cut
        self.folds = folds

    def has_work(self, new: int) -> bool:
        """Whether a kept layer loses heads, or stands behind a gap."""
        old = self.cut.layers[new]
        return self.refit is not None and (old != new or self._narrowed(old) is not None)

    def writer(self, new: int, outline: LayerTopology) -> ResidualWriter | None:
        """The output projection to solve again in a kept layer; None where there is nothing to do."""
        old = self.cut.layers[new]
        if not self.has_work(new):
            return None
        attention = self._narrowed(old)
        if attention is not None:
            return next((one for one in outline.writers if one.name == attention.output), None)
        mlps = {unit.output for unit in self.anatomy.units[old]}
        mixers = [one for one in outline.writers if not one.last and one.name not in mlps]
        return mixers[-1] if mixers else None

    def _narrowed(self, old: int) -> AttentionUnit | None:
        """The layer's attention if some of its heads go and every token goes through it."""
        unit = self.anatomy.attention[old]
        return unit if unit and unit.refit and unit_key(old, unit.path) in self.cut.heads else None

    def listen(
        self, target: LayerwiseForward, old: int, *, layer: nn.Module, outline: LayerTopology, writer: ResidualWriter
    ) -> DenseMixerOutput:
        """Run the dense layer up to the writer; its stream stays before the layer."""
        wanted: HiddenStates | None = None
        module = layer.get_submodule(writer.name)
        for batch, input_BLF in StagedLayer(target, old, layer=layer, order=outline.order).inputs(writer.name):
            hidden_BLD = target.streams[batch].to(input_BLF.device)
            behind_BLD = writer.behind(hidden_BLD, module(input_BLF))
            wanted = target.room(behind_BLD) if wanted is None else wanted
            wanted.append(behind_BLD)
        assert wanted is not None, "there is a batch"
        return DenseMixerOutput(outline, writer, wanted)

    def solve(
        self, new: int, uncut: Tensors, *, stream: LayerwiseForward, heard: DenseMixerOutput
    ) -> tuple[Tensors, Repair]:
        """Solve it towards what was heard, on the pruned stream before the layer, and put it into the pruned layer.

        Returns the uncut layer's tensors as well, with the repair in them where its heads all stay: what the layer
        without a cut of its MLP does from now on.
        """
        assert self.refit is not None
        old, writer = self.cut.layers[new], heard.writer
        output, keep_K = self._kept(old, uncut, writer=writer)
        equations = self.refit.open(self.folds.count)
        with self.dense.layer(old, uncut) as layer:
            module = layer.get_submodule(writer.name)
            gone_R, weight_RD = lost_rows(outputs_first(module.get_parameter("weight"), output), keep_K)
            for batch, input_BLF in StagedLayer(stream, new, layer=layer, order=heard.outline.order).inputs(
                writer.name
            ):
                hidden_BLD = stream.streams[batch].to(input_BLF.device)
                behind_BLD = writer.behind(hidden_BLD, module(input_BLF))
                inherited_BLD = heard.wanted[batch].to(behind_BLD.device).float() - behind_BLD.float()
                input_BLF = input_BLF.view(*behind_BLD.shape[:2], -1)
                parts = [input_BLF, inherited_BLD]
                if keep_K is not None:
                    lost_BLD = input_BLF[..., gone_R] @ weight_RD
                    parts = [input_BLF[..., keep_K], inherited_BLD, lost_BLD]
                for fold, (input_TF, inherited_TD, *lost) in self.folds.parts(batch, *parts):
                    equations.update(input_TF, lost[0] if lost else None, inherited_TD=inherited_TD, fold=fold)
        sum_over_processes(equations.sums())
        repair = equations.solve(f"layer {old}, {writer.name}")
        if repair.delta_DF is None:
            return uncut, repair
        tensors = self.pruned.tensors(new)
        weight = tensors[output.name]
        repaired = (weight.float() + outputs_first(repair.delta_DF, output)).to(weight.dtype)
        tensors[output.name] = repaired
        return (uncut if keep_K is not None else uncut | {output.name: repaired}), repair

    def _kept(self, old: int, uncut: Tensors, *, writer: ResidualWriter) -> tuple[PrunableDim, Tensor | None]:
        """The projection's weight, and which of its inputs stay, int64 [K]; None: all."""
        attention = self._narrowed(old)
        if attention is None:
            return writer.unit.tensors[-1], None
        output = attention.tensors[-1]
        keep_G = self.cut.heads[unit_key(old, attention.path)]
        return output, rows_of(keep_G, uncut[output.name].shape[output.dim], cut=output)
