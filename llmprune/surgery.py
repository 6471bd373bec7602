"""Apply a cut: the pruned model's config, and each kept layer's tensors without their lost neurons."""

from __future__ import annotations

from transformers import PreTrainedModel

from llmprune.anatomy.blueprint import Config
from llmprune.anatomy.config_edits import edit_config
from llmprune.anatomy.proof import prove_twins, select_neurons
from llmprune.anatomy.value import Anatomy
from llmprune.cut import Cut
from llmprune.errors import ModelError
from llmprune.model.loading import build_skeleton
from llmprune.model.walk import Decoder, Tensors
from llmprune.scores import unit_key


def cut_config(config: Config, anatomy: Anatomy, layers: tuple[int, ...], width: int | None) -> Config:
    """The config that a reload of the pruned model reads. Raises ModelError for what cannot be cut."""
    if len(layers) < anatomy.num_layers and anatomy.depth_refusal:
        raise ModelError(f"the depth of this model cannot be cut: {anatomy.depth_refusal}")
    narrower = width is not None and width != anatomy.width
    if narrower and anatomy.width_field is None:
        raise ModelError(f"the MLP width of this model cannot be cut: {anatomy.width_refusal}")
    widths = {anatomy.width_field: width} if narrower and anatomy.width_field and width else {}
    return edit_config(config, layers, widths)


def cut_decoder(dense: Decoder, model: PreTrainedModel, anatomy: Anatomy, cut: Cut) -> Decoder:
    """The pruned model as a decoder: each layer is cut out of its dense layer when it is visited.

    Raises ModelError where a kept layer would change by moving.
    """
    skeleton = build_skeleton(cut_config(model.config, anatomy, cut.layers, cut.width), model)
    widths = {anatomy.width: cut.width} if anatomy.width and cut.width else {}
    prove_twins(dense.skeleton, skeleton, cut.layers, widths)
    decoder = Decoder(
        skeleton,
        lambda new: cut_layer(dense.tensors(cut.layers[new]), anatomy, cut, cut.layers[new]),
        lambda new: dense.device_of(cut.layers[new]),
    )
    decoder.returns_tuple = dense.returns_tuple
    return decoder


def cut_layer(tensors: Tensors, anatomy: Anatomy, cut: Cut, layer: int) -> Tensors:
    """A dense layer's tensors with only the kept neurons. Tensors without neurons are passed on as they are."""
    kept = dict(tensors)
    for unit in anatomy.units[layer]:
        keep_K = cut.neurons.get(unit_key(layer, unit.path))
        if keep_K is not None:
            for tensor_cut in unit.tensors:
                kept[tensor_cut.name] = select_neurons(kept[tensor_cut.name], tensor_cut, keep_K)
    return kept
