"""Decide which prediction heads the result keeps, and cut their layers as those of the decoder.

A head reads hidden states and tokens, whose sizes no cut of layers or widths changes, so its tensors stay valid. Its
layer is built from the same config fields as the decoder's: a cut of neurons, heads or experts must be made in it too.
The run never executes it, so the units with the largest weights are kept (arXiv 1506.02626).

Shapes in names: E experts, F units, K units kept.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from llmprune.anatomy.meta_model import build_meta_model, text_config
from llmprune.anatomy.selection import neuron_rows
from llmprune.anatomy.types import Anatomy, MlpUnit, PrunableDim, unit_key
from llmprune.checkpoint.file_names import FileNames, Tensors
from llmprune.checkpoint.head_tensors import HeadLayer, HeadTensors, find_head_tensors, others_of
from llmprune.checkpoint.result.config_file import ConfigChange, edited_config
from llmprune.checkpoint.weights_reader import WeightsReader
from llmprune.common.errors import ModelError
from llmprune.cut.apply import cut_layer
from llmprune.cut.decision import Cut


@dataclass(frozen=True)
class HeadsDecision:
    """Decision on a base's prediction heads: kept, narrowed, or left out with the reason.

    ``layers``: those that lose units with the decoder's, empty where nothing but decoder layers is removed; ``reason``:
    why the heads are not kept, None where they are.
    """

    tensors: HeadTensors
    layers: tuple[HeadLayer, ...] = ()
    reason: str | None = None

    @property
    def kept(self) -> bool:
        """True where the result has the heads."""
        return self.reason is None


def decide_heads(names: FileNames, *, change: ConfigChange, narrowed: bool, keep: bool) -> HeadsDecision | None:
    """Return the decision on the heads in a base's files; None without heads, and for a model with code of its own.

    ``change``: of the config, with the heads still counted after it; ``narrowed``: True where neurons, heads or experts
    are removed; ``keep``: as the recipe asks.
    """
    found = None if change.before.is_custom_code() else find_head_tensors(names)
    if found is None:
        return None
    reason = None if keep else "export.prediction_heads is drop"
    if reason is None and found.is_quantised:
        reason = "their weights are quantised"
    reason = reason or _other_stream(change) or _inexpressible(change) or _unexpected(found, change)
    if reason is not None or not narrowed:
        return HeadsDecision(found, reason=reason)
    layers = tuple(found.layers_like(names))
    return HeadsDecision(found, layers, _unfollowed(found, layers, change=change))


def _other_stream(change: ConfigChange) -> str | None:
    before, after = (text_config(config).hidden_size for config in (change.before, change.after))
    return None if before == after else "their repair after a cut of the hidden size is not known"


def _inexpressible(change: ConfigChange) -> str | None:
    try:
        edited_config(change)
    except ModelError as error:
        return f"no config of the result counts them: {error}"
    return None


def _unexpected(found: HeadTensors, change: ConfigChange) -> str | None:
    """Return a reason where a plain load of the result would report the heads' tensors as unexpected."""
    model = build_meta_model(change.after)
    ignored = model._keys_to_ignore_on_load_unexpected or ()
    patterns = [re.compile(pattern) for pattern in ignored]
    for name in found.names:
        new = found.renamed(name, len(change.layers))
        if not any(pattern.search(new) for pattern in patterns):
            return (
                f"with {len(change.layers)} layers they would be stored as {new}, which a plain load with this "
                f"transformers reports as unexpected (it ignores {', '.join(sorted(ignored))}); cut no layers to keep "
                "them"
            )
    return None


def _unfollowed(found: HeadTensors, layers: tuple[HeadLayer, ...], *, change: ConfigChange) -> str | None:
    """Return a reason where a head has parts that the cut may concern, and that are not those of a decoder layer."""
    text = text_config(change.before)
    hidden = text.hidden_size
    plain = {1, hidden, 2 * hidden, text.vocab_size}
    unknown = [name for name in others_of(found.names, layers) if set(found.headers[name].shape) - plain]
    if layers and not unknown:
        return None
    example = f" ({unknown[0]})" if unknown else ""
    return (
        f"they are not built like a layer of the decoder{example}, so neurons, heads or experts cannot be removed from "
        "them as the config would say; remove only layers to keep them"
    )


