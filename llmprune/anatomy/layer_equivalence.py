"""Prove that a cut leaves the kept layers unchanged.

Every kept layer must equal its counterpart in the model that the edited config builds: in the classes of its modules,
tensor shapes, computed buffers, and every plain attribute except its own index and the sizes that were cut.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmprune.anatomy.config_edits import INDEX_LISTS, LAYER_LISTS
from llmprune.anatomy.kept_sizes import KeptSizes
from llmprune.anatomy.meta_model import Config, find_layers, text_config
from llmprune.anatomy.types import Anatomy, AttentionUnit, Heads
from llmprune.common.errors import ModelError

# Attributes that hold a module's own index, which differs between counterparts by design.
INDEX_ATTRIBUTES = frozenset({"layer_idx", "layer_id", "layer_index", "layer_number", "layer_num", "block_idx", "idx"})

Sizes = Collection[tuple[int, int]]  # (dense, pruned)


def sizes_that_change(anatomy: Anatomy, kept: KeptSizes) -> set[tuple[int, int]]:
    """Return (dense, pruned) of every size of a layer's tensors that a cut to these sizes may change."""
    changing = set()
    if anatomy.hidden and kept.hidden is not None:
        changing |= sizes_of_hidden(anatomy.hidden.size, kept.hidden)
    if anatomy.heads and kept.kv_groups is not None:
        changing |= sizes_of_heads(anatomy.heads, anatomy.attention, kept=kept.kv_groups)
    if anatomy.experts and kept.experts is not None:
        changing.add((anatomy.experts.count, kept.experts))
    for field, neurons in kept.widths.items():
        width = anatomy.widths[field]
        changing.add((width, neurons))
        for times in {unit.times for units in anatomy.units for unit in units if unit.field == field}:
            changing |= {
                (times * width, times * neurons),
                (2 * times * width, 2 * times * neurons),
            }  # gate and up in one
    return changing


