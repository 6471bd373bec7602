"""Map a model's tensors to those of a checkpoint's files, to save every tensor in its file's type.

A model is loaded in one floating-point type, that of the computation, and files may mix several: Mamba's ``A_log``,
routers and their biases are often float32 in a bfloat16 checkpoint. A tensor that a run only cuts is saved with the
values of the base's file; one that it changes is converted to the type in the base's file.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property, reduce
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from llmprune.anatomy.meta_model import find_layers
from llmprune.checkpoint.merged_experts import groups_to_merge, merge
from llmprune.checkpoint.weight_headers import Headers, main_dtype
from llmprune.common.errors import CheckpointError

Tensors = dict[str, Tensor]
# Buffers in files of older versions, which transformers ignores for every model.
_OLD_BUFFERS = (r"rotary_emb\.inv_freq", r"(^|\.)position_ids$")
Dtypes = Mapping[str, torch.dtype]  # of parameters and buffers of a model, by name


class FileNames:
    """Mapping from each tensor of a model to the tensors of its files, by the conversion rules of transformers."""

    def __init__(self, model: PreTrainedModel, headers: Headers) -> None:
        rules = get_model_conversion_mapping(model)
        self._rules = rules
        self.model, self.headers = model, headers
        self._renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        self._converters = {
            pattern: rule for rule in rules if isinstance(rule, WeightConverter) for pattern in rule.source_patterns
        }
        self._all_converters = list(dict.fromkeys(self._converters.values()))
        self._own = model.state_dict()
        # by the first tensor that a rule makes: its sources, each with the pattern that it matched
        self._sources: dict[str, list[tuple[str, str | None]]] = {}
        self._first: dict[str, str] = {}  # for each tensor of the model, the first that its rule makes
        self._unused: list[str] = []
        for name in sorted(headers, key=dot_natural_key):
            self._add(name)

    def _add(self, name: str) -> None:
        converters = self._all_converters
        prefix = self.model.base_model_prefix
        target, pattern = rename_source_key(name, self._renamings, converters, prefix, self._own)
        if target not in self._own and name in self._own:
            target, pattern = rename_source_key(name, [], [], prefix, self._own)
        if target not in self._own:
            self._unused.append(name)
            return
        self._sources.setdefault(target, []).append((name, pattern))
        patterns = self._converters[pattern].target_patterns if pattern else [""]
        for other in patterns:
            made = target.replace(patterns[0], other) if pattern else target
            self._first[made] = target

    def sources(self, name: str) -> list[str]:
        """Return the tensors of the files that a tensor of the model is made from; empty for a tied tensor."""
        return [source for source, _ in self._sources.get(self._first.get(name, ""), [])]

    def has(self, name: str) -> bool:
        """Check that the files have what a tensor of the model is made from."""
        return name in self._first

    @property
    def used_rules(self) -> list[Any]:
        """The rules of transformers that apply to these files, for the way back from the model's tensors."""
        return [rule for rule in self._rules if rule.was_used()]

    def missing(self) -> list[str]:
        """Return the parameters that the files do not have, except tied ones and those that may be missing."""
        patterns = [re.compile(pattern) for pattern in self.model._keys_to_ignore_on_load_missing or ()]
        tied = self.model.all_tied_weights_keys
        return [
            name
            for name, _ in self.model.named_parameters()
            if name not in self._first and name not in tied and not any(one.search(name) for one in patterns)
        ]

    def unexpected(self) -> list[str]:
        """Return the tensors of the files that the model does not have, except those that transformers ignores."""
        ignored = [*(self.model._keys_to_ignore_on_load_unexpected or ()), *_OLD_BUFFERS]
        patterns = [re.compile(pattern) for pattern in ignored]
        return [name for name in self._unused if not any(one.search(name) for one in patterns)]

    def misshapen(self) -> list[str]:
        """Return the tensors, with both shapes, whose shape in the files is not the model's."""
        found = []
        for target, sources in self._sources.items():
            name, pattern = sources[0]
            stored, wanted = list(self.headers[name].shape), list(self._own[target].shape)
            if pattern is None and stored != wanted:
                found.append(f"{target} ({stored}, not {wanted})")
        return found

    @cached_property
    def dtypes(self) -> Dtypes:
        """The type in the files of every floating-point tensor of the model; of several sources, the widest."""
        found: dict[str, torch.dtype] = {}
        for name in self._first:
            stored = [self.headers[source].floating for source in self.sources(name)]
            known = [dtype for dtype in stored if dtype is not None]
            if known:
                found[name] = reduce(torch.promote_types, known)
        return found

    def compute_dtypes(self, dtype: torch.dtype) -> Dtypes:
        """Return the types in which transformers loads parameters and buffers for a computation in ``dtype``."""
        plan = self.model._get_dtype_plan(dtype)
        patterns = {re.compile(pattern.replace("*", ".*")): kept for pattern, kept in plan.items()}
        return {
            name: next((kept for pattern, kept in patterns.items() if pattern.search(name)), tensor.dtype)
            for name, tensor in self._own.items()
        }

    def convert(self, names: Iterable[str], tensor_of: Callable[[str], Tensor], *, dtypes: Dtypes | None) -> Tensors:
        """Return tensors of the model by name, made as transformers makes them from those of the files.

        ``tensor_of``: reads a tensor of the files. ``dtypes``: types of the results, None for those of the files.
        """
        wanted = set(names)
        made: Tensors = {}
        for first in dict.fromkeys(self._first[name] for name in sorted(wanted)):
            made |= self._convert(first, tensor_of, dtype=dtypes[first] if dtypes is not None else None)
        return {name: made[name] for name in wanted}

    def _convert(self, first: str, tensor_of: Callable[[str], Tensor], *, dtype: torch.dtype | None) -> Tensors:
        sources = self._sources[first]
        pattern = sources[0][1]
        tensors = [tensor_of(name) for name, _ in sources]
        if pattern is None:
            return {first: tensors[0] if dtype is None else tensors[0].to(dtype)}
        dtype = dtype or reduce(torch.promote_types, [tensor.dtype for tensor in tensors])
        patterns = [one for _, one in sources if one is not None]
        assert len(patterns) == len(sources), "one rule makes all parts of a tensor"
        rule = self._converters[pattern]
        groups = groups_to_merge(rule, zip(patterns, tensors, strict=True))
        if groups is not None:
            return {first: merge(rule, groups, dtype=dtype)}
        rule = copy.deepcopy(rule)
        for (name, _), one, tensor in zip(sources, patterns, tensors, strict=True):
            rule.add_tensor(first, name, one, tensor.to(dtype))
        made = rule.convert(first, model=self.model, config=self.model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


class Originals:
    """The base's tensors in the types of its files, to save where a run computes in another type.

    ``read``: returns tensors of the model, by name, in these types.
    """

    def __init__(self, read: Callable[[Iterable[str]], Tensors], dtypes: Dtypes) -> None:
        self._read, self._dtypes = read, dtypes

    def restore(self, tensors: Tensors, prefix: str, *, cut: Callable[[Tensors], Tensors]) -> Tensors:
        """Return tensors for saving, in the types of the base's files.

        A tensor that equals the base's after ``cut`` gets the values of the base's file. ``cut``: removes layers'
        units from the base's tensors; ``prefix``: of the names in the base.
        """
        other = {
            name: dtype
            for name, tensor in tensors.items()
            if (dtype := self._dtypes.get(prefix + name)) is not None and dtype != tensor.dtype
        }
        if not other:
            return tensors
        read = self._read(prefix + name for name in other)
        originals = cut({name.removeprefix(prefix): tensor for name, tensor in read.items()})
        restored = dict(tensors)
        for name, dtype in other.items():
            computed = tensors[name].cpu()
            same = torch.equal(originals[name].to(computed.dtype), computed)
            restored[name] = originals[name].to(dtype) if same else computed.to(dtype)
        return restored


def kept_dtypes(names: FileNames, dtype: torch.dtype, *, keep: bool) -> Dtypes:
    """Return the types of the result's tensors, by their names in the dense model.

    ``keep``: the types of the base's files; otherwise ``dtype``, except where transformers keeps float32.
    """
    if keep:
        return names.dtypes
    loaded = names.compute_dtypes(dtype)
    return {name: loaded[name] for name, _ in names.model.named_parameters()}


def stored_bytes(model: PreTrainedModel, dtypes: Dtypes, *, layers: Sequence[int] | None = None) -> int:
    """Return the bytes of a model's parameters in these types, tied ones once.

    ``dtypes``: by names in the dense model; ``layers``: the dense model's layers that the model has, None for all.
    """
    path, _ = find_layers(model)
    dense_name = {} if layers is None else {f"{path}.{new}": f"{path}.{old}" for new, old in enumerate(layers)}
    depth = path.count(".") + 2

    def dtype_of(name: str, parameter: Tensor) -> torch.dtype:
        place = ".".join(name.split(".")[:depth])
        return dtypes.get(dense_name.get(place, place) + name.removeprefix(place), parameter.dtype)

    return sum(one.numel() * dtype_of(name, one).itemsize for name, one in model.named_parameters())


def describe_types(names: FileNames, dtype: torch.dtype, *, keep: bool) -> list[str]:
    """Return a note where types in the files differ from the type of the computation, ``dtype``.

    ``keep``: the result has the types of the files.
    """
    named: dict[torch.dtype, list[str]] = {}
    for name, stored in names.dtypes.items():
        if stored != dtype:
            named.setdefault(stored, []).append(name)
    if not named:
        return []
    main = main_dtype(names.headers)
    listed = [f"{len(some)} in {_name(stored)} ({_examples(some)})" for stored, some in named.items()]
    if not keep:
        return [
            f"model.dtype: {_name(dtype)} converts tensors of the files: {'; '.join(listed)}; with auto every tensor "
            "keeps its type"
        ]
    about = f"the files hold {_name(main)}" if main != dtype else "the files mix types"
    return [
        f"{about}, and the run computes in {_name(dtype)}: of the tensors, {'; '.join(listed)}; each is saved in its "
        "file's type, and with the values of its file unless the run changes more than a cut"
    ]


def require_all(names: FileNames, shown: str) -> None:
    """Raise CheckpointError where the files' tensors are not those of the model: loading would invent random ones."""
    require_fitting(
        {"missing": names.missing(), "unexpected": names.unexpected(), "mismatched": names.misshapen()}, shown
    )


def require_fitting(problems: Mapping[str, Sequence[str]], shown: str) -> None:
    """Raise CheckpointError for tensors that do not fit a model's config. ``problems``: names by kind of fault."""
    listed = [f"{len(keys)} {kind}: {', '.join(keys[:3])}" for kind, keys in problems.items() if keys]
    if listed:
        raise CheckpointError(
            f"the weights of {shown} do not fit its config ({'; '.join(listed)}); get a complete checkpoint"
        )


def _name(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")


def _examples(names: Sequence[str]) -> str:
    """Return the last two parts of the names, at most three different ones."""
    parts = list(dict.fromkeys(".".join(re.sub(r"\.\d+\.", ".", name).split(".")[-2:]) for name in names))
    return ", ".join(parts[:3]) + (", …" if len(parts) > 3 else "")
