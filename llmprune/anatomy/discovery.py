"""Find what can be pruned in a model: proposed by shapes, then proven.

Shapes in names: D hidden size, F neurons.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from llmprune.anatomy.blueprint import Config, build_blueprint, find_layers, text_config
from llmprune.anatomy.config_edits import edit_config
from llmprune.anatomy.proof import matching_layout, one_of_layers, prove_twins
from llmprune.anatomy.value import Anatomy, Layout, MlpUnit, TensorCut
from llmprune.errors import ModelError

_PROOF_WIDTHS = (64, 32)  # neurons of the narrowed module that is permuted: another than it has
_WIDTH_WORDS = ("inner", "intermediate", "ffn", "mlp")


def discover(config: Config, trust_remote_code: bool = False) -> Anatomy:
    """The anatomy of the model that this config describes; no weights are read.

    Raises ModelError where it is no causal decoder or its layers are not found.
    """
    model = build_blueprint(config, trust_remote_code=trust_remote_code)
    path, layers = find_layers(model)
    _refuse_bidirectional(model)
    units, width_refusal = _discover_units(model, trust_remote_code)
    return Anatomy(
        model_type=config.model_type,
        layers_path=path,
        num_layers=len(layers),
        layer_classes=tuple(type(layer).__name__ for layer in layers),
        units=units,
        one_of=one_of_layers(config),
        depth_refusal=_depth_refusal(model, trust_remote_code),
        width_refusal=width_refusal,
    )


def _refuse_bidirectional(model: PreTrainedModel) -> None:
    _, layers = find_layers(model)
    for name, module in layers.named_modules():
        if getattr(module, "is_causal", True) is False:
            raise ModelError(
                f"a model of type {model.config.model_type!r} is not a causal decoder: its layers "
                f"attend in both directions ({name}.is_causal is False); llmprune prunes decoder-only language models"
            )


def _depth_refusal(model: PreTrainedModel, trust_remote_code: bool) -> str | None:
    """Why no layer can be removed: tried on the model without one layer near its middle."""
    _, layers = find_layers(model)
    if len(layers) < 2:
        return "the model has a single layer"
    removed = next(index for index in [len(layers) // 2, 0] if (index,) != one_of_layers(model.config))
    keep = [index for index in range(len(layers)) if index != removed]
    try:
        pruned = build_blueprint(edit_config(model.config, keep, {}), trust_remote_code=trust_remote_code)
        prove_twins(model, pruned, keep, {})
    except ModelError as error:
        return str(error)
    except Exception as error:  # a model class may fail in any way on a config that it does not expect
        return f"the config without a layer does not build: {type(error).__name__}: {error}"
    return None


def _discover_units(
    model: PreTrainedModel, trust_remote_code: bool
) -> tuple[tuple[tuple[MlpUnit, ...], ...], str | None]:
    _, layers = find_layers(model)
    proposals = [tuple(_propose(layer, model.config)) for layer in layers]
    nothing: tuple[tuple[MlpUnit, ...], ...] = ((),) * len(layers)
    found: dict[tuple[MlpUnit, ...], MlpUnit | None] = {}
    reasons: list[str] = []
    for index, proposed in enumerate(proposals):
        if proposed not in found:
            found[proposed] = _first_proven(proposed, index, model, trust_remote_code, reasons)
    units = tuple(tuple(unit for unit in (found[proposed],) if unit) for proposed in proposals)
    flat = [unit for layer_units in units for unit in layer_units]
    stacked = [name for name, parameter in layers.named_parameters() if parameter.ndim == 3]
    experts = next((name for name in stacked if "expert" in name), None)
    if experts is not None:
        return nothing, f"{experts} holds a mixture of experts, whose widths are not cut; cut depth instead"
    if not flat:
        return nothing, reasons[-1] if reasons else "no layer has an MLP of the shape hidden → neurons → hidden"
    if len({(unit.field, unit.width) for unit in flat}) > 1:
        return nothing, "the layers' MLPs have several widths, which one uniform width cannot express"
    return units, None


def _first_proven(
    proposed: tuple[MlpUnit, ...],
    layer: int,
    model: PreTrainedModel,
    trust_remote_code: bool,
    reasons: list[str],
) -> MlpUnit | None:
    for unit in proposed:
        narrowed = _find_width_field(unit, layer, model, trust_remote_code)
        if isinstance(narrowed, str):
            reasons.append(narrowed)
            continue
        field, narrow_layer = narrowed
        layout = matching_layout(narrow_layer, unit, _proof_width(unit))
        if layout is None:
            reasons.append(f"{unit.path or 'the layer'}: its output changes when its neurons are permuted")
            continue
        return _with(unit, field, layout)
    return None


def _with(unit: MlpUnit, field: str, layout: Layout) -> MlpUnit:
    tensors = tuple(TensorCut(cut.name, cut.dim, layout if cut.layout != "plain" else "plain") for cut in unit.tensors)
    return MlpUnit(unit.path, unit.output, unit.output_dim, tensors, unit.width, field)


def _find_width_field(
    unit: MlpUnit, layer: int, model: PreTrainedModel, trust_remote_code: bool
) -> tuple[str, nn.Module] | str:
    """The config field that sets the unit's width and nothing else, and the layer narrowed by it."""
    text = text_config(model.config)
    names = [name for name, value in text.to_dict().items() if _may_set_width(name, value, unit.width)]
    for name in names:
        try:
            config = edit_config(model.config, range(text.num_hidden_layers), {name: _proof_width(unit)})
            narrow = build_blueprint(config, trust_remote_code=trust_remote_code)
        except Exception:  # any other field of that value may break the model: not the width
            continue
        changed = _changed_shapes(model, narrow)
        _, layers = find_layers(model)
        path, narrow_layers = find_layers(narrow)
        mine = {f"{path}.{index}.{cut.name}" for index in range(len(layers)) for cut in unit.tensors}
        if changed and changed <= mine and any(key.startswith(f"{path}.{layer}.") for key in changed):
            return name, narrow_layers[layer]
    return (
        f"{unit.path or 'the layer'}: {unit.width} neurons, but no config field sets this width alone, "
        "so a narrower model would not reload"
    )


