"""Values that the stages of pass 2 share: in the whole run, and for the layer under work."""

from __future__ import annotations

from dataclasses import dataclass, field

from llmprune.anatomy.types import Unit
from llmprune.common.linalg.cross_validated_ridge import NormalEquations, Repair
from llmprune.cut.decision import Cut
from llmprune.layerwise.cached_forward import CachedForward
from llmprune.layerwise.forward import LayerwiseForward
from llmprune.layerwise.hidden_states.buffers import HiddenStates
from llmprune.layerwise.hidden_states.cache import HiddenStateCache
from llmprune.layerwise.window_groups import WindowGroups
from llmprune.prune.channels.narrow_stream import NarrowStream
from llmprune.prune.free_channels.finder import ChannelFinder
from llmprune.prune.layer_step import LayerStep
from llmprune.prune.layer_weights import LayerWeights
from llmprune.prune.records import BlockRecord, ExpertsRecord, LayerRecord, MatrixRecord
from llmprune.prune.repair.following_norm import FollowingNorm, FollowingNorms
from llmprune.prune.repair.residual_scales import ResidualScales
from llmprune.prune.repair.residual_writers import LayerTopology, ResidualWriter, TopologyCache
from llmprune.prune.repair.training_windows import TrainingWindows
from llmprune.prune.repair.up_equations import UpRepair
from llmprune.recipe.refit import Refit


@dataclass(frozen=True)
class Pass2Context:
    """One run of pass 2.

    ``dense``, ``pruned``: layer-wise forward passes of both models, the dense one ahead by one layer and its gap while
    that layer is repaired. ``folds``: judge ridge regressions; ``held_out``: judge up projections. ``norms``:
    those that follow projections. ``cache``: dense hidden states of pass 1, if they were saved. ``training``: the
    windows of the training of whole layers, if there is one. ``narrow``: the model with the kept residual channels.
    """

    cut: Cut
    refit: Refit | None
    dense: LayerwiseForward
    pruned: LayerwiseForward
    folds: WindowGroups
    held_out: WindowGroups
    scales: ResidualScales
    topologies: TopologyCache
    norms: FollowingNorms
    channels: ChannelFinder
    cache: HiddenStateCache | None
    training: TrainingWindows | None
    narrow: NarrowStream | None = None

    def make_equations(self) -> NormalEquations:
        """Return empty normal equations for the refit of one projection."""
        assert self.refit is not None, "layers are refit only with refit in the recipe"
        return self.refit.make_equations(self.folds.count, one_source=self.folds.one_source)


@dataclass
class DenseReference:
    """Activations of the dense layer that repairs use as regression targets.

    ``unit``: the unit whose output projection is refit after the token mixer: the MLP, or the layer's last writer;
    ``scale``: its residual scale; ``norm``: the norm that follows it in place of one. ``mixer``: the token mixer's
    output projection, if that is refit; ``mixer_norm``: the norm that follows it. ``outputs``: by projection, the
    residual stream after it in units of its scale (``ResidualWriter.residual_after``), or after ``mixer_norm``.
    """

    topology: LayerTopology | None = None
    unit: Unit | None = None
    scale: float | None = None
    norm: FollowingNorm | None = None
    mixer: ResidualWriter | None = None
    mixer_norm: FollowingNorm | None = None
    outputs: dict[str, HiddenStates] = field(default_factory=dict)


@dataclass
class LayerOutcome:
    """Results of the stages of one layer, from which its record is made.

    ``error_cut``, ``error``: relative error of the hidden states after the layer and its gap, before the refit of its
    MLP and at the end; None if not measured.
    """

    mixer: Repair | None = None
    up: UpRepair | None = None
    experts: ExpertsRecord | None = None
    output: Repair | None = None
    block: BlockRecord | None = None
    error_cut: float | None = None
    error: float | None = None
    matrices: tuple[MatrixRecord, ...] = ()

    @property
    def has_new_experts(self) -> bool:
        """True if some routed experts were refit."""
        return self.experts is not None and self.experts.refit > 0

    def record(self, layer: int) -> LayerRecord:
        """Return the record of a layer, given by its index in the dense model."""
        is_refit = (
            self.output is not None
            or (self.mixer is not None and self.mixer.delta_DF is not None)
            or self.has_new_experts
            or (self.block is not None and bool(self.block.steps))
        )
        return LayerRecord(
            layer,
            self.error_cut if is_refit else self.error,
            self.error if is_refit else None,
            ridge=self.output.ridge if self.output else None,
            inherited=self.output.inherited if self.output else None,
            held_out=self.output.held_out if self.output else None,
            mixer_held_out=self.mixer.held_out if self.mixer else None,
            up_held_out=self.up.held_out if self.up else None,
            experts=self.experts,
            block=self.block,
            matrices=self.matrices,
        )


@dataclass
class LayerWork:
    """A kept layer under work.

    ``before_gap``: dense hidden states after the layer, before its gap. ``runs``: the layer, uncut and
    cut, on the pruned hidden states before it.
    """

    step: LayerStep
    dense: DenseReference
    weights: LayerWeights
    before_gap: HiddenStates
    runs: CachedForward
    outcome: LayerOutcome = field(default_factory=LayerOutcome)

    def drop_references(self) -> None:
        """Free what only the repairs need of the dense layer."""
        self.weights.drop_uncut()
        self.before_gap = HiddenStates()
        if not self.step.refits_sparse:
            self.dense.outputs.clear()
