"""Find attention heads by key-value group: the config fields that count them, and the sizes that follow.

A group is a key-value head with the query heads that read it. ``attention`` proposes and proves the units.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from transformers import PreTrainedModel

from llmprune.anatomy.attention import MOST_ROWS, Units, attention_units
from llmprune.anatomy.config_edits import edit_config
from llmprune.anatomy.config_probe import (
    Field,
    RepresentativeModel,
    changes_like_representative,
    compare_models,
    rebuild,
)
from llmprune.anatomy.meta_model import Config, quiet_transformers, text_config
from llmprune.anatomy.types import Heads
from llmprune.common.errors import ModelError


def find_heads(
    model: PreTrainedModel, representative: RepresentativeModel, *, small: Sequence[dict[str, int]]
) -> tuple[Heads | None, Units]:
    """Return the heads of the model, and the attention unit of every layer of the representative model.

    ``small``: values of config fields that make the model quick to run, tried in turn until the proof holds.
    """
    counted = count_heads(model.config)
    nothing: Units = (None,) * len(representative.layers)
    if counted is None or counted.refusal:
        return counted, nothing
    refusal = ""
    for fixed in ways_to_fix_head_size(model.config):
        heads = replace(counted, fixed=fixed)
        heads = replace(heads, possible=_possible(model, heads))
        found = _field(model, representative, heads=heads)
        if isinstance(found, str):
            refusal = refusal or found
            continue
        units = attention_units(found, representative, heads=heads, small=small)
        return (replace(counted, refusal=units), nothing) if isinstance(units, str) else (heads, units)
    return replace(counted, refusal=refusal), nothing


def count_heads(config: Config) -> Heads | None:
    """Return the key-value groups that a config declares; None where it counts no attention heads."""
    text = text_config(config)
    query, key = (text.attribute_map.get(name, name) for name in ("num_attention_heads", "num_key_value_heads"))
    fields = text.to_dict()
    heads, groups = fields.get(query), fields.get(key)
    if not isinstance(heads, int) or heads < 1:
        return None
    if not isinstance(groups, int):
        groups = heads
    per_group = {query: heads // groups} | ({key: 1} if isinstance(fields.get(key), int) else {})
    refusal = None
    if heads % groups:
        refusal = f"{query} ({heads}) is not a multiple of {key} ({groups})"
    elif groups == 1:
        refusal = "all its heads share one key and value, so there is one group, which must stay"
    return Heads(groups, per_group, {}, (), refusal)


def ways_to_fix_head_size(config: Config) -> list[dict[str, int]]:
    """Return settings that may keep the size of a head when their number changes: none, or an explicit head_dim."""
    text = text_config(config)
    name = text.attribute_map.get("head_dim", "head_dim")
    stated = text.to_dict().get(name)
    if isinstance(stated, int) or isinstance(getattr(type(text), name, None), property):
        return [{}]
    return [{}, {name: text.hidden_size // text.num_attention_heads}]


def _possible(model: PreTrainedModel, heads: Heads) -> tuple[int, ...]:
    """Return the smaller numbers of groups that a config of this model accepts."""
    layers = range(text_config(model.config).num_hidden_layers)

    def accepted(groups: int) -> bool:
        try:
            with quiet_transformers():
                edit_config(model.config, layers, widths=heads.fields(groups))
        except ModelError:
            return False
        return True

    return tuple(groups for groups in range(1, heads.count) if accepted(groups))


def _field(model: PreTrainedModel, representative: RepresentativeModel, *, heads: Heads) -> Field | str:
    """Return the sizes that the number of groups sets in the representative model; or the reason why it must stay."""
    names = " and ".join(heads.per_group)
    built = ((groups, representative.with_fields(heads.fields(groups))) for groups in _likely_first(heads))
    fewer, other = next((pair for pair in built if pair[1] is not None), (0, None))
    if other is None:
        return f"no model can be built with smaller {names}"
    whole = (
        other
        if model is representative.model
        else rebuild(model.config, heads.fields(fewer), trust_remote_code=representative.trust_remote_code)
    )
    field = compare_models(representative, other, name=names, probe=fewer, most_times=MOST_ROWS)
    if field is None or field.value != heads.count:
        return (
            f"a model with smaller {names} would not reload: these fields do not set sizes of the attention alone, for "
            "example where the size of a head is hidden_size divided by their number"
        )
    if whole is None or not changes_like_representative(
        model, whole, field=field, representative=representative, probe=fewer, most_times=MOST_ROWS
    ):
        return f"{names} do not set the same sizes in all layers of a kind"
    return field


def _likely_first(heads: Heads) -> list[int]:
    """Sort the possible numbers of groups: divisors of the dense number first, larger before smaller."""
    return sorted(heads.possible, key=lambda groups: (heads.count % groups, -groups))