def _proof_width(unit: MlpUnit) -> int:
    return next(width for width in _PROOF_WIDTHS if width != unit.width)


def _may_set_width(name: str, value: object, width: int) -> bool:
    if value is None:
        return any(word in name for word in _WIDTH_WORDS)
    return isinstance(value, int) and not isinstance(value, bool) and value == width


def _changed_shapes(model: PreTrainedModel, other: PreTrainedModel) -> set[str]:
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    other_shapes = {name: parameter.shape for name, parameter in other.named_parameters()}
    names = shapes.keys() | other_shapes.keys()
    return {name for name in names if shapes.get(name) != other_shapes.get(name)}


def _propose(layer: nn.Module, config: Config) -> Iterator[MlpUnit]:
    """Modules of the layer whose direct children look like hidden → neurons → hidden."""
    hidden = text_config(config).hidden_size
    for path, module in layer.named_modules():
        shapes = {name: _in_out(child) for name, child in module.named_children()}
        linears = {name: shape for name, shape in shapes.items() if shape is not None}
        for output, (width, written) in linears.items():
            if written != hidden:
                continue
            others = {name: shape for name, shape in linears.items() if name != output and shape[0] == hidden}
            plain = [name for name, (_, out) in others.items() if out == width]
            fused = [name for name, (_, out) in others.items() if out == 2 * width]
            if plain:
                yield _unit(module, path, plain, output, width, "plain")
            elif len(fused) == 1:
                yield _unit(module, path, fused, output, width, "chunked")


def _in_out(module: nn.Module) -> tuple[int, int] | None:
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    return None


def _unit(module: nn.Module, path: str, inputs: list[str], output: str, width: int, layout: Layout) -> MlpUnit:
    dot = f"{path}." if path else ""
    cuts: list[TensorCut] = []
    for name in inputs:
        child = module.get_submodule(name)
        cuts.append(TensorCut(f"{dot}{name}.weight", 1 if isinstance(child, Conv1D) else 0, layout))
        if getattr(child, "bias", None) is not None:
            cuts.append(TensorCut(f"{dot}{name}.bias", 0, layout))
    output_dim = 0 if isinstance(module.get_submodule(output), Conv1D) else 1
    cuts.append(TensorCut(f"{dot}{output}.weight", output_dim))
    return MlpUnit(path, f"{dot}{output}", output_dim, tuple(cuts), width, field="")
