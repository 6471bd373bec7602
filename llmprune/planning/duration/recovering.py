"""Work of the training after the cut: the dense model's predictions, and steps of forward and backward passes."""

from __future__ import annotations

from llmprune.planning.duration.generating import KEPT_TOGETHER, RECOVERY_GENERATED, writing_part
from llmprune.planning.duration.operations import Work, head_operations
from llmprune.planning.duration.parts import Part, PlannedModels, Tokens, forward_work, visited
from llmprune.planning.recovery.plan import RecoveryPlan
from llmprune.recipe.recover import Recover

RECOVERY, VERIFIED_AGAIN = "recovery", "verification of the trained model"  # steps
PREDICTIONS, TRAINING = "recovery: dense predictions", "recovery: training"
_PASSES, _CHECKPOINTED = 3, 4  # forward passes that a step is worth: 1 forward, 2 backward; 1 more is repeated
_STEP_BYTES = 40  # that Adam reads and writes for a parameter in float32: weight, gradient, two moments


def recovery_parts(
    recover: Recover | None, plan: RecoveryPlan | None, *, models: PlannedModels, on_gpu: bool
) -> list[Part]:
    """Return the parts of the training; none without it."""
    if recover is None or plan is None:
        return []
    length, parts = plan.sequence_length, []
    if plan.generated:
        parts.append(
            writing_part(RECOVERY_GENERATED, models, count=plan.generated, length=length, at_a_time=KEPT_TOGETHER // 2)
        )
    if plan.steps is None or plan.tokens is None or plan.windows_of_step is None:
        assert plan.hours is not None, "one of tokens and hours is given"
        parts.append(Part(step=RECOVERY, name=PREDICTIONS, work=None))
        return [*parts, Part(step=RECOVERY, name=TRAINING, work=Work(seconds=3600 * plan.hours))]
    held_out = plan.held_out * (len(plan.sources) + bool(plan.generated))
    read = plan.tokens // length if recover.loss == "distillation" else 0
    tokens = Tokens(read + held_out, length, models.batches.calibration)
    costs = models.dense_costs(length)
    dense = forward_work(costs, tokens) + visited(costs) + Work(products=head_operations(models.dense) * tokens.count)
    parts.append(Part(step=RECOVERY, name=PREDICTIONS, work=dense, shared=True))
    checks = plan.steps // recover.steps_between_checks(plan.steps) + 1
    passes = (_CHECKPOINTED if plan.checkpointing else _PASSES) * plan.tokens / length + checks * held_out
    one = _window(models, length=length, on_gpu=on_gpu) * passes
    steps = Work(stream=float(_STEP_BYTES * plan.trained)) * plan.steps
    return [*parts, Part(step=RECOVERY, name=TRAINING, work=one + steps, items=plan.steps, shared=True)]


def _window(models: PlannedModels, *, length: int, on_gpu: bool) -> Work:
    """Return the work of a forward pass of the pruned model over one window: in float32 on the CPU."""
    work = forward_work(models.pruned_costs(length), Tokens(1, length, 1))
    products = work.products + head_operations(models.pruned) * length
    stream, calls = work.stream, work.calls
    if on_gpu:
        return Work(plain_products=products, stream=stream, calls=calls)
    return Work(sums=products, stream=stream * 4 / models.itemsize, calls=calls)