def stored_heads(
    decision: HeadsDecision, reader: WeightsReader, *, anatomy: Anatomy, cut: Cut, skeleton: PreTrainedModel
) -> Iterator[Tensors]:
    """Yield the heads' tensors by their names in the result's files, in the types of the base's files.

    ``skeleton``: of the pruned model.
    """
    found, count = decision.tensors, len(cut.layers)
    for layer in decision.layers:
        narrowed = _narrowed(layer, reader, anatomy=anatomy, cut=cut, skeleton=skeleton)
        yield {found.renamed(name, count): tensor for name, tensor in narrowed.items()}
    yield {found.renamed(name, count): reader.stored(name) for name in others_of(found.names, decision.layers)}


def _narrowed(
    layer: HeadLayer, reader: WeightsReader, *, anatomy: Anatomy, cut: Cut, skeleton: PreTrainedModel
) -> Tensors:
    """Return the tensors of a head's layer without the units that it loses, by their names in the base's files."""
    names, prefix = reader.names, f"{anatomy.layers_path}.{layer.template}."
    own = [name for name in names.model.state_dict() if name.startswith(prefix) and names.has(name)]

    def of_head(source: str) -> Tensor:
        return reader.stored(layer.prefix + source.removeprefix(layer.template_prefix))

    read = names.convert(own, of_head, dtypes=None)
    tensors = {name.removeprefix(prefix): tensor for name, tensor in read.items()}
    heavy = keep_heaviest(tensors, anatomy, cut=cut, layer=layer.template)
    kept = cut_layer(tensors, anatomy, cut=heavy, layer=layer.template)
    stored = revert_weight_conversion(skeleton, {prefix + name: tensor for name, tensor in kept.items()})
    return {layer.prefix + name.removeprefix(layer.template_prefix): tensor for name, tensor in stored.items()}


def keep_heaviest(tensors: Tensors, anatomy: Anatomy, *, cut: Cut, layer: int) -> Cut:
    """Return a cut with the sizes of another, that keeps the units with the largest norms of all their weights.

    ``tensors``: of one layer, built like the decoder's layer ``layer``, by their names in it.
    """
    neurons, heads, experts = dict[str, Tensor](), dict[str, Tensor](), dict[str, Tensor]()
    for unit in anatomy.units[layer]:
        kept = cut.widths.get(unit.field, unit.width // unit.times) * unit.times
        if kept < unit.width:
            neurons[unit_key(layer, unit.path)] = _heaviest_neurons(tensors, unit, kept=kept)
    attention, block = anatomy.attention[layer], anatomy.blocks[layer]
    if attention is not None and cut.kv_groups is not None:
        heads[unit_key(layer, attention.path)] = _heaviest(_energies(tensors, attention.tensors), cut.kv_groups)
    if block is not None and cut.num_experts is not None:
        experts[unit_key(layer, block.path)] = _heaviest(_energies(tensors, block.tensors), cut.num_experts)
    return replace(cut, neurons=neurons, heads=heads, experts=experts)


def _heaviest_neurons(tensors: Tensors, unit: MlpUnit, *, kept: int) -> Tensor:
    """Return the neurons to keep, int64 [K]; [E, K] for stacked experts, each with its own."""
    if unit.experts is None:
        return _heaviest(_energies(tensors, unit.tensors), kept)
    own = [replace(one, dim=one.dim - 1) for one in unit.tensors]
    each = (_energies({one.name: tensors[one.name][expert] for one in own}, own) for expert in range(unit.experts))
    return torch.stack([_heaviest(energy_F, kept) for energy_F in each])


def _energies(tensors: Tensors, parts: Sequence[PrunableDim]) -> Tensor:
    """Return the squared norm of all weights of each unit [F]."""
    rows = (neuron_rows(tensors[one.name].float(), one) for one in parts)
    return sum((one.reshape(len(one), -1).square().sum(1) for one in rows), torch.zeros(()))


def _heaviest(energy_F: Tensor, kept: int) -> Tensor:
    """Return the indices of the largest values, ascending, int64 [K]."""
    return energy_F.topk(kept).indices.sort().values
