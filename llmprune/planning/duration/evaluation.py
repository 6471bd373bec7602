"""Work of the verification and of the evaluation: held-out text, free generation, speed. That of tasks is not known."""

from __future__ import annotations

from llmprune.anatomy.meta_model import text_config
from llmprune.planning.duration.generating import decoding, generating, plain
from llmprune.planning.duration.operations import LayerCost, Work, head_operations
from llmprune.planning.duration.parts import Part, PlannedModels, Tokens, forward_work, visited
from llmprune.recipe.evaluation import Generation
from llmprune.recipe.recipe import Recipe

_PROBE_TOKENS, _PROBE_CONTEXT = 16, 24  # tokens that the verification generates, cached and uncached, and their context
_LOGIT_PASSES = 8  # float32 reads and writes of the logits for cross entropy and divergence


def verification_work(models: PlannedModels, tokens: Tokens) -> Work:
    """Return the work of the fresh process: it loads the model, runs one batch and generates some tokens."""
    batch = Tokens(min(tokens.batch_size, tokens.windows), tokens.length, tokens.batch_size)
    work = Work(starts=1, weights=2 * models.pruned_bytes)
    work += plain(forward_work(models.pruned_costs(tokens.length), batch))
    work += Work(plain_products=head_operations(models.pruned) * batch.count)
    return work + decoding(models, models.pruned_costs(_PROBE_CONTEXT), steps=_PROBE_TOKENS, prompts=Tokens(1, 1, 1))


def evaluation_parts(recipe: Recipe, models: PlannedModels) -> list[Part]:
    """Return the parts of the evaluation, in the order in which they begin."""
    evaluation, step = recipe.evaluation, "evaluation"
    loaded = Work(weights=models.pruned_bytes)
    before_recovery = recipe.recover is not None and evaluation.before_recovery
    parts: list[Part] = []
    if evaluation.perplexity:
        shape = evaluation.perplexity.shape()
        text = Tokens(*shape, models.batches.held_out)
        kept = _held_out(models, models.pruned_costs(text.length), text=text)
        items = len(models.planned.layers)
        is_repaired = bool(recipe.refit or recipe.sparsity)
        if is_repaired and recipe.removes_parts:
            parts.append(Part(step=step, name="held-out text: cut", work=kept, items=items))
        if before_recovery:
            parts.append(Part(step=step, name="held-out text: repaired", work=kept + loaded, items=items))
        dense = _held_out(models, models.dense_costs(text.length), text=text)
        parts.append(Part(step=step, name="held-out text: dense", work=dense, items=models.anatomy.num_layers))
        parts.append(Part(step=step, name="held-out text: pruned", work=kept + loaded, items=items))
    if before_recovery and evaluation.task_names:
        parts.append(Part(step=step, name="tasks: repaired", work=None))
    sides = {"dense": models.dense_costs, "pruned": models.pruned_costs}
    for side, costs_of in sides.items():
        if evaluation.task_names:
            parts.append(Part(step=step, name=f"tasks: {side}", work=None))
        if generation := evaluation.generation:
            prompts = Tokens(generation.samples, generation.prompt_tokens, generation.batch_size)
            costs = costs_of(generation.prompt_tokens + generation.new_tokens)
            work = generating(models, costs, steps=generation.new_tokens, prompts=prompts)
            if side == "pruned":
                work += _along_answers(models, costs, generation=generation)
            parts.append(Part(step=step, name=f"free generation: {side}", work=work))
    if speed := evaluation.speed:
        prompts = Tokens(speed.batch_size, speed.prompt_tokens, speed.batch_size)
        both = Work.total(
            generating(
                models, costs_of(speed.prompt_tokens + speed.new_tokens), steps=speed.new_tokens, prompts=prompts
            )
            for costs_of in sides.values()
        )
        parts.append(Part(step=step, name="speed", work=both * (speed.repeats + 1)))
    return parts


def _held_out(models: PlannedModels, costs: tuple[LayerCost, ...], *, text: Tokens) -> Work:
    """Return the work of one model on held-out text: a layer-wise pass, and its logits."""
    vocabulary = text_config(models.dense.config).vocab_size
    logits = Work(
        plain_products=head_operations(models.dense) * text.count,
        stream=4.0 * _LOGIT_PASSES * vocabulary * text.count,
    )
    return forward_work(costs, text) + visited(costs) + logits


def _along_answers(models: PlannedModels, costs: tuple[LayerCost, ...], *, generation: Generation) -> Work:
    """Return the work of one forward pass over prompts and the dense model's answers, with its logits."""
    length = generation.prompt_tokens + generation.new_tokens
    texts = Tokens(generation.samples, length, generation.batch_size)
    head = Work(plain_products=head_operations(models.dense) * texts.count)
    return plain(forward_work(costs, texts)) + head
