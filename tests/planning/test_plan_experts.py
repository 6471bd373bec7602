"""Plans for mixtures of experts: widths and numbers of experts to keep, and refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.tiny import structure_of

from llmprune.common.errors import RecipeError
from llmprune.recipe.recipe import Recipe
from llmprune.testing import tiny_config


def _plan(folder: Path, sections: str) -> Any:
    return structure_of(Recipe.parse(f"model: {{id: '{folder}'}}\ncalibration: {{dataset: text.txt}}\n{sections}\n"))


@pytest.mark.parametrize(
    ("family", "overrides", "reason"),
    [
        ("llama4_text", {}, "not told which experts each token is routed to"),
        ("deepseek_v3", {"n_routed_experts": 8, "n_group": 4, "topk_group": 2}, "4 groups needs all of its 2 experts"),
        ("deepseek_v3", {"n_routed_experts": 16, "n_group": 4, "topk_group": 2}, r"4 groups, .*keep 8, 12, 16"),
        ("llama", {}, "no mixture of experts"),
    ],
)
def test_removal_of_experts_is_refused_with_a_reason(
    family: str, overrides: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    """The plan states why experts cannot be removed: no scores, groups that need all, unequal groups, or no mixture."""
    tiny_config(family, **overrides).save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match=reason):
        _plan(tmp_path, "experts: {remove: 1}")


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            "width: {neurons: 32}",
            r"several widths: moe_intermediate_size \(48\), shared_expert_intermediate_size \(96\)",
        ),
        ("width: {neurons: {moe_size: 32}}", "moe_size: is not a width of this model; its widths are: moe_"),
        ("width: {neurons: {moe_intermediate_size: 64}}", "64 is more than the 48 neurons"),
        ("experts: {keep: 1}", "1 of 4 experts would be kept, and each token is routed to 2; keep 2–4"),
        ("experts: {remove: 3}", "1 of 4 experts would be kept"),
        ("experts: {keep: 5}", "keep 2–4"),
        ("experts: {keep: 2, remove: 2}", "exactly one of remove, keep"),
        ("width: {neurons: {moe_intermediate_size: 0}}", "must be above 0"),
    ],
)
def test_impossible_sizes_are_refused(sections: str, message: str, tmp_path: Path) -> None:
    """A number needs the name of its width where there are several, and the router's top k of experts must be kept."""
    tiny_config("qwen2_moe").save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match=message):
        _plan(tmp_path, sections)


def test_a_fraction_applies_to_every_width(tmp_path: Path) -> None:
    """A fraction cuts every width, each rounded separately; a named width cuts no other."""
    tiny_config("qwen2_moe").save_pretrained(tmp_path)
    plan = _plan(tmp_path, "width: {mlp: 0.67}")
    assert plan.keep_widths == {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 64}
    plan = _plan(tmp_path, "width: {neurons: {moe_intermediate_size: 32}}\nexperts: {keep: 3}")
    assert plan.pruned.widths == {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 96}
    assert (plan.dense.experts, plan.pruned.experts) == (4, 3)
    assert plan.parameters_exact
