"""Proofs that what discovery proposed is true of the model's own code.

- permuting the neurons of a module leaves its output as it was;
- every kept layer equals its twin in the model that the edited config builds:
  class, tensor shapes, and every plain attribute but its own index.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmprune.anatomy.blueprint import Config, find_layers, materialise, text_config
from llmprune.anatomy.value import Layout, MlpUnit, TensorCut
from llmprune.errors import ModelError

# Spellings of a module's own position, which differs between twins by design.
INDEX_ATTRIBUTES = frozenset({"layer_idx", "layer_id", "layer_index", "layer_number", "block_idx", "idx"})


def select_neurons(tensor: Tensor, cut: TensorCut, keep_K: Tensor) -> Tensor:
    """The tensor with only the kept neurons along the cut's dimension, in the order of ``keep_K``."""
    keep_K = keep_K.to(tensor.device)
    if cut.layout == "plain":
        return tensor.index_select(cut.dim, keep_K)
    width = tensor.shape[cut.dim] // 2
    if cut.layout == "chunked":
        rows = torch.cat([keep_K, keep_K + width])
    else:
        rows = torch.stack([2 * keep_K, 2 * keep_K + 1], dim=1).flatten()
    return tensor.index_select(cut.dim, rows)


@torch.no_grad()
def matching_layout(layer: nn.Module, unit: MlpUnit, width: int) -> Layout | None:
    """The layout under which permuting the neurons leaves the module's output unchanged, or None.

    The layer comes without weights and ``width`` neurons wide; only the module that
    holds the unit is given (random) weights. A control, the output projection alone
    permuted, must change the output: else the module does not use its neurons.
    """
    layer = copy.deepcopy(layer).float()
    module = layer.get_submodule(unit.path)
    materialise(module)
    generator = torch.Generator().manual_seed(1)
    hidden_BLD = torch.randn(1, 4, _hidden_size(module, unit), generator=generator)
    order_F = torch.randperm(width, generator=generator)
    try:
        before = _first(module(hidden_BLD))
        fused = any(cut.layout != "plain" for cut in unit.tensors)
        layouts: tuple[Layout, ...] = ("chunked", "interleaved") if fused else ("plain",)
        for layout in layouts:
            after = _first(_permuted(layer, unit, unit.tensors, layout, order_F)(hidden_BLD))
            control = _first(_permuted(layer, unit, unit.tensors[-1:], layout, order_F)(hidden_BLD))
            tolerance = 1e-4 * before.abs().max().clamp_min(1e-6)
            if (after - before).abs().max() <= tolerance < (control - before).abs().max():
                return layout
    except (TypeError, RuntimeError, ValueError, AttributeError, IndexError, KeyError):
        return None  # a module that cannot be run on hidden states alone is no MLP that we can prove
    return None


def _permuted(layer: nn.Module, unit: MlpUnit, cuts: Sequence[TensorCut], layout: Layout, order_F: Tensor) -> nn.Module:
    twin = copy.deepcopy(layer)
    for cut in cuts:
        parameter = twin.get_parameter(cut.name)
        actual = TensorCut(cut.name, cut.dim, layout if cut.layout != "plain" else "plain")
        parameter.data = select_neurons(parameter.data, actual, order_F)
    return twin.get_submodule(unit.path)


def _hidden_size(module: nn.Module, unit: MlpUnit) -> int:
    output = module.get_submodule(unit.output.removeprefix(f"{unit.path}.") if unit.path else unit.output)
    weight: Tensor = output.get_parameter("weight")
    return weight.shape[1 - unit.output_dim]


def _first(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def prove_twins(dense: PreTrainedModel, pruned: PreTrainedModel, keep: Sequence[int], widths: dict[int, int]) -> None:
    """Compare every kept layer with the layer that the edited config builds in its place.

    ``widths`` maps a dense width to the pruned one. Both models may be without weights.
    Raises ModelError that names the first difference.
    """
    path, layers = find_layers(dense)
    _, pruned_layers = find_layers(pruned)
    assert len(pruned_layers) == len(keep), "the edited config has as many layers as are kept"
    for new, old in enumerate(keep):
        difference = _difference(layers[old], pruned_layers[new], widths)
        if difference:
            raise ModelError(
                f"{dense.config.model_type}: layer {old} would become layer {new} and change there ({difference}); "
                "its config cannot express this cut"
            )
    if list(keep) and len(keep) < len(layers):
        _prove_rest(dense, pruned, path)
        _prove_attention_left(dense, keep)


def _prove_rest(dense: PreTrainedModel, pruned: PreTrainedModel, path: str) -> None:
    def rest(model: PreTrainedModel) -> dict[str, torch.Size]:
        return {name: tensor.shape for name, tensor in model.named_parameters() if not name.startswith(f"{path}.")}

    before, after = rest(dense), rest(pruned)
    changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    if changed:
        raise ModelError(
            f"{dense.config.model_type}: {changed[0]} outside the layers depends on their number; "
            "its depth cannot be cut"
        )


def _prove_attention_left(dense: PreTrainedModel, keep: Sequence[int]) -> None:
    one_of = one_of_layers(dense.config)
    if one_of and not set(one_of) & set(keep):
        raise ModelError(
            f"{dense.config.model_type}: no full-attention layer would be left; "
            f"keep at least one of layers {list(one_of)}"
        )


def one_of_layers(config: Config) -> tuple[int, ...]:
    """The full-attention layers of a model that has other kinds too: their cache counts the tokens."""
    kinds = getattr(text_config(config), "layer_types", None) or ()
    full = tuple(index for index, kind in enumerate(kinds) if kind in ("full_attention", "attention"))
    return full if len(full) < len(kinds) else ()


def _difference(layer: nn.Module, twin: nn.Module, widths: dict[int, int]) -> str:
    if type(layer) is not type(twin):
        return f"{type(layer).__name__} against {type(twin).__name__}"
    modules, twins = dict(layer.named_modules()), dict(twin.named_modules())
    if modules.keys() != twins.keys():
        return f"modules {sorted(modules.keys() ^ twins.keys())}"
    for path, module in modules.items():
        mine, other = _plain_attributes(module), _plain_attributes(twins[path])
        for name in mine.keys() | other.keys():
            value, twin_value = mine.get(name), other.get(name)
            if value != twin_value and not _is_narrowed(value, twin_value, widths):
                return f"{path}.{name} {value!r} against {twin_value!r}".lstrip(".")
    return ""


def _plain_attributes(module: nn.Module) -> dict[str, object]:
    plain = (bool, int, float, str, type(None))
    values: dict[str, object] = {
        name: value for name, value in vars(module).items() if isinstance(value, plain) and name not in INDEX_ATTRIBUTES
    }
    return values | {f"{name}.shape": tuple(value.shape) for name, value in module.named_parameters(recurse=False)}


def _is_narrowed(value: object, twin_value: object, widths: dict[int, int]) -> bool:
    """Whether a number, or one number of a shape, went from a dense width to its pruned width."""
    if isinstance(value, tuple) and isinstance(twin_value, tuple):
        pairs = [(a, b) for a, b in zip(value, twin_value, strict=True) if a != b]
        return all(_is_narrowed(a, b, widths) for a, b in pairs)
    if not isinstance(value, int) or not isinstance(twin_value, int):
        return False
    return any((value, twin_value) in ((m, k), (2 * m, 2 * k)) for m, k in widths.items())
