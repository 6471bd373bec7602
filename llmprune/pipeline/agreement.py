"""What all processes of a run must have the same before they begin: they may run on different machines."""

from __future__ import annotations

from llmprune.common.distributed import require_agreement, world_size
from llmprune.common.versions import versions
from llmprune.pipeline.inputs import RunInputs
from llmprune.planning.plan import Plan
from llmprune.recipe.recipe import Recipe
from llmprune.results.run_folder import code_fingerprint, fingerprint


def require_same_everywhere(recipe: Recipe, plan: Plan, *, bench: RunInputs) -> None:
    """Raise PeerError where another process reads another recipe, model or text, or runs other code."""
    if world_size() == 1:
        return
    require_agreement("the code and its libraries", fingerprint(code_fingerprint(), *versions().values()))
    require_agreement("the recipe", fingerprint(recipe.model_dump_json()))
    require_agreement("the base model", fingerprint(bench.commit, bench.config.to_json_string()))
    require_agreement("the plan", fingerprint(plan.model_dump_json()))
    require_agreement("the calibration tokens", bench.windows_fingerprint)
