"""Find the sizes that a config field sets: build the model with another value and compare the shapes of its tensors.

Models are built without weights, and as a representative model: the same config with one layer of each kind, so that a
model of a hundred layers takes no longer than one of two.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from llmprune.anatomy.config_edits import edit_config
from llmprune.anatomy.layer_equivalence import check_layer_equivalence, one_of_layers
from llmprune.anatomy.meta_model import Config, build_meta_model, find_layers, text_config
from llmprune.anatomy.names import tensors_of

_PROBES = (64, 48)  # values to try; the first that differs from the field's own is used
_LEAST = 4  # a smaller value is no width
_FEWEST_EXPERTS = 2
_MOST_TIMES = 32  # multiple of a width that a dimension may be, as with shared experts, or gate and up in one tensor
# Fields of every config that are neither a width nor a number of experts.
_OTHER_SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
WIDTH_WORDS = ("inner", "intermediate", "ff", "feed_forward", "mlp")


@dataclass(frozen=True)
class Change:
    """A tensor of a layer whose dimension ``dim`` is ``times`` the value of a config field."""

    name: str
    dim: int
    times: int


@dataclass(frozen=True)
class Field:
    """A config field and the dimensions that it sets, by layer of the representative model.

    ``value``: the size in the model, which may differ from the config's value, because a class may adjust it.
    """

    name: str
    value: int
    changes: tuple[tuple[Change, ...], ...]

    @property
    def is_named_like_a_width(self) -> bool:
        """True where the name says that it is a width. Ranks and heads set sizes too, which even pass the proof."""
        return any(word in self.name for word in WIDTH_WORDS)


@dataclass(frozen=True)
class RepresentativeModel:
    """A model with one layer of each kind. ``layer_kinds[i]``: its layer that represents layer i of the dense model."""

    model: PreTrainedModel
    layer_kinds: tuple[int, ...]
    trust_remote_code: bool

    @property
    def layers(self) -> nn.ModuleList:
        """Decoder layers of the representative model."""
        return find_layers(self.model)[1]

    def with_fields(self, fields: Mapping[str, int]) -> PreTrainedModel | None:
        """Build the representative model with other values in these fields; None where its class cannot."""
        return rebuild(self.model.config, fields, trust_remote_code=self.trust_remote_code)


def rebuild(config: Config, fields: Mapping[str, int], *, trust_remote_code: bool) -> PreTrainedModel | None:
    """Build the model of a config with other values in some fields; None where its class cannot."""
    layers = range(text_config(config).num_hidden_layers)
    try:
        return build_meta_model(edit_config(config, layers, widths=dict(fields)), trust_remote_code=trust_remote_code)
    except Exception:  # a model class may fail in any way on a value that it does not expect
        return None


def build_representative(model: PreTrainedModel, trust_remote_code: bool) -> RepresentativeModel:
    """Build a model with one layer of each kind; the whole model where its config cannot express that."""
    _, layers = find_layers(model)
    kinds = [_kind(layer) for layer in layers]
    first = [kinds.index(kind) for kind in kinds]
    keep = sorted({*first, *one_of_layers(model.config)[:1]})
    try:
        small = build_meta_model(edit_config(model.config, keep, widths={}), trust_remote_code=trust_remote_code)
        check_layer_equivalence(model, small, keep=keep, changing=set())
    except Exception:  # a model class may fail in any way on fewer layers
        return RepresentativeModel(model, tuple(first), trust_remote_code)
    return RepresentativeModel(small, tuple(keep.index(index) for index in first), trust_remote_code)


def _kind(layer: nn.Module) -> tuple[str, tuple[tuple[str, torch.Size], ...]]:
    return type(layer).__name__, tuple((name, tensor.shape) for name, tensor in tensors_of(layer))


def fields_that_set_sizes(representative: RepresentativeModel) -> list[Field]:
    """Return every integer field that sets sizes in the layers and nothing else."""
    text = text_config(representative.model.config)
    skipped = {text.attribute_map.get(name, name) for name in _OTHER_SIZES}
    sizes = {size for _, tensor in tensors_of(representative.layers) for size in tensor.shape}
    found = []
    for name, value in text.to_dict().items():
        if name not in skipped and _may_set_sizes(name, value, sizes=sizes):
            probe = next(probe for probe in _PROBES if probe != value)
            other = representative.with_fields({name: probe})
            field = compare_models(representative, other, name=name, probe=probe) if other is not None else None
            if field is not None:
                found.append(field)
    return found


def _may_set_sizes(name: str, value: object, *, sizes: set[int]) -> bool:
    least = _FEWEST_EXPERTS if "expert" in name else _LEAST
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
        return False
    if any(word in name for word in WIDTH_WORDS):
        return True
    return value is not None and any(size % value == 0 and size // value <= _MOST_TIMES for size in sizes)


def compare_models(
    representative: RepresentativeModel, other: PreTrainedModel, *, name: str, probe: int, most_times: int = _MOST_TIMES
) -> Field | None:
    """Return the dimensions that a field sets, by comparison with a model that has the value ``probe`` in it.

    ``most_times``: the largest multiple of the value that a dimension may be. None where the models do not differ by
    multiples of one size within the layers.
    """
    before, after = dict(tensors_of(representative.model)), dict(tensors_of(other))
    path, layers = find_layers(representative.model)
    if before.keys() != after.keys():
        return None
    changes: list[list[Change]] = [[] for _ in layers]
    values = set()
    for key in before:
        if before[key].shape == after[key].shape:
            continue
        found = _change(before[key], after[key], probe=probe, most_times=most_times)
        if found is None or not key.startswith(f"{path}."):
            return None
        dim, times = found
        index, _, inside = key.removeprefix(f"{path}.").partition(".")
        changes[int(index)].append(Change(inside, dim, times))
        values.add(before[key].shape[dim] // times)
    if len(values) != 1 or not any(changes):
        return None
    return Field(name, values.pop(), tuple(map(tuple, changes)))


def _change(before: torch.Tensor, after: torch.Tensor, *, probe: int, most_times: int) -> tuple[int, int] | None:
    """Return (dimension, multiple of the field's value) where one dimension follows the field; else None."""
    if before.ndim != after.ndim:
        return None
    dims = [dim for dim in range(before.ndim) if before.shape[dim] != after.shape[dim]]
    if len(dims) != 1:
        return None
    times, rest = divmod(after.shape[dims[0]], probe)
    whole = not rest and 1 <= times <= most_times and before.shape[dims[0]] % times == 0
    return (dims[0], times) if whole else None


def follows_everywhere(model: PreTrainedModel, field: Field, *, representative: RepresentativeModel) -> bool:
    """Check that a field sets the same dimensions in every layer of the whole model as in its representative."""
    if model is representative.model:
        return True
    probe = next(probe for probe in _PROBES if probe != field.value)
    other = rebuild(model.config, {field.name: probe}, trust_remote_code=representative.trust_remote_code)
    return other is not None and changes_like_representative(
        model, other, field=field, representative=representative, probe=probe
    )


def changes_like_representative(
    model: PreTrainedModel,
    other: PreTrainedModel,
    *,
    field: Field,
    representative: RepresentativeModel,
    probe: int,
    most_times: int = _MOST_TIMES,
) -> bool:
    """Check that ``other`` differs from the whole model as the field's changes in the representative predict."""
    whole = RepresentativeModel(model, tuple(range(len(representative.layer_kinds))), representative.trust_remote_code)
    found = compare_models(whole, other, name=field.name, probe=probe, most_times=most_times)
    return found is not None and all(
        changes == field.changes[kind] for changes, kind in zip(found.changes, representative.layer_kinds, strict=True)
    )
