"""Application of a cut: the pruned model's config, and each kept layer's tensors without removed channels."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from llmprune.anatomy.config_edits import edit_config
from llmprune.anatomy.hidden_proof import entering, rescaled_embeddings, scale_between
from llmprune.anatomy.kept_sizes import KeptSizes
from llmprune.anatomy.layer_equivalence import check_layer_equivalence, sizes_of_hidden, sizes_that_change
from llmprune.anatomy.meta_model import Config, text_config
from llmprune.anatomy.names import tensor_of
from llmprune.anatomy.residual_channels import cut_channels
from llmprune.anatomy.selection import outputs_first, select_neurons, slice_rows
from llmprune.anatomy.types import NO_HEADS, Anatomy, FusedSlice, HiddenSize, PrunableDim, Unit, unit_key
from llmprune.checkpoint.skeleton import build_skeleton
from llmprune.checkpoint.stored_dtypes import Originals
from llmprune.common.errors import ModelError
from llmprune.cut.decision import Cut
from llmprune.cut.merging import merge_experts
from llmprune.layerwise.decoder import Decoder, LayerPlacement, Tensors


def cut_config(config: Config, anatomy: Anatomy, *, kept: KeptSizes) -> Config:
    """Return the pruned model's config. Raises ModelError if the model cannot be cut so, with the reason."""
    if len(kept.layers) < anatomy.num_layers and anatomy.depth_refusal:
        raise ModelError(f"the depth of this model cannot be cut: {anatomy.depth_refusal}")
    unknown = sorted(kept.widths.keys() - anatomy.widths.keys())
    if unknown:
        raise ModelError(f"the width {unknown[0]} of this model cannot be cut; those that can: {anatomy.widths}")
    fields = {field: neurons for field, neurons in kept.widths.items() if neurons != anatomy.widths[field]}
    if kept.experts is not None and not (anatomy.experts and anatomy.experts.count == kept.experts):
        if anatomy.experts is None or anatomy.experts.refusal:
            reason = anatomy.experts.refusal if anatomy.experts else "it has no mixture of experts"
            raise ModelError(f"experts of this model cannot be removed: {reason}")
        fields[anatomy.experts.field] = kept.experts
    if kept.kv_groups is not None and not (anatomy.heads and anatomy.heads.count == kept.kv_groups):
        if anatomy.heads is None or anatomy.heads.refusal:
            reason = anatomy.heads.refusal if anatomy.heads else NO_HEADS
            raise ModelError(f"attention heads of this model cannot be removed: {reason}")
        fields |= anatomy.heads.fields(kept.kv_groups)
    edited = edit_config(config, kept.layers, widths=fields)
    return edited if kept.hidden is None else narrow_config(edited, anatomy, hidden_size=kept.hidden)


def narrow_config(config: Config, anatomy: Anatomy, *, hidden_size: int) -> Config:
    """Return a config with fewer residual channels. Raises ModelError as ``cut_config`` does."""
    layers = range(text_config(config).num_hidden_layers)
    return edit_config(config, layers, widths=residual_channels_of(anatomy).fields(hidden_size))


def residual_channels_of(anatomy: Anatomy) -> HiddenSize:
    """Return the residual channels of a model. Raises ModelError where none can be removed, with the reason."""
    hidden = anatomy.hidden
    if hidden is None or hidden.refusal:
        reason = hidden.refusal if hidden else "they were not looked for"
        raise ModelError(f"residual channels of this model cannot be removed: {reason}")
    return hidden


def cut_decoder(dense: Decoder, *, anatomy: Anatomy, cut: Cut) -> Decoder:
    """Return the pruned model as a decoder that cuts each layer out of its dense layer when that is visited.

    Raises ModelError if a kept layer would compute something else at its new index.
    """
    if cut.hidden is not None:
        wide = cut.with_all_channels
        return narrow_decoder(cut_decoder(dense, anatomy=anatomy, cut=wide), anatomy=anatomy, cut=cut)
    config = cut_config(dense.skeleton.config, anatomy, kept=cut.sizes)
    skeleton = build_skeleton(config, dense.skeleton, device=dense.device)
    changing = sizes_that_change(anatomy, cut.sizes)
    check_layer_equivalence(dense.skeleton, skeleton, keep=cut.layers, changing=changing)
    pruned = Decoder(
        skeleton,
        lambda new: cut_layer(dense.tensors(cut.layers[new]), anatomy, cut=cut, layer=cut.layers[new]),
        placement=LayerPlacement(tuple(map(dense.device_of, cut.layers))),
        items_returned=dense.items_returned,
    )
    pruned.images = dense.images
    return pruned