def sizes_of_hidden(dense: int, pruned: int) -> set[tuple[int, int]]:
    """Return the pairs in the proportion of a cut hidden size, from that size to eight times it.

    Falcon-H1's layers record 1.5 times the hidden size, which they do not use. Smaller numbers may be positions of
    layers, which must not change.
    """
    shared = math.gcd(dense, pruned)
    return {(dense // shared * times, pruned // shared * times) for times in range(shared, 8 * shared + 1)}


def sizes_of_heads(heads: Heads, units: Iterable[AttentionUnit | None], *, kept: int) -> set[tuple[int, int]]:
    """Return (dense, pruned) of every size that follows the number of groups: tensors, their parts, counts of heads."""
    prunables = [prunable for unit in units if unit for prunable in unit.tensors]
    each = {1, *heads.per_group.values()} | {
        size for prunable in prunables for size in (*prunable.parts, sum(prunable.parts))
    }
    return {(size * heads.count, size * kept) for size in each}


def check_layer_equivalence(
    dense: PreTrainedModel, pruned: PreTrainedModel, *, keep: Sequence[int], changing: Sizes
) -> None:
    """Compare every kept layer with its counterpart in the pruned model. Both models may be without weights.

    ``keep``: indices of the kept layers; ``changing``: the sizes that are cut. Raises ModelError that names the first
    difference.
    """
    path, layers = find_layers(dense)
    _, pruned_layers = find_layers(pruned)
    assert len(pruned_layers) == len(keep), "the edited config has as many layers as are kept"
    for new, old in enumerate(keep):
        difference = next(differences(layers[old], pruned_layers[new], changing=changing), None)
        if difference:
            change = f"become layer {new} and change there" if old != new else "keep its index and still change"
            raise ModelError(
                f"{dense.config.model_type}: layer {old} would {change} ({difference[1]}); "
                "its config cannot express this cut"
            )
    if list(keep) and len(keep) < len(layers):
        _require_same_rest(dense, pruned, path=path, changing=changing)
        _require_full_attention(dense, keep)


def _require_same_rest(dense: PreTrainedModel, pruned: PreTrainedModel, *, path: str, changing: Sizes) -> None:
    def rest(model: PreTrainedModel) -> dict[str, torch.Size]:
        return {name: tensor.shape for name, tensor in model.named_parameters() if not name.startswith(f"{path}.")}

    before, after = rest(dense), rest(pruned)
    changed = sorted(
        name
        for name in before.keys() | after.keys()
        if before.get(name) != after.get(name)
        and not _is_narrowed(before.get(name), after.get(name), changing=changing)
    )
    if changed:
        raise ModelError(f"{dense.config.model_type}: {changed[0]} outside the layers depends on their number")


def _require_full_attention(dense: PreTrainedModel, keep: Sequence[int]) -> None:
    one_of = one_of_layers(dense.config)
    if one_of and not set(one_of) & set(keep):
        raise ModelError(
            f"{dense.config.model_type}: no full-attention layer would be left; "
            f"keep at least one of layers {list(one_of)}"
        )


def one_of_layers(config: Config) -> tuple[int, ...]:
    """Return the full-attention layers of a model with other kinds too, of which one must stay to count tokens."""
    kinds = getattr(text_config(config), "layer_types", None) or ()
    named = {"full_attention", "attention"} & set(kinds) or {"indexed_attention"}
    full = tuple(index for index, kind in enumerate(kinds) if kind in named)
    return full if len(full) < len(kinds) else ()


def differences(layer: nn.Module, counterpart: nn.Module, *, changing: Sizes) -> Iterator[tuple[str, str]]:
    """Yield the name of each feature in which a layer differs from its counterpart, and both values as text."""
    mine, other = features(layer), features(counterpart)
    for name in mine | other:
        value, counterpart_value = mine.get(name), other.get(name)  # some attributes are None until a model runs
        if same_feature(value, counterpart_value) or _is_narrowed(value, counterpart_value, changing=changing):
            continue
        if isinstance(value, Tensor) or isinstance(counterpart_value, Tensor):
            yield name, f"the values of {name}"
        else:
            both = f"{value_text(value)} against {value_text(counterpart_value)}"
            yield name, both if name == "class" else f"{name} {both}"


def features(layer: nn.Module) -> dict[str, object]:
    """Return the classes of a layer's modules, their plain attributes and their computed buffers.

    A class has the name of its module, that of the layer itself the name "class".
    """
    found: dict[str, object] = {}
    for path, module in layer.named_modules():
        found[path or "class"] = type(module)
        attributes = plain_attributes(module) | _computed_buffers(module)
        found |= {f"{path}.{name}".lstrip("."): value for name, value in attributes.items()}
    return found


def value_text(value: object) -> str:
    """Return the value of a feature as text: the name of a class, otherwise as Python writes it."""
    return value.__name__ if isinstance(value, type) else repr(value)


def same_feature(value: object, other: object) -> bool:
    """Check that two features are equal; of two buffers, one may be on a GPU."""
    if isinstance(value, Tensor) and isinstance(other, Tensor):
        return torch.equal(value.to(other.device), other)
    return not isinstance(value, Tensor) and not isinstance(other, Tensor) and value == other


def _computed_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Return the buffers of a module that are computed from the config, which are in no checkpoint."""
    return {
        name: buffer
        for name, buffer in module.named_buffers(recurse=False)
        if name in module._non_persistent_buffers_set
    }


def _is_plain(value: object) -> bool:
    if isinstance(value, list | tuple | dict):
        return all(map(_is_plain, value.values() if isinstance(value, dict) else value))
    return isinstance(value, bool | int | float | str | None)


def plain_attributes(module: nn.Module) -> dict[str, object]:
    """Return the numbers and texts of a module and the shapes of its parameters, without its own index."""
    own = {"training", *INDEX_ATTRIBUTES, *LAYER_LISTS, *INDEX_LISTS}  # lists by layer get shorter by design
    values: dict[str, object] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in vars(module).items()
        if name not in own and not name.startswith("_") and _is_plain(value)
    }
    return values | {f"{name}.shape": tuple(value.shape) for name, value in module.named_parameters(recurse=False)}


def _is_narrowed(value: object, counterpart_value: object, *, changing: Sizes) -> bool:
    """Check that a number, or those numbers of a shape that differ, changed from a dense size to its pruned size."""
    if isinstance(value, tuple) and isinstance(counterpart_value, tuple):
        if len(value) != len(counterpart_value):
            return False
        pairs = [(a, b) for a, b in zip(value, counterpart_value, strict=True) if a != b]
        return all(_is_narrowed(a, b, changing=changing) for a, b in pairs)
    return isinstance(value, int) and isinstance(counterpart_value, int) and (value, counterpart_value) in changing
