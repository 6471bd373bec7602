"""Save every tensor in the type that it has in the base's file.

A model is loaded in one floating-point type, that of the computation, and files may mix several: Mamba's ``A_log``,
routers and their biases are often float32 in a bfloat16 checkpoint. A tensor that a run only cuts is saved with the
values of the base's file; one that it changes is converted to the type in the base's file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmprune.anatomy.meta_model import find_layers
from llmprune.checkpoint.file_names import Dtypes, FileNames, Tensors
from llmprune.checkpoint.weight_headers import main_dtype
from llmprune.common.errors import CheckpointError
from llmprune.common.linalg.precision import dtype_name


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
    main = dtype if names.quantization else main_dtype(names.headers)
    listed = [f"{len(some)} in {dtype_name(stored)} ({_examples(some)})" for stored, some in named.items()]
    if not keep:
        return [
            f"model.dtype: {dtype_name(dtype)} converts tensors of the files: {'; '.join(listed)}; with auto every "
            "tensor keeps its type"
        ]
    about = f"the files hold {dtype_name(main)}" if main != dtype else "the files mix types"
    return [
        f"{about}, and the run computes in {dtype_name(dtype)}: of the tensors, {'; '.join(listed)}; each is saved in "
        "its file's type, and with the values of its file unless the run changes more than a cut"
    ]


def require_all(names: FileNames, shown: str) -> None:
    """Raise CheckpointError where the files' tensors are not those of the model: loading would invent random ones."""
    problems = {"missing": names.missing(), "unexpected": names.unexpected(), "mismatched": names.misshapen()}
    require_fitting(problems | {"not dequantizable": names.not_dequantizable()}, shown)


def require_fitting(problems: Mapping[str, Sequence[str]], shown: str) -> None:
    """Raise CheckpointError for tensors that do not fit a model's config. ``problems``: names by kind of fault."""
    listed = [f"{len(keys)} {kind}: {', '.join(keys[:3])}" for kind, keys in problems.items() if keys]
    if listed:
        raise CheckpointError(
            f"the weights of {shown} do not fit its config ({'; '.join(listed)}); get a complete checkpoint"
        )


def _examples(names: Sequence[str]) -> str:
    """Return the last two parts of the names, at most three different ones."""
    parts = list(dict.fromkeys(".".join(re.sub(r"\.\d+\.", ".", name).split(".")[-2:]) for name in names))
    return ", ".join(parts[:3]) + (", …" if len(parts) > 3 else "")