def narrow_decoder(wide: Decoder, *, anatomy: Anatomy, cut: Cut) -> Decoder:
    """Return a decoder with the kept residual channels of one that has all of them and the other parts of the cut.

    Its layers are as if the removed channels were zero. Raises ModelError if a layer would compute something else.
    """
    hidden, keep_K = residual_channels_of(anatomy), cut.hidden
    assert keep_K is not None, "channels are removed"
    config = narrow_config(wide.skeleton.config, anatomy, hidden_size=len(keep_K))
    take = partial(cut_outside, anatomy=anatomy, cut=cut)
    skeleton = build_skeleton(config, wide.skeleton, device=wide.device, cut=take)
    changing = sizes_of_hidden(hidden.size, len(keep_K))
    check_layer_equivalence(wide.skeleton, skeleton, keep=range(len(wide)), changing=changing)
    scale = scale_between(entering(skeleton), entering(wide.skeleton)[..., keep_K.to(wide.device)])
    for name, value in rescaled_embeddings(skeleton, hidden.outside, scale=scale).items():
        tensor_of(skeleton, name).data = value
    return Decoder(
        skeleton,
        lambda new: cut_channels(wide.tensors(new), hidden.layers[cut.layers[new]], keep_K=keep_K, size=hidden.size),
        placement=wide.placement,
        items_returned=wide.items_returned,
    )


def cut_outside(tensors: Tensors, *, anatomy: Anatomy, cut: Cut) -> Tensors:
    """Return tensors outside the layers with only the kept residual channels."""
    if cut.hidden is None:
        return tensors
    hidden = residual_channels_of(anatomy)
    return cut_channels(tensors, hidden.outside, keep_K=cut.hidden, size=hidden.size)


def cut_layer(tensors: Tensors, anatomy: Anatomy, *, cut: Cut, layer: int) -> Tensors:
    """Return a dense layer's tensors with only the kept neurons, heads and experts, others merged into these if asked.

    ``tensors`` may be some of the layer's; those without prunable dimensions are returned unchanged. ``layer``: its
    index in the dense model.
    """
    attention, block = anatomy.attention[layer], anatomy.blocks[layer]
    parts: list[tuple[tuple[PrunableDim, ...], Tensor | None]] = [
        (unit.tensors, cut.neurons.get(unit_key(layer, unit.path))) for unit in anatomy.units[layer]
    ]
    if attention is not None:
        parts.append((attention.tensors, cut.heads.get(unit_key(layer, attention.path))))
    kept = _selected(dict(tensors), parts)
    if block is None:
        return kept
    key = unit_key(layer, block.path)
    routed = next((unit for unit in anatomy.units[layer] if unit.experts is not None), None)
    if key in cut.merged and routed is not None and all(one.name in kept for one in routed.tensors):
        merged_E, usage_E = cut.merged[key], cut.usage[key]
        kept = merge_experts(kept, routed, block=block, merged_E=merged_E, usage_E=usage_E)
    return _selected(kept, [(block.tensors, cut.experts.get(key))])


def _selected(tensors: Tensors, parts: list[tuple[tuple[PrunableDim, ...], Tensor | None]]) -> Tensors:
    """Return the tensors with the kept units of each part; all units where its indices are None."""
    for prunables, keep in parts:
        for one in prunables:
            if keep is not None and one.name in tensors:
                tensors[one.name] = select_neurons(tensors[one.name], one, keep=keep)
    return tensors


def restore_layer(tensors: Tensors, originals: Originals, *, anatomy: Anatomy, cut: Cut, layer: int) -> Tensors:
    """Return a finished layer's tensors in the dtypes of the base's files; ``layer``: its index in the base."""

    def take(read: Tensors) -> Tensors:
        kept = cut_layer(read, anatomy, cut=cut, layer=layer)
        if cut.hidden is None:
            return kept
        hidden = residual_channels_of(anatomy)
        return cut_channels(kept, hidden.layers[layer], keep_K=cut.hidden, size=hidden.size)

    return originals.restore(tensors, f"{anatomy.layers_path}.{layer}.", cut=take)


def add_to_output(layer: nn.Module, unit: Unit, *, delta_DF: Tensor) -> None:
    """Add Δ [D, F] to the weight of a unit's output projection, in the weight's own layout and dtype."""
    weight = layer.get_submodule(unit.output).get_parameter("weight")
    delta = outputs_first(delta_DF, unit.tensors[-1])
    weight.data = (weight.float() + delta).to(weight.dtype)


def add_to_slice(tensor: Tensor, part: FusedSlice, *, delta_FI: Tensor) -> Tensor:
    """Return the tensor with Δ [F, I] added to the neurons' entries of a fused slice, in its own layout and dtype."""
    dim = part.tensor.dim
    rows_F = slice_rows(tensor.shape[dim], part).to(tensor.device)
    delta = delta_FI if dim == 0 else delta_FI.T
    return tensor.float().index_add(dim, rows_F, delta).to(tensor.dtype)
