"""Discover the anatomy of a model: units are proposed from the sizes that config fields set, then proven."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from transformers import PreTrainedModel

from llmprune.anatomy.config_probe import (
    Field,
    RepresentativeModel,
    build_representative,
    fields_that_set_sizes,
    follows_everywhere,
)
from llmprune.anatomy.depth import find_depth, find_special_last
from llmprune.anatomy.experts import FEW_EXPERTS, Blocks, expert_field, prove_experts
from llmprune.anatomy.heads import find_heads
from llmprune.anatomy.kept_results import KeptResults, config_key
from llmprune.anatomy.layer_equivalence import one_of_layers
from llmprune.anatomy.layer_patterns import find_patterns
from llmprune.anatomy.meta_model import Config, build_meta_model, find_layers, quiet_transformers
from llmprune.anatomy.mlp import PROOF_WIDTH, LayerUnits, units_of_field
from llmprune.anatomy.types import Anatomy, Experts, MlpUnit, WidthGroup
from llmprune.common.errors import ModelError

_FOUND = KeptResults[Anatomy]()


def discover(config: Config, trust_remote_code: bool = False) -> Anatomy:
    """Return the anatomy of the model that a config describes, without reading weights.

    Raises ModelError where it is no causal decoder or its layers are not found.
    """
    if trust_remote_code:  # the same config may be of other code
        return _discover(config, trust_remote_code)
    return _FOUND.get(config_key(config), lambda: _discover(config, trust_remote_code))


@quiet_transformers()
def _discover(config: Config, trust_remote_code: bool) -> Anatomy:
    model = build_meta_model(config, trust_remote_code=trust_remote_code)
    path, layers = find_layers(model)
    _refuse_bidirectional(model)
    representative = build_representative(model, trust_remote_code)
    fields = fields_that_set_sizes(representative)
    mixture = expert_field(fields, representative)
    small = _small(fields, mixture[0] if mixture else None)
    groups, units = _width_groups(model, fields, representative=representative, small=small)
    experts = _experts(model, mixture, representative=representative, small=small)
    heads, attention = find_heads(model, representative, small=small)
    by_index, depth_refusal = find_depth(model, trust_remote_code)
    last = () if by_index or depth_refusal else find_special_last(model, trust_remote_code)
    blocks = mixture[1] if mixture else (None,) * len(representative.layers)
    return Anatomy(
        model_type=config.model_type,
        layers_path=path,
        num_layers=len(layers),
        layer_classes=tuple(type(layer).__name__ for layer in layers),
        units=tuple(units[kind] for kind in representative.layer_kinds),
        groups=groups,
        attention=tuple(attention[kind] for kind in representative.layer_kinds),
        heads=heads,
        blocks=tuple(blocks[kind] for kind in representative.layer_kinds),
        experts=experts,
        patterns=find_patterns(model),
        one_of=one_of_layers(config) or last,
        by_index=by_index,
        depth_refusal=depth_refusal,
        width_refusal=_width_refusal(groups),
    )


def _refuse_bidirectional(model: PreTrainedModel) -> None:
    _, layers = find_layers(model)
    for name, module in layers.named_modules():
        if getattr(module, "is_causal", True) is False:
            raise ModelError(
                f"a model of type {model.config.model_type!r} is not a causal decoder: its layers "
                f"attend in both directions ({name}.is_causal is False); llmprune prunes decoder-only language models"
            )


def _small(fields: Sequence[Field], experts: Field | None) -> list[dict[str, int]]:
    """Return config values that make the model quick to run: narrow, first with few experts, then with all."""
    widths = {field.name: PROOF_WIDTH for field in fields if field.is_named_like_a_width}
    few = [widths | {experts.name: number} for number in FEW_EXPERTS if experts and experts.value > number]
    return [*few, widths]


def _width_groups(
    model: PreTrainedModel,
    fields: Sequence[Field],
    *,
    representative: RepresentativeModel,
    small: Sequence[dict[str, int]],
) -> tuple[tuple[WidthGroup, ...], list[tuple[MlpUnit, ...]]]:
    """Return every field that is named like a width, and the proven units of each layer of the representative model."""
    groups: list[WidthGroup] = []
    units: list[tuple[MlpUnit, ...]] = [()] * len(representative.layers)
    taken: set[tuple[int, str]] = set()
    for field in (field for field in fields if field.is_named_like_a_width):
        tensors = {(kind, change.name) for kind, changes in enumerate(field.changes) for change in changes}
        if tensors & taken:
            continue
        found = _proven_units(field, representative, small=small)
        if not isinstance(found, str) and not follows_everywhere(model, field, representative=representative):
            found = f"{field.name} does not set the same sizes in all layers of a kind"
        if not isinstance(found, str):
            taken |= tensors
            units = [(*before, *new) for before, new in zip(units, found, strict=True)]
        groups.append(WidthGroup(field.name, field.value, found if isinstance(found, str) else None))
    return tuple(groups), units


def _proven_units(
    field: Field, representative: RepresentativeModel, *, small: Sequence[dict[str, int]]
) -> LayerUnits | str:
    """Return the units of a width field from the first small model that proves them; or the last refusal."""
    refusal = ""
    for fields in small:
        found = units_of_field(field, representative, small=fields)
        if not isinstance(found, str):
            return found
        refusal = found
    return refusal


def _width_refusal(groups: Sequence[WidthGroup]) -> str | None:
    if any(group.refusal is None for group in groups):
        return None
    if groups:
        return "; ".join(f"{group.field}: {group.refusal}" for group in groups)
    return "no config field sets the width of an MLP and nothing else, so a narrower model would not reload"


def _experts(
    model: PreTrainedModel,
    mixture: tuple[Field, Blocks] | None,
    *,
    representative: RepresentativeModel,
    small: Sequence[dict[str, int]],
) -> Experts | None:
    experts = prove_experts(mixture, representative, small=small)
    if (
        experts
        and mixture
        and experts.refusal is None
        and not follows_everywhere(model, mixture[0], representative=representative)
    ):
        return replace(experts, refusal=f"{experts.field} does not set the same sizes in all layers of a kind")
    return experts
