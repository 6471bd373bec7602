"""The closed-form repairs of a layer that was cut: its up projection, and the output projection that ends it.

Each compares what the layer does on the pruned stream with what the dense stream says that it should.

Shapes: B batch, L sequence length, D hidden size, F neurons kept.
"""

from __future__ import annotations

from torch import Tensor, nn

from llmprune.anatomy.selection import outputs_first
from llmprune.anatomy.types import Anatomy, MlpUnit, Unit, unit_key
from llmprune.common.distributed import broadcast_from_first, sum_over_processes
from llmprune.common.linalg.cross_validated_ridge import NormalEquations, Repair
from llmprune.cut.apply import add_to_strand
from llmprune.cut.decision import Cut
from llmprune.layerwise.cached_forward import Reruns
from llmprune.layerwise.forward import Decoder, LayerwiseForward, Tensors
from llmprune.layerwise.hidden_states import HiddenStates
from llmprune.layerwise.residual_scale import RelativeError, residual_scale
from llmprune.prune.repair.activations import Reading, read_both, read_gated, read_uncut
from llmprune.prune.repair.folds import Folds
from llmprune.prune.repair.up_projection import UpEquations, UpRepair
from llmprune.recipe.refit import Refit


class Repairs:
    """Of one run of pass 2. ``folds`` judge the output projections, ``held_out`` the up projections.

    ``scales``: by kind of layer, how much of an output projection reaches the hidden states; kept with the snapshots.
    """

    def __init__(
        self,
        refit: Refit | None,
        dense: Decoder,
        *,
        pruned: Decoder,
        anatomy: Anatomy,
        cut: Cut,
        folds: Folds,
        held_out: Folds,
        scales: dict[str, float | None],
    ) -> None:
        self.refit, self.dense, self.pruned, self.anatomy, self.cut = refit, dense, pruned, anatomy, cut
        self.folds, self.held_out, self.scales = folds, held_out, scales

    def mlp(self, layer: int) -> MlpUnit | None:
        """The layer's MLP that every token goes through, if something is refit at all."""
        return next((unit for unit in self.anatomy.units[layer] if unit.refit), None) if self.refit else None

    def up(
        self,
        new: int,
        unit: MlpUnit,
        *,
        scale: float | None,
        target: LayerwiseForward,
        runs: Reruns,
        wanted: HiddenStates | None,
    ) -> tuple[UpRepair, float] | None:
        """Solve the up projection again for what the cut layer misses, where neurons of its unit go.

        ``wanted``: what its output projection writes in the dense stream, needed without a ``scale``. Returns the
        repair, and the relative error without it. Removed layers alone are no reason: tried for six of SmolLM2's,
        it made text like the calibration's better and other text worse.
        """
        narrowed = unit_key(self.cut.layers[new], unit.path) in self.cut.neurons
        if self.refit is None or not self.refit.up or unit.up is None or not narrowed:
            return None
        error = RelativeError()
        with self.pruned.layer(new) as layer:
            down_DF = outputs_first(layer.get_parameter(unit.tensors[-1].name), unit.tensors[-1])
            equations = UpEquations(down_DF, self.held_out, room=runs.walk.room)
            for batch, reading in enumerate(read_gated(runs, new, cut=layer, unit=unit)):
                written_BLD = reading.written_BLD.float()
                target_BLD = target.streams[batch].to(written_BLD)
                behind_BLD = target_BLD - reading.output_BLD.float()
                error.update(behind_BLD, target_BLD)
                if scale is not None:
                    wanted_BLD, missing_BLD = target_BLD, behind_BLD / scale
                else:  # a norm follows the output projection: match its own dense output instead
                    assert wanted is not None
                    wanted_BLD = wanted[batch].to(written_BLD)
                    missing_BLD = wanted_BLD - written_BLD
                equations.update(reading.input_BLI, reading.gates_BLF, missing_BLD=missing_BLD, wanted_BLD=wanted_BLD)
            repair = equations.solve()
        sum_over_processes(error.sums())
        if repair.delta_FI is not None:
            tensors = self.pruned.tensors(new)
            name = unit.up.tensor.name
            tensors[name] = add_to_strand(tensors[name], unit.up, delta_FI=repair.delta_FI)
        return repair, error.value()

    def output(
        self,
        new: int,
        uncut: Tensors,
        *,
        unit: Unit,
        target: LayerwiseForward,
        reached: HiddenStates,
        runs: Reruns,
        wanted: HiddenStates | None,
        moved: bool,
    ) -> tuple[Repair, float]:
        """The repair of the layer's output projection, and the relative error without it.

        ``moved``: its neurons are not those of the uncut layer any more, for the up projection was solved first. What
        that made good of inherited errors then counts as lost by the cut, with the other sign.
        """
        assert self.refit is not None
        old = self.cut.layers[new]
        key = unit_key(old, unit.path)
        equations, error = self.refit.open(self.folds.count), RelativeError()
        with self.dense.layer(old, uncut) as layer:
            scale = self.scale_of(old, unit)
            if scale is not None and cut_parts(old, self.anatomy, cut=self.cut) <= {key} and not moved:
                readings = read_uncut(runs, new, uncut=layer, unit=unit, keep_K=self.cut.neurons.get(key), scale=scale)
            else:
                readings = read_both(runs, new, uncut=layer, pruned=self.pruned, unit=unit)
            for reading in readings:
                batch, device = reading.batch, reading.full_BLD.device
                target_BLD, reached_BLD = target.streams[batch].to(device), reached[batch].to(device)
                error.update(target_BLD - reading.cut_BLD, target_BLD)
                if scale is not None:
                    inherited_BLD = (reached_BLD - reading.full_BLD) / scale
                    lost_BLD = (reading.full_BLD - reading.cut_BLD + target_BLD - reached_BLD) / scale
                else:  # a norm follows the projection: match its own dense output instead
                    assert wanted is not None
                    assert reading.full_written_BLD is not None
                    assert reading.cut_written_BLD is not None
                    inherited_BLD = wanted[batch].to(device) - reading.full_written_BLD
                    lost_BLD = reading.full_written_BLD - reading.cut_written_BLD
                self._add(equations, reading, lost_BLD=lost_BLD, inherited_BLD=inherited_BLD)
        sum_over_processes([*equations.sums(), *error.sums()])
        return equations.solve(f"layer {old}, {unit.output}"), error.value()

    def _add(self, equations: NormalEquations, reading: Reading, *, lost_BLD: Tensor, inherited_BLD: Tensor) -> None:
        """Take a batch into the sums of each fold that has windows in it."""
        parts = self.folds.parts(reading.batch, reading.input_BLF, lost_BLD, inherited_BLD)
        for fold, (input_TF, lost_TD, inherited_TD) in parts:
            equations.update(input_TF, lost_TD, inherited_TD=inherited_TD, fold=fold)

    def scale_of(self, index: int, unit: Unit) -> float | None:
        """What ``scale`` found of layers of this kind; None before it."""
        return self.scales.get(_kind(self.dense.layers[index], unit))

    def scale(self, walk: LayerwiseForward, index: int, *, layer: nn.Module, unit: Unit) -> float | None:
        """How much of the projection's output reaches the hidden states: a factor, or None if not linearly.

        Found by adding noise to the projection's output in one layer of each kind.
        """
        kind = _kind(layer, unit)
        if kind not in self.scales:
            self.scales[kind] = broadcast_from_first(
                residual_scale(walk, index, layer=layer, output=layer.get_submodule(unit.output))
            )
        return self.scales[kind]


def cut_parts(layer: int, anatomy: Anatomy, *, cut: Cut) -> set[str]:
    """Keys of the layer's units that lose neurons, and of its experts and attention heads if some go."""
    block, attention = anatomy.blocks[layer], anatomy.attention[layer]
    keys = {unit_key(layer, unit.path) for unit in anatomy.units[layer]} & cut.neurons.keys()
    experts = {unit_key(layer, block.path)} & cut.experts.keys() if block else set()
    heads = {unit_key(layer, attention.path)} & cut.heads.keys() if attention else set()
    return keys | {f"experts of {key}" for key in experts} | {f"heads of {key}" for key in heads}


def _kind(layer: nn.Module, unit: Unit) -> str:
    return f"{type(layer).__name__}.{unit.output}"
