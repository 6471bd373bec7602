"""Find the residual channels: every dimension of every tensor that the hidden size sets, and its role.

Tensors are found by building the model with another hidden size (``config_probe``), the size of a head being fixed.
``hidden_proof`` proves on a small random model that these are all, and that channels can be removed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from llmprune.anatomy.config_edits import edit_config
from llmprune.anatomy.config_probe import RepresentativeModel, build_representative, rebuild
from llmprune.anatomy.experts import FEW_EXPERTS
from llmprune.anatomy.heads import ways_to_fix_head_size
from llmprune.anatomy.hidden_proof import prove_hidden_size
from llmprune.anatomy.meta_model import Config, build_meta_model, find_layers, quiet_transformers, text_config
from llmprune.anatomy.mlp import PROOF_WIDTH
from llmprune.anatomy.names import tensors_of
from llmprune.anatomy.types import Anatomy, HiddenDim, HiddenSize, MlpUnit
from llmprune.common.errors import ModelError

_LEAST = 32  # channels of the narrow model of a proof, at least
_NO_HEAD = 1  # the divisor of the hidden size where no heads are counted


def find_hidden_size(config: Config, anatomy: Anatomy, *, trust_remote_code: bool = False) -> HiddenSize:
    """Return the residual channels of the model that a config describes, or the reason why none can be removed."""
    model = build_meta_model(config, trust_remote_code=trust_remote_code)
    representative = build_representative(model, trust_remote_code)
    text = text_config(config)
    name = text.attribute_map.get("hidden_size", "hidden_size")
    size = text.to_dict().get(name)
    if not isinstance(size, int):
        return HiddenSize(name, 0, {}, (), (), (), f"its config states no {name}")
    refusal = ""
    ways = ways_to_fix_head_size(config) if isinstance(_heads(config), int) else [{}]
    for fixed in ways:
        found = HiddenSize(name, size, fixed, (), (), (), None)
        found = replace(found, possible=_possible(model, found))
        proven = _proven(found, model, representative=representative, anatomy=anatomy)
        if not isinstance(proven, str):
            return proven
        refusal = refusal or proven
    return HiddenSize(name, size, {}, (), (), (), refusal)


def _heads(config: Config) -> object:
    text = text_config(config)
    return text.to_dict().get(text.attribute_map.get("num_attention_heads", "num_attention_heads"))


def _possible(model: PreTrainedModel, hidden: HiddenSize) -> tuple[int, ...]:
    """Return the smaller hidden sizes that a config of this model accepts.

    Configs check divisibility, so all multiples of the smallest accepted step are accepted.
    """
    layers = range(text_config(model.config).num_hidden_layers)

    def accepted(size: int) -> bool:
        try:
            with quiet_transformers():
                edit_config(model.config, layers, widths=hidden.fields(size))
        except ModelError:
            return False
        return True

    heads = _heads(model.config)
    step = heads if isinstance(heads, int) and not accepted(hidden.size - 1) else 1
    sizes = range(hidden.size - step, 0, -step) if hidden.size % step == 0 else range(0)
    return tuple(sorted(sizes)) if sizes and accepted(sizes[0]) else ()


def _proven(
    hidden: HiddenSize, model: PreTrainedModel, *, representative: RepresentativeModel, anatomy: Anatomy
) -> HiddenSize | str:
    """Return the channels with their tensors in every layer of the model; or the reason why they are not proven."""
    if not hidden.possible:
        return f"its config accepts no smaller {hidden.field}"
    trust, kinds = representative.trust_remote_code, representative.layer_kinds
    probe = hidden.possible[len(hidden.possible) // 2]
    other = representative.with_fields(hidden.fields(probe))
    if other is None:
        return f"no model can be built with a smaller {hidden.field}"
    units = _units_by_kind(representative, anatomy)
    found = _dims(representative.model, other, hidden=hidden, probe=probe, units=units)
    if isinstance(found, str):
        return found
    if model is not representative.model:
        whole = rebuild(model.config, hidden.fields(probe), trust_remote_code=trust)
        by_layer = [units[kind] for kind in kinds]
        everywhere = None if whole is None else _dims(model, whole, hidden=hidden, probe=probe, units=by_layer)
        if not isinstance(everywhere, HiddenSize) or everywhere.layers != tuple(found.layers[kind] for kind in kinds):
            return f"{hidden.field} does not set the same sizes in all layers of a kind"
    refusal = ""
    for small in _small(anatomy):
        proven = _proof(found, representative, small=small)
        if not isinstance(proven, str):
            return replace(proven, layers=tuple(proven.layers[kind] for kind in kinds))
        refusal = proven
    return refusal


def _units_by_kind(representative: RepresentativeModel, anatomy: Anatomy) -> list[tuple[MlpUnit, ...]]:
    """Return the MLP units of each layer of the representative model."""
    kinds, layers = representative.layer_kinds, representative.layers
    shapes = [{name: tensor.shape for name, tensor in tensors_of(layer)} for layer in layers]
    known = [kind if kind in kinds else shapes.index(own) for kind, own in enumerate(shapes)]  # an extra one is like it
    return [anatomy.units[kinds.index(kind)] for kind in known]


def _small(anatomy: Anatomy) -> list[dict[str, int]]:
    """Return config values that make the model quick to run, to be tried in turn."""
    widths = {group.field: PROOF_WIDTH for group in anatomy.groups if group.refusal is None}
    experts = anatomy.experts
    cut = experts.field if experts and not experts.refusal else ""
    few = [widths | {cut: number} for number in FEW_EXPERTS if experts and cut and experts.count > number]
    return [*few, widths, {}]


def _proof(hidden: HiddenSize, representative: RepresentativeModel, *, small: dict[str, int]) -> HiddenSize | str:
    """Prove the channels on a pair of small models; or return the reason why that fails."""
    heads = _heads(representative.model.config)
    step = heads if isinstance(heads, int) else _NO_HEAD
    kept = step * -(-_LEAST // step)
    wide, narrow = (representative.with_fields(small | hidden.fields(size)) for size in (2 * kept, kept))
    if wide is None or narrow is None:
        return f"no small model can be built with {hidden.field} {kept}"
    return prove_hidden_size(hidden, wide, narrow=narrow, kept=kept)


def _dims(
    model: PreTrainedModel,
    other: PreTrainedModel,
    *,
    hidden: HiddenSize,
    probe: int,
    units: Sequence[Sequence[MlpUnit]],
) -> HiddenSize | str:
    """Return the channels with the tensors in which two models differ; or the reason why one cannot be cut."""
    path, layers = find_layers(model)
    before, after = dict(tensors_of(model)), dict(tensors_of(other))
    if before.keys() != after.keys():
        return f"{hidden.field} decides which tensors the model has"
    inside: list[list[HiddenDim]] = [[] for _ in layers]
    outside: list[HiddenDim] = []
    for name, tensor in before.items():
        dims = [dim for dim in range(tensor.ndim) if tensor.shape[dim] != after[name].shape[dim]]
        if not dims:
            continue
        if len(dims) > 1 or (tensor.shape[dims[0]], after[name].shape[dims[0]]) != (hidden.size, probe):
            sizes = f"{list(tensor.shape)} at {hidden.size} and {list(after[name].shape)} at {probe}"
            return f"{name} is not one size per channel: {sizes}"
        index, _, own = name.removeprefix(f"{path}.").partition(".")
        in_layer = name.startswith(f"{path}.")
        role = _role(model, name, dim=dims[0], units=units[int(index)] if in_layer else (), own=own)
        if role is None:
            return f"{name} is no projection, embedding or norm"
        (inside[int(index)] if in_layer else outside).append(replace(role, name=own if in_layer else name))
    return replace(hidden, layers=tuple(map(tuple, inside)), outside=tuple(outside))


def _role(model: PreTrainedModel, name: str, *, dim: int, units: Sequence[MlpUnit], own: str) -> HiddenDim | None:
    """Return the dimension with what its tensor does; None for an unknown kind. ``own``: name in its layer."""
    path, _, last = name.rpartition(".")
    module, tensor = model.get_submodule(path), dict(tensors_of(model))[name]
    if isinstance(module, nn.Embedding):
        return HiddenDim(name, dim, "writes")
    if isinstance(module, nn.Linear | Conv1D):
        inputs = 0 if isinstance(module, Conv1D) else 1
        return HiddenDim(name, dim, "reads" if tensor.ndim == 2 and dim == inputs else "writes")
    if tensor.ndim == 1:
        return HiddenDim(name, dim, "shifts" if last == "bias" else "scales")
    routed = [unit for unit in units if unit.experts is not None and own in {one.name for one in unit.tensors}]
    if routed:
        return HiddenDim(name, dim, "writes" if own == routed[0].tensors[-1].name else "reads")
    if tensor.ndim == 2 and dim == 1 and "bias" in last:  # of each expert's output
        return HiddenDim(name, dim, "writes")
    return HiddenDim(name, dim, "reads") if tensor.ndim == 2 and dim == 1 else None
