"""Attention heads by key-value group: the config fields that count them, and what follows these.

A group is a key-value head with the query heads that read it. ``attention`` proposes and proves the units.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from transformers import PreTrainedModel

from llmprune.anatomy.attention import MOST_ROWS, Units, attention_units
from llmprune.anatomy.config_edits import edit_config
from llmprune.anatomy.config_probe import Field, RepresentativeModel, changes_like_representative, compare, rebuild
from llmprune.anatomy.meta_model import Config, quiet_transformers, text_config
from llmprune.anatomy.types import Heads
from llmprune.common.errors import ModelError


def find_heads(
    model: PreTrainedModel, representative: RepresentativeModel, *, small: Sequence[dict[str, int]]
) -> tuple[Heads | None, Units]:
    """The heads of the model, and the attention unit of every layer of the representative that has one.

    ``small``: fields that make the representative quick to run; of several, the first that proves the units counts.
    """
    counted = count_heads(model.config)
    nothing: Units = (None,) * len(representative.layers)
    if counted is None or counted.refusal:
        return counted, nothing
    refusal = ""
    for fixed in _ways_to_fix_the_size(model.config):
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
    """How many key-value groups a config says that there are; None where it counts no attention heads."""
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
        refusal = f"{query} ({heads}) is no multiple of {key} ({groups})"
    elif groups == 1:
        refusal = "all its heads share one key and value, and of these groups at least one must stay"
    return Heads(groups, per_group, {}, (), refusal)


def _ways_to_fix_the_size(config: Config) -> list[dict[str, int]]:
    """Fields that keep the size of a head whatever their number: none, or one that the config leaves to a formula."""
    text = text_config(config)
    name = text.attribute_map.get("head_dim", "head_dim")
    said = text.to_dict().get(name)
    if isinstance(said, int) or isinstance(getattr(type(text), name, None), property):
        return [{}]
    return [{}, {name: text.hidden_size // text.num_attention_heads}]


def _possible(model: PreTrainedModel, heads: Heads) -> tuple[int, ...]:
    """The smaller numbers of groups that a config of this model accepts."""
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
    """What the number of groups sets in each layer of the representative, or why it cannot be made smaller."""
    names = " and ".join(heads.per_group)
    built = ((groups, representative.with_fields(heads.fields(groups))) for groups in _likely_first(heads))
    fewer, other = next((pair for pair in built if pair[1] is not None), (0, None))
    if other is None:
        return f"no model can be built with less in {names}"
    whole = (
        other
        if model is representative.model
        else rebuild(model.config, heads.fields(fewer), trust_remote_code=representative.trust_remote_code)
    )
    field = compare(representative, other, name=names, probe=fewer, most_times=MOST_ROWS)
    if field is None or field.value != heads.count:
        return (
            f"a model with less in {names} would not reload: they do not set sizes in the attention and nothing else, "
            "as where the size of a head is hidden_size divided by their number"
        )
    if whole is None or not changes_like_representative(
        model, whole, field=field, representative=representative, probe=fewer, most_times=MOST_ROWS
    ):
        return f"{names} do not set the same in all layers of a kind"
    return field


def _likely_first(heads: Heads) -> list[int]:
    """The possible numbers of groups, those first that divide the number there is."""
    return sorted(heads.possible, key=lambda groups: (heads.count % groups, -groups))
