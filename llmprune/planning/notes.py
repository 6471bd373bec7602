"""Notes of a plan: parts that a run does not change, the cost of a setting, and its assumptions."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel

from llmprune.anatomy.meta_model import Config, find_layers, text_config
from llmprune.anatomy.types import Anatomy, routed_units
from llmprune.checkpoint.file_names import FileNames
from llmprune.checkpoint.location import conversion_of
from llmprune.common.errors import RecipeError
from llmprune.common.linalg.precision import dtype_name
from llmprune.common.schema import format_size
from llmprune.criteria.base import AblationCost, DepthCriterion
from llmprune.planning.memory.passes import neurons_of_up_refit
from llmprune.planning.next_tools.tool_compatibility import about_depth
from llmprune.planning.sparsity import SparsityPlan
from llmprune.recipe.recipe import Recipe
from llmprune.recipe.refit import EPOCHS, Refit
from llmprune.results.formatting import plural, ranges


def about_base(recipe: Recipe, config: Config) -> list[str]:
    """Return notes on parts of the model that are not pruned, and on code that is run."""
    notes = []
    if text_config(config) is not config:
        notes.append("only the text part is pruned" + _about_images(recipe))
    if recipe.model.trust_remote_code:
        notes.append("the model's own Python code is run (model.trust_remote_code)")
    return notes


def _about_images(recipe: Recipe) -> str:
    """Return the rest of the note on a model that reads images."""
    seen = ", and it is scored on text and images" if recipe.calibration.has_images else ", and it is scored on text"
    if recipe.evaluation.backend is not None and recipe.evaluation.task_names:
        return seen
    return f"{seen}: its effect on images is not measured; evaluate a task with images by evaluation.backend"


def about_sparsity(sparsity: SparsityPlan | None, pruned: PreTrainedModel, *, anatomy: Anatomy) -> list[str]:
    """Return notes on the matrices that stay dense."""
    if sparsity is None:
        return []
    return [f"stays dense: {skipped}" for skipped in sparsity.skipped] + _about_dense_experts(pruned, anatomy)


def about_refit(recipe: Recipe, anatomy: Anatomy, *, widths: dict[str, int]) -> list[str]:
    """Return notes on units without a refit and on its cost. Raises RecipeError where the recipe's have no effect."""
    if recipe.refit is None:
        return []
    samples = recipe.calibration.shape()[0]
    cuts = recipe.removes_parts
    notes = _about_units_without_refit(anatomy) if cuts else []
    if cuts or (recipe.sparsity and recipe.sparsity.method.refits):
        notes += _about_missing_folds(recipe.refit, samples)
    if recipe.refit.up:
        notes += _about_up_refit(anatomy, widths, samples=samples)
    if recipe.refit.block:
        notes += _about_training(samples)
    return notes


def about_scores(recipe: Recipe, anatomy: Anatomy, *, keep: Sequence[int]) -> list[str]:
    """Return notes on the cost and the assumptions of the criteria, and on the layers' pattern."""
    notes = []
    if recipe.depth:
        if recipe.depth.layers is None:
            criterion, (samples, _) = recipe.depth.criterion, recipe.calibration.shape()
            cost = criterion.ablation_cost(anatomy.num_layers, remove=anatomy.num_layers - len(keep), samples=samples)
            notes += _about_ablation(criterion, cost) if cost else []
        named, kept = recipe.depth.layers is not None, recipe.depth.keep_pattern
        notes += about_depth(anatomy, keep, named=named, keep_pattern=kept)
    return notes + _about_width_criterion(recipe, anatomy)


