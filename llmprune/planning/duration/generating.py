"""Work of generating text with transformers' own model: evaluation, verification, and windows of the model itself."""

from __future__ import annotations

from dataclasses import replace

from llmprune.planning.duration.operations import LayerCost, Work, head_operations
from llmprune.planning.duration.parts import Part, PlannedModels, Tokens, forward_work
from llmprune.recipe.recipe import Recipe

SELF_GENERATED = "self-generated windows"  # the step
RECOVERY_GENERATED = "self-generated windows for recover"  # the step
GENERATED_AT_A_TIME = 16  # windows of the calibration
KEPT_TOGETHER = 64  # windows for the training after the cut, half of them at a time: a batch of 8 takes as long

_CALLS_OF_GENERATE = 200  # operations that generating one token starts outside the layers
_CALLS_OF_CACHE = 20  # of a layer, to write to the cache, repeat its heads and make the mask


def self_generated_parts(recipe: Recipe, models: PlannedModels) -> list[Part]:
    """Return the part in which the first process has the dense model write windows; none where it writes none."""
    count, length = recipe.calibration.generated, recipe.calibration.shape()[1]
    return [writing_part(SELF_GENERATED, models, count=count, length=length)] if count else []


def writing_part(
    step: str, models: PlannedModels, *, count: int, length: int, at_a_time: int = GENERATED_AT_A_TIME
) -> Part:
    """Return the part in which the dense model writes ``count`` windows of ``length`` tokens."""
    prompts = Tokens(count, 1, min(count, at_a_time))
    return Part(
        step=step, name=step, work=generating(models, models.dense_costs(length), steps=length, prompts=prompts)
    )


def generating(models: PlannedModels, costs: tuple[LayerCost, ...], *, steps: int, prompts: Tokens) -> Work:
    """Return the work of greedy generation by one model: the prompts, then token by token."""
    return plain(forward_work(costs, prompts)) + decoding(models, costs, steps=steps, prompts=prompts)


def decoding(models: PlannedModels, costs: tuple[LayerCost, ...], *, steps: int, prompts: Tokens) -> Work:
    """Return the work of ``steps`` new tokens after each prompt: every step of a batch reads the weights.

    One value is read for every two operations on a token. A product with a few tokens reads weights several times
    slower than memory allows, because its kernels rearrange them first.
    """
    head, token = head_operations(models.dense), Tokens(prompts.windows, 1, prompts.batch_size)
    read = (sum(cost.mixer + cost.mlp for cost in costs) + head) / 2 * models.itemsize
    one = plain(forward_work(costs, token)) + Work(plain_products=head * token.count)
    calls = _CALLS_OF_GENERATE + len(costs) * _CALLS_OF_CACHE
    return (one + Work(narrow=token.batches * read, calls=token.batches * calls)) * steps


def plain(work: Work) -> Work:
    """Return the same work done by transformers' own model."""
    return replace(work, products=0.0, plain_products=work.products + work.plain_products)
