"""Warn where other tools would misread the pruned model, because they derive a value that its config states.

transformers and vLLM read lists by layer and the size of a head from config.json. llama.cpp's conversion to GGUF
derives the kinds of layers from a period, Gemma's attention scale from the number of layers, the size of a head from
hidden_size and the number of heads, and GPT-2's width from its hidden size, where the original models allow that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel

from llmprune.anatomy.layer_equivalence import plain_attributes
from llmprune.anatomy.layer_kinds import first_break, follow_from, kinds_of
from llmprune.anatomy.meta_model import Config, find_layers, text_config
from llmprune.anatomy.types import Anatomy, Heads, LayerPattern

_SCALE = "query_pre_attn_scalar"
_DERIVED_WIDTHS = {"n_inner": "4 × n_embd"}  # fields that llama.cpp's converter does not read, by what it writes


def about_patterns(patterns: Sequence[LayerPattern], keep: Sequence[int]) -> list[str]:
    """Return a sentence for each pattern that the kept layers no longer follow."""
    notes = []
    for pattern in patterns:
        new = first_break(pattern, keep)
        if new is not None:
            notes.append(
                f"{pattern.name} repeats every {pattern.period} layers in the base and not in the pruned model: layer "
                f"{new} is {pattern.kinds[keep[new]]} where the period has {pattern.kinds[new]}; tools that assume "
                "the period compute another model, llama.cpp (GGUF) among them, while transformers and vLLM read the "
                "config's list; depth.keep_pattern: true removes only layers that preserve it"
            )
    return notes


def patterns_at_risk(patterns: Sequence[LayerPattern]) -> list[str]:
    """Return a sentence for each pattern that layers chosen by scores alone may break."""
    return [
        f"{pattern.name} repeats every {pattern.period} layers, and the scores may choose layers that break this: "
        "tools that assume the period would compute another model, llama.cpp (GGUF) among them; depth.keep_pattern: "
        "true removes only layers that preserve it"
        for pattern in patterns
    ]


def settle_patterns(warnings: Sequence[str], patterns: Sequence[LayerPattern], *, keep: Sequence[int]) -> list[str]:
    """Return a plan's warnings, with those on patterns at risk replaced by those on patterns that the cut breaks."""
    risks, broken = patterns_at_risk(patterns), about_patterns(patterns, keep)
    return [*(warning for warning in warnings if warning not in [*risks, *broken]), *broken]


def about_depth(anatomy: Anatomy, keep: Sequence[int], *, named: bool, keep_pattern: bool) -> list[str]:
    """Return a plan's notes on patterns. ``named``: the recipe names the layers to remove."""
    if keep_pattern and not anatomy.patterns:
        return [
            "depth.keep_pattern: no kind of layer repeats with a period in this model, so any layers may be removed"
        ]
    if len(keep) == anatomy.num_layers or keep_pattern:
        return []
    if named:
        return about_patterns(anatomy.patterns, keep)
    by_index = kinds_of(anatomy.by_index, anatomy.num_layers)
    return patterns_at_risk([one for one in anatomy.patterns if not follow_from(by_index, one.kinds)])


def about_layer_count(dense: PreTrainedModel, pruned: PreTrainedModel) -> list[str]:
    """Return notes on values that depend on the number of layers, in the model's own code or in another tool."""
    if len(find_layers(dense)[1]) == len(find_layers(pruned)[1]):
        return []
    before, after = _values(dense), _values(pruned)
    changed = [
        f"{name} ({before[name]:.4g} → {after[name]:.4g})"
        for name in before.keys() & after.keys()
        if before[name] != after[name]
    ]
    notes = []
    if changed:
        notes.append(f"derived from the number of layers, so different from the base: {', '.join(sorted(changed))}")
    config = text_config(dense.config)
    scale, size = getattr(config, _SCALE, None), getattr(config, "head_dim", None)
    if scale and size and scale != size:
        notes.append(
            f"the attention scale is set by {_SCALE} ({scale:g}) and not by head_dim ({size}): llama.cpp (GGUF) "
            "recognises that by the base's number of layers alone, and uses head_dim for the pruned model; "
            f"transformers and vLLM read {_SCALE}"
        )
    return notes


def _values(model: PreTrainedModel) -> dict[str, float]:
    """Return the floating-point values of the config, and of the modules outside the layers."""
    path, _ = find_layers(model)
    found = {name: value for name, value in text_config(model.config).to_dict().items() if isinstance(value, float)}
    for place, module in model.named_modules():
        if f"{place}.".startswith(f"{path}."):
            continue
        for name, value in plain_attributes(module).items():
            if isinstance(value, float):
                found[f"{place}.{name}".lstrip(".")] = value
    return found


def about_head_size(config: Config, raw: Mapping[str, Any], *, heads: Heads | None, kept: int | None) -> list[str]:
    """Return a note where heads are removed and the base leaves their size to hidden_size and their number.

    ``raw``: the base's config.json as it is; ``kept``: key-value groups kept.
    """
    if heads is None or kept is None or kept == heads.count:
        return []
    text = text_config(config)
    name = text.attribute_map.get("head_dim", "head_dim")
    size = heads.fields(kept).get(name) or text.to_dict().get(name)
    if not isinstance(size, int):
        return []
    if not _is_field(text, name):
        return [
            f"the config of this model type has no {name}, so the result's states {name}: {size}, which transformers "
            "and vLLM read; llama.cpp (GGUF) and other tools that compute hidden_size / num_attention_heads refuse the "
            "result or misread it"
        ]
    if size * text.num_attention_heads != text.hidden_size or _states(raw, name):
        return []
    return [
        f"the base's config.json leaves {name} to hidden_size / num_attention_heads, and the result's must state "
        f"{name}: {size}; transformers, vLLM and llama.cpp (GGUF) read it there, and tools that compute it refuse the "
        "result or misread it"
    ]


def about_derived_widths(anatomy: Anatomy, widths: Mapping[str, int]) -> list[str]:
    """Return a note for each narrowed width that llama.cpp derives. ``widths``: neurons kept, by config field."""
    return [
        f"llama.cpp's conversion to GGUF takes {derived} for the MLP width of this model type and does not read "
        f"{field}, so that it cannot load the result; for GGUF leave the width out and remove layers"
        for field, derived in _DERIVED_WIDTHS.items()
        if widths.get(field, 0) and widths[field] < anatomy.widths.get(field, 0)
    ]


def _is_field(config: Config, name: str) -> bool:
    """Check whether a config class has a field, declared or computed."""
    return hasattr(type(config), name) or name in getattr(type(config), "__dataclass_fields__", {})


def _states(raw: Mapping[str, Any], name: str) -> bool:
    """Check whether a config.json, or one of its parts, has a value for a field."""
    parts = [raw, *(value for value in raw.values() if isinstance(value, dict))]
    return any(part.get(name) is not None for part in parts)