def about_judgement(recipe: Recipe, anatomy: Anatomy, *, keep: Sequence[int]) -> list[str]:
    """Return notes where layers are removed and no task lets the models write, and on ``before_recovery``."""
    noted = _about_before_recovery(recipe)
    if len(keep) == anatomy.num_layers:
        return noted
    if recipe.evaluation.task_names:
        from llmprune.evaluation.lm_eval.generating_tasks import may_generate

        if may_generate(recipe.evaluation):
            return noted
    return [
        *noted,
        "layers are removed and no task generates answers: without layers generated reasoning breaks long before "
        "multiple choice shows it (published for 32 of 36 layers: MMLU stays at 0.740, GSM8K falls to 0.287); add "
        "gsm8k or another generating task to evaluation.tasks, or set evaluation.suite to general",
    ]


def _about_before_recovery(recipe: Recipe) -> list[str]:
    """Return a note where the model before the training cannot be evaluated, or nothing of it."""
    evaluation = recipe.evaluation
    if not evaluation.before_recovery:
        return []
    if recipe.recover is None:
        return ["evaluation.before_recovery: not used, because nothing is trained; add a section recover, or remove it"]
    if not evaluation.task_names and evaluation.perplexity is None:
        return ["evaluation.before_recovery: measures nothing; name tasks, or text for evaluation.perplexity"]
    return []


def about_quantization(names: FileNames) -> list[str]:
    """Return a note on quantized weights of the base: their format, their size, and that of the result."""
    if names.quantization is None:
        return []
    stored = format_size(sum(tensor.nbytes for tensor in names.headers.values()))
    dtype = dtype_name(names.model.dtype)
    return [
        f"the base is quantized by {names.quantization.describe()}: {plural(names.quantized, 'tensor')}, {stored} with "
        f"all others in its files; each layer is dequantized to {dtype} when it is read, the sizes are those of "
        f"{dtype}, and the result is not quantized"
    ]


def about_unread_weights(recipe: Recipe, dtype: str, *, parameters: int, none: bool) -> str:
    """Return a note on the basis of the sizes where no weights file was read.

    ``parameters``: of the dense model; ``none``: the folder has no weights file.
    """
    conversion = conversion_of(recipe.model)
    if conversion is not None:
        return conversion.note.format(dtype=dtype, memory=format_size(4 * parameters))
    computed = f"the sizes assume that all tensors are {dtype}"
    if recipe.model.pickles and not none:
        return f"pickled weights are converted to safetensors once, before they are cut: {computed}"
    if none:
        return f"{recipe.model.id} has no safetensors weights file, which a run needs: {computed}"
    return f"no weights file was read: {computed}"


def _about_dense_experts(pruned: PreTrainedModel, anatomy: Anatomy) -> list[str]:
    """Return a note on stacked experts, where it is not known which tokens each of them gets."""
    if anatomy.experts is None or anatomy.experts.refusal is None:
        return []
    stacked = sorted(
        {name for layer in find_layers(pruned)[1] for name, tensor in layer.named_parameters() if tensor.ndim == 3}
    )
    reason = "it is not known which tokens each expert gets"
    return [f"stays dense, because {reason}: {', '.join(stacked)}"] if stacked else []


def _about_units_without_refit(anatomy: Anatomy) -> list[str]:
    """Return notes on units that are cut without a refit, and on layers without a refit of their MLP."""
    routed = [routed_units(anatomy, index) for index in range(anatomy.num_layers)]
    units = [(unit, own) for all_units, own in zip(anatomy.units, routed, strict=True) for unit in all_units]
    stacked = sorted({unit.path for unit, own in units if not unit.refit and unit not in own})
    without = [
        index for index, own in enumerate(anatomy.units) if not routed[index] and not any(unit.refit for unit in own)
    ]
    notes = [f"cut without refit, because not every token reaches them: {', '.join(stacked)}"] if stacked else []
    if without:
        layers = "its layers have" if len(without) == anatomy.num_layers else f"layers {ranges(without)} have"
        notes.append(
            f"{layers} no MLP that every token reaches: where layers or heads are removed, other projections that "
            "write to the residual stream are refit"
        )
    return notes


