"""First stage of a layer in pass 2: advance the dense hidden states, and record what the repairs need of the layer.

Shapes: B batch, L sequence length, D hidden size, F inputs of a projection.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass

from torch import Tensor, nn

from llmprune.anatomy.hooks import outputs_of
from llmprune.layerwise.forward import LayerwiseForward
from llmprune.layerwise.hidden_states.buffers import HiddenStates
from llmprune.layerwise.staged_layer import StagedLayer
from llmprune.prune.layer_step import LayerStep
from llmprune.prune.layer_work import DenseReference, Pass2Context
from llmprune.prune.repair.following_norm import FollowingNorm
from llmprune.prune.repair.residual_writers import LayerTopology, ResidualWriter


def record_dense(run: Pass2Context, step: LayerStep) -> DenseReference:
    """Advance the dense hidden states over a kept layer; return what its repairs need of it."""
    if not step.uses_dense:
        return DenseReference()
    if step.refits_sparse:
        return _record_all_writers(run, step)
    reference = _record_mixer(run, step)
    _pass_unit(run, step, reference=reference)
    return reference


def pass_dense(run: Pass2Context, index: int) -> None:
    """Advance the dense hidden states over a layer, from the cache of pass 1 if they are in it."""
    if run.cache is not None and run.cache.restore(index, run.dense.hidden_states):
        return
    with run.dense.decoder.layer(index) as layer:
        run.dense.pass_through(index, layer)


def mixer_writer(step: LayerStep, topology: LayerTopology) -> ResidualWriter | None:
    """Return the output projection of a layer's token mixer, if it is to be refit.

    It is the attention's if heads are removed from that, else the last writer that is neither an MLP nor the layer's
    last.
    """
    if not step.refits_mixer:
        return None
    if step.attention is not None:
        return topology.writer(step.attention.output)
    mixers = [one for one in topology.writers if not one.is_last and one.name not in step.mlp_outputs]
    return mixers[-1] if mixers else None


def _record_all_writers(run: Pass2Context, step: LayerStep) -> DenseReference:
    """Record the residual stream after every writer but the last, in one run of the layer."""
    dense, reference = run.dense, DenseReference()
    with dense.decoder.layer(step.old) as layer, ExitStack() as hooks:
        reference.topology = topology = run.topologies.topology(dense, step.old, layer=layer, old=step.old)
        for writer in topology.writers:
            if not writer.is_last:
                recorder = _Recorder(dense, writer, reference.outputs)
                hooks.enter_context(outputs_of(layer.get_submodule(writer.name), recorder.add))
        dense.pass_through(step.old, layer)
    mixer = mixer_writer(step, topology)
    reference.mixer = mixer if mixer is not None and not mixer.is_last else None
    mlp = topology.writer(step.mlp.output) if step.mlp else None
    if mlp is not None:
        reference.unit, reference.scale = step.mlp, mlp.scale
    return reference


@dataclass(frozen=True)
class _Recorder:
    """Residual streams after one writer and its norm, which it appends to ``outputs`` batch by batch."""

    dense: LayerwiseForward
    writer: ResidualWriter
    outputs: dict[str, HiddenStates]
    norm: FollowingNorm | None = None

    def add(self, output: Tensor) -> None:
        """Add the output of the writer's projection for the next batch."""
        name = self.writer.name
        batch = len(self.outputs[name]) if name in self.outputs else 0
        hidden_BLD = self.dense.hidden_states.at(batch, output.device)
        if self.norm is None:
            residual_BLD = self.writer.residual_after(hidden_BLD, output)
        else:
            residual_BLD = self.norm.residual_after(hidden_BLD, output).to(hidden_BLD.dtype)
        self.dense.append(self.outputs, name, value_BLX=residual_BLD)


def _record_mixer(run: Pass2Context, step: LayerStep) -> DenseReference:
    """Record the residual stream after the token mixer, if that is refit, and find the unit to refit after it."""
    reference = DenseReference(unit=step.mlp)
    if not step.needs_topology:
        return reference
    with run.dense.decoder.layer(step.old) as layer:
        topology = run.topologies.topology(run.dense, step.old, layer=layer, old=step.old)
        reference.topology, reference.mixer = topology, mixer_writer(step, topology)
        if reference.mixer is not None:
            _run_up_to_mixer(run, step, layer=layer, reference=reference)
    if reference.unit is None and topology.last is not None:
        reference.unit = topology.last.unit
    return reference


def _run_up_to_mixer(run: Pass2Context, step: LayerStep, *, layer: nn.Module, reference: DenseReference) -> None:
    """Run the dense layer up to its token mixer, and record the residual stream after that.

    Hidden states are not advanced.
    """
    writer, topology = reference.mixer, reference.topology
    assert writer is not None, "the token mixer is refit"
    assert topology is not None, "it names the token mixer"
    if writer.scale is None:
        reference.mixer_norm = run.norms.of(run.dense, step.old, layer=layer, output=writer.name, later=writer.later)
    recorder = _Recorder(run.dense, writer, reference.outputs, reference.mixer_norm)
    module = layer.get_submodule(writer.name)
    staged = StagedLayer(run.dense, step.old, layer=layer, order=topology.order)
    for _, input_BLF in staged.inputs(writer.name):
        recorder.add(module(input_BLF))


def _pass_unit(run: Pass2Context, step: LayerStep, *, reference: DenseReference) -> None:
    """Advance over the layer; record the outputs of the unit's projection if a norm follows it.

    The residual scale of the projection is measured in the first layer of each class.
    """
    dense, unit = run.dense, reference.unit
    if unit is not None:
        reference.scale = run.scales.of(dense.decoder.layers[step.old], unit.output)
    if unit is None or reference.scale is not None:
        pass_dense(run, step.old)
        return
    with dense.decoder.layer(step.old) as layer:
        reference.scale = run.scales.measure(dense, step.old, layer=layer, name=unit.output)
        if reference.scale is None:
            reference.norm = run.norms.of(dense, step.old, layer=layer, output=unit.output)
        if reference.scale is None and (reference.norm is None or step.refits_up):
            projection = layer.get_submodule(unit.output)
            reference.outputs[unit.output] = dense.pass_and_keep(step.old, layer, projection=projection)
        else:
            dense.pass_through(step.old, layer)
