"""Agreement of all processes of a run, checked before the work: they may run on different machines."""

from __future__ import annotations

from typing import Any

from llmprune.common.distributed import require_agreement, world_size
from llmprune.common.versions import versions
from llmprune.pipeline.context import RunContext
from llmprune.results.run_folder.fingerprints import code_fingerprint, fingerprint

# Parts of a plan that depend on each process's GPU and each machine's memory.
_OWN: dict[str, Any] = {
    **dict.fromkeys(("memory", "batch_sizes", "devices", "shortage", "durations", "notes"), True),
    "recovery": {"memory": True, "checkpointing": True},
}


def require_same_everywhere(context: RunContext) -> None:
    """Raise PeerError where another process reads another recipe, model or text, or runs other code."""
    if world_size() == 1:
        return
    inputs = context.inputs
    require_agreement("the code and its libraries", fingerprint(code_fingerprint(), *versions().values()))
    require_agreement("the recipe", fingerprint(context.recipe.model_dump_json()))
    require_agreement("the base model", fingerprint(inputs.commit, inputs.config.to_json_string()))
    plan = context.plan.model_dump_json(exclude=_OWN)
    require_agreement("the plan", fingerprint(plan))
    require_agreement("the calibration tokens", inputs.text_fingerprint)
