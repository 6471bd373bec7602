"""What other tools derive instead of reading it from the config: said where a cut makes that wrong.

transformers and vLLM read lists by layer and the size of a head from config.json. llama.cpp's conversion to GGUF
takes a period for the kinds of layers, the number of layers for Gemma's attention scale, and hidden_size divided by
the number of heads for their size, where the original models allow it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel

from llmprune.anatomy.layer_equivalence import plain_attributes
from llmprune.anatomy.meta_model import Config, find_layers, text_config
from llmprune.anatomy.types import Anatomy, Heads, LayerPattern
from llmprune.cut.layer_choice import first_break

_SCALE = "query_pre_attn_scalar"


def about_patterns(patterns: Sequence[LayerPattern], keep: Sequence[int]) -> list[str]:
    """Say which patterns the kept layers no longer follow, a sentence for each."""
    notes = []
    for pattern in patterns:
        new = first_break(pattern, keep)
        if new is not None:
            notes.append(
                f"{pattern.name} repeats every {pattern.period} layers in the base and not in what is kept: layer "
                f"{new} is {pattern.kinds[keep[new]]} where the period says {pattern.kinds[new]}; tools that assume "
                "the period compute another model, llama.cpp (GGUF) among them, while transformers and vLLM read the "
                "config's list; depth.keep_pattern: true removes only layers that keep it"
            )
    return notes


def patterns_at_risk(patterns: Sequence[LayerPattern]) -> list[str]:
    """Say what scores that do not look at patterns may break."""
    return [
        f"{pattern.name} repeats every {pattern.period} layers, and the scores may choose layers that break this: "
        "tools that assume the period would compute another model, llama.cpp (GGUF) among them; depth.keep_pattern: "
        "true removes only layers that keep it"
        for pattern in patterns
    ]


def settle_patterns(warnings: Sequence[str], patterns: Sequence[LayerPattern], *, keep: Sequence[int]) -> list[str]:
    """Return a plan's warnings with what it said of patterns at risk made what the cut did to them."""
    risks, broken = patterns_at_risk(patterns), about_patterns(patterns, keep)
    return [*(warning for warning in warnings if warning not in [*risks, *broken]), *broken]


def about_depth(anatomy: Anatomy, keep: Sequence[int], *, named: bool, keep_pattern: bool) -> list[str]:
    """Say what a plan knows of patterns. ``named``: the recipe names the layers that go."""
    if keep_pattern and not anatomy.patterns:
        return ["depth.keep_pattern: no kind of layer repeats with a period in this model, so any layers may go"]
    if len(keep) == anatomy.num_layers or keep_pattern:
        return []
    return about_patterns(anatomy.patterns, keep) if named else patterns_at_risk(anatomy.patterns)


def about_layer_count(dense: PreTrainedModel, pruned: PreTrainedModel) -> list[str]:
    """Say which values follow the number of layers: where a model's code derives them, and where another tool does."""
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
        notes.append(f"derived from the number of layers, so other than in the base: {', '.join(sorted(changed))}")
    config = text_config(dense.config)
    scale, size = getattr(config, _SCALE, None), getattr(config, "head_dim", None)
    if scale and size and scale != size:
        notes.append(
            f"the attention scale is set by {_SCALE} ({scale:g}) and not by head_dim ({size}): llama.cpp (GGUF) knows "
            "that by the base's number of layers alone, and takes head_dim for the pruned model; transformers and vLLM "
            f"read {_SCALE}"
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
    """Say which tools derive the size of a head, where heads go and the base leaves it to hidden_size and their number.

    ``raw``: the base's config.json as it stands; ``kept``: key-value groups.
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
            f"the config of this model type has no {name}, so the result's says {name}: {size}, which transformers and "
            "vLLM read; llama.cpp (GGUF) and other tools that compute hidden_size / num_attention_heads refuse the "
            "result or misread it"
        ]
    if size * text.num_attention_heads != text.hidden_size or _says(raw, name):
        return []
    return [
        f"the base's config.json leaves {name} to hidden_size / num_attention_heads, and the result's must say "
        f"{name}: {size}; transformers, vLLM and llama.cpp (GGUF) read it there, and tools that compute it refuse the "
        "result or misread it"
    ]


def _is_field(config: Config, name: str) -> bool:
    """Check whether a config's class knows a field: declared, or computed by the class."""
    return hasattr(type(config), name) or name in getattr(type(config), "__dataclass_fields__", {})


def _says(raw: Mapping[str, Any], name: str) -> bool:
    """Check whether a config.json, or one of its parts, names a field."""
    parts = [raw, *(value for value in raw.values() if isinstance(value, dict))]
    return any(part.get(name) is not None for part in parts)