def _about_missing_folds(refit: Refit, samples: int) -> list[str]:
    """Return a note where one calibration window leaves nothing to hold out from the refit."""
    if samples > 1:
        return []
    strength = "the default ridge" if refit.ridge is None else f"ridge {refit.ridge:g}"
    return [
        f"refit: 1 calibration sample leaves no other to judge the refit on; it is made at {strength}, "
        "whether it helps or not"
    ]


def _about_up_refit(anatomy: Anatomy, widths: dict[str, int], *, samples: int) -> list[str]:
    """Return a note on the cost of ``refit.up``. Raises RecipeError where it refits nothing, or cannot be judged."""
    if not neurons_of_up_refit(anatomy, widths):
        gated = any(unit.up for units in anatomy.units for unit in units)
        raise RecipeError(
            "refit.up: only the up projections of gated MLPs that lose neurons and that every token reaches are refit, "
            f"and {'no neurons of these are removed' if gated else 'this model has none'}; "
            f"{'narrow them with width, or ' if gated else ''}remove the key"
        )
    if samples < 2:
        raise RecipeError(
            "refit.up: 1 calibration sample leaves no other to judge the refit on; raise calibration.samples, or "
            "remove the key"
        )
    return ["refit.up: pass 2 costs about 5 more forward passes in float32 over the calibration tokens"]


def _about_training(samples: int) -> list[str]:
    """Return a note on the cost of ``refit.block``. Raises RecipeError where no window is left to judge it."""
    if samples < 2:
        raise RecipeError(
            "refit.block: 1 calibration sample leaves no other to judge the training on; raise calibration.samples, or "
            "remove the key"
        )
    return [
        f"refit.block: pass 2 trains every layer for at most {EPOCHS} epochs, each as long as 3 forward passes over "
        "the calibration tokens"
    ]


def _about_ablation(criterion: DepthCriterion, cost: AblationCost) -> list[str]:
    """Return a note on the cost of a depth criterion that runs the model without each layer."""
    refit = ", and a refit of every layer in each round" if cost.refits else ""
    return [
        f"depth.criterion {criterion.kind}: {plural(cost.rounds, 'round')} of ablation on "
        f"{plural(cost.windows, 'window')} cost about {cost.forward_passes:.1f} forward passes over the calibration "
        f"tokens{refit}"
    ]


def _about_width_criterion(recipe: Recipe, anatomy: Anatomy) -> list[str]:
    """Return notes on the cost of the width criterion, and on a refit that it assumes and the recipe lacks."""
    if recipe.width is None:
        return []
    criterion = recipe.width.neuron_criterion
    widths = [
        unit.times * anatomy.widths[unit.field] for units in anatomy.units for unit in units if recipe.width.cuts_mlp
    ]
    operations = recipe.calibration.scored_sources * sum(criterion.operations(width) for width in widths)
    figure = f": about {operations:.1e} operations in float64 in all" if operations else ""
    notes = [f"width.criterion {criterion.kind} {criterion.cost_note}{figure}"] if criterion.cost_note else []
    if criterion.assumes_refit and recipe.refit is None:
        notes.append(f"width.criterion {criterion.kind} assumes the refit, which is off")
    return notes


def require_disk_for_hidden_states(recipe: Recipe, window_bytes: int) -> None:
    """Raise RecipeError where a width criterion's backward pass needs more hidden states than may be stored.

    ``window_bytes``: of the dense hidden states of one calibration window after every layer.
    """
    allowed, needed = recipe.calibration.stream_disk, window_bytes * recipe.calibration.shape()[0]
    if recipe.width and recipe.width.neuron_criterion.forward_criterion is None and needed > allowed:
        raise RecipeError(
            f"calibration.stream_disk: the backward pass of width.criterion {recipe.width.neuron_criterion.kind} needs "
            f"the hidden states after every layer, {format_size(needed)}, and {format_size(allowed)} are allowed; "
            "raise it, take fewer calibration.samples, or choose another criterion"
        )
