"""Name of a job that its recipe gives."""

from __future__ import annotations

from llmprune.common.printing import printable
from llmprune.common.schema import format_count, format_size
from llmprune.recipe.budget import Budget
from llmprune.recipe.recipe import Recipe
from llmprune.recipe.width import Width
from llmprune.results.formatting import plural, short_model_name


def default_name(recipe: Recipe, base: str | None = None) -> str:
    """Return a name for a job, such as ``SmolLM2-135M-Instruct −2 layers, 75% MLP``.

    ``base``: the name of the job whose model it prunes.
    """
    model = base or short_model_name(recipe.model.id)
    cuts = _limited(recipe.budget) if recipe.budget else []
    if recipe.depth:
        count = recipe.depth.remove or len(recipe.depth.layers or ())
        cuts.append(f"−{plural(count, 'layer')}" if count else plural(recipe.depth.keep or 0, "layer"))
    if recipe.width:
        cuts += _narrowed(recipe.width)
    if recipe.experts:
        count = recipe.experts.remove or 0
        cuts.append(f"−{plural(count, 'expert')}" if count else plural(recipe.experts.keep or 0, "expert"))
    if recipe.hidden:
        kept = recipe.hidden.keep
        cuts.append(f"hidden {kept}" if isinstance(kept, int) else f"{_share(kept)} hidden")
    if recipe.vocabulary:
        cuts.append("fewer tokens")
    if recipe.sparsity:
        cuts.append(f"{recipe.sparsity.parsed} sparse")
    return printable(f"{model} {', '.join(cuts)}".strip())[:120]


def _limited(budget: Budget) -> list[str]:
    """Describe a budget: ``80% parameters``, ``at most 6 B parameters``, ``1.5× speed``."""
    return [
        f"{', '.join(_amount(name, value) for value in values)} {name.replace('_', ' ')}"
        for name, values in budget.limits.items()
    ]


def _amount(name: str, value: float | int) -> str:
    if name == "speed":
        return f"{value:g}×"
    if isinstance(value, float):
        return _share(value)
    return format_size(value) if name in ("weights", "kv_cache") else format_count(value)


def _narrowed(width: Width) -> list[str]:
    """Describe what a width section keeps: ``75% MLP``, ``1,152 neurons``, ``2 key-value heads``."""
    kept = []
    if width.mlp is not None:
        kept.append(f"{_share(width.mlp)} MLP")
    elif isinstance(width.neurons, int):
        kept.append(plural(width.neurons, "neuron"))
    elif width.neurons:
        kept.append("narrower MLP")
    if isinstance(width.heads, int):
        kept.append(plural(width.heads, "key-value head"))
    elif width.heads is not None:
        kept.append(f"{_share(width.heads)} heads")
    return kept


def _share(fraction: float) -> str:
    """Format a fraction as ``75%`` or ``99.9%``, with enough digits that only the whole is 100%."""
    return f"{fraction * 100:.6g}%"
