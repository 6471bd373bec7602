"""Work of the training after the cut: the dense model's predictions, and steps of forward and backward passes."""

from __future__ import annotations

from llmprune.planning.duration.generating import KEPT_TOGETHER, RECOVERY_GENERATED, plain, writing_part
from llmprune.planning.duration.operations import Work, head_operations
from llmprune.planning.duration.parts import Part, PlannedModels, Tokens, forward_work, visited
from llmprune.planning.recovery.plan import RecoveryPlan
from llmprune.recipe.recover import Recover

RECOVERY, VERIFIED_AGAIN = "recovery", "verification of the trained model"  # steps
PREDICTIONS, TRAINING = "recovery: dense predictions", "recovery: training"
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
    parts.append(Part(step=RECOVERY, name=PREDICTIONS, work=dense * models.reference, shared=True))
    training = _training(recover, plan, models=models, on_gpu=on_gpu)
    return [*parts, Part(step=RECOVERY, name=TRAINING, work=training, items=plan.steps, shared=True)]


def _training(recover: Recover, plan: RecoveryPlan, *, models: PlannedModels, on_gpu: bool) -> Work:
    """Return the work of all steps and measurements.

    A step has a forward pass, the gradients of activations, and those of the weights that are trained: each is worth a
    forward pass. Checkpointing repeats the forward pass of the layers; ``hidden_states`` adds one of the dense layers.
    """
    assert plan.tokens is not None
    assert plan.steps is not None
    lora, length = recover.method == "lora", plan.sequence_length
    held_out = plan.held_out * (len(plan.sources) + bool(plan.generated))
    measured = (plan.steps // recover.steps_between_checks(plan.steps) + 1) * held_out
    windows = plan.tokens / length
    of_layers = forward_work(models.pruned_costs(length), Tokens(1, length, 1))
    of_head = Work(products=head_operations(models.pruned) * length)
    work = of_layers * ((2 + (not lora) + plan.checkpointing) * windows + measured)
    work += of_head * ((2 + recover.embeddings) * windows + measured)
    if lora:
        work += Work(products=3 * 2 * plan.trained * plan.tokens)  # of adapters, whose weights are trained
    steps = Work(stream=float(_STEP_BYTES * plan.trained)) * plan.steps
    found = _in_type_of_training(work, models, on_gpu=on_gpu) + steps
    if recover.hidden_states:
        found += plain(forward_work(models.dense_costs(length), Tokens(1, length, 1))) * (models.reference * windows)
    return found


def _in_type_of_training(work: Work, models: PlannedModels, *, on_gpu: bool) -> Work:
    """Return the work in the type of the training: float32 on the CPU."""
    if on_gpu:
        return Work(plain_products=work.products, stream=work.stream, calls=work.calls)
    return Work(sums=work.products, stream=work.stream * 4 / models.itemsize, calls=work.calls)
