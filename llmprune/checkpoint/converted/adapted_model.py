"""A base model with an adapter around it, whose own weights are there only while their module is merged.

peft wraps the whole model and loads the adapter. The weights of the base have their shapes but take no memory (one
zero, expanded), so that peft treats them as real; each module gets its own weights just before peft merges it.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmprune.checkpoint.converted.adapter import ADAPTER_WEIGHTS, Adapter
from llmprune.common.errors import CheckpointError, ModelError

_PREFIX = "base_model.model."
_NAME = "default"  # of the adapter in peft
_COPY = re.compile(r"\.(modules_to_save|original_module)\.")  # peft saves embeddings of another size several times


@dataclass(frozen=True)
class _Leaf:
    """The module that holds a weight. ``tuners``: the adapter's layers around it, the outermost first."""

    module: nn.Module
    tuners: tuple[BaseTunerLayer, ...]


def whole_tensors(adapter: Adapter, names: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of those tensors of a model, by name, that an adapter's file has whole, such as embeddings.

    Raises CheckpointError for a damaged file.
    """
    known = set(names)
    try:
        with safe_open(adapter.folder / ADAPTER_WEIGHTS, framework="pt") as file:
            shapes = {_plain(key): tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118  # safe_open is no mapping
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"the {ADAPTER_WEIGHTS} of {adapter.shown} cannot be read ({error}); it is damaged or cut short: fetch it "
            "again"
        ) from error
    return {name: shape for name, shape in shapes.items() if name in known}


def _plain(key: str) -> str:
    """Return the name in the base model of a tensor that an adapter's file has whole."""
    return key.removeprefix(_PREFIX).replace(".base_layer.", ".")


class AdaptedModel:
    """A model with an adapter around it.

    ``model``: the base without weights, which is changed. Raises ModelError where the adapter does not fit it.
    """

    def __init__(self, model: PreTrainedModel, adapter: Adapter, *, base_shown: str) -> None:
        names = list(model.state_dict())
        self.shown = adapter.shown
        self.whole = whole_tensors(adapter, names)  # the adapter's file has them instead of a change
        _hollow(model, whole=self.whole)
        with _refused(adapter, base_shown), quiet_peft():
            config = PeftConfig.from_pretrained(str(adapter.folder))
            config.inference_mode = True
            if hasattr(config, "init_lora_weights"):
                config.init_lora_weights = True  # the values are replaced, and the start must not change the base
            wrapped = PeftModel(model, config, adapter_name=_NAME)
            _allocate_copies(wrapped)
            loaded = wrapped.load_adapter(str(adapter.folder), _NAME, torch_device="cpu")
            self._require_all(wrapped, loaded.unexpected_keys, adapter=adapter)
        self._root: Any = wrapped.base_model.model
        self.touched = frozenset(name for name in names if name in self.whole or self._leaf(name).tuners)

    def merged(self, base: Mapping[str, Tensor], *, check: bool = True) -> dict[str, Tensor]:
        """Return weights of the base, by name, with the adapter in them. The base's tensors are not changed.

        ``check``: raise CheckpointError for weights that are not finite.
        """
        leaves = {name: self._leaf(name) for name in base if name in self.touched}
        own = {name: _get(leaf.module, name).detach() for name, leaf in leaves.items()}
        for name, leaf in leaves.items():  # merging changes the tensor in its place
            _set(leaf.module, name, tensor=(own if name in self.whole else base)[name].clone())
        for tuner in {id(tuner): tuner for leaf in leaves.values() for tuner in leaf.tuners}.values():
            with quiet_peft():
                tuner.merge(safe_merge=False)
                tuner.merged_adapters.clear()  # or it would not be merged again
        result = dict(base) | {name: _get(leaf.module, name).detach() for name, leaf in leaves.items()}
        for name, leaf in leaves.items():
            if check and not bool(result[name].isfinite().all()):
                raise CheckpointError(
                    f"{self.shown} gives {name} values that are not finite; the adapter is damaged: fetch it again"
                )
            _set(leaf.module, name, tensor=own[name])
        return result

    def _leaf(self, name: str) -> _Leaf:
        """Return the module that has a weight of the base, inside the adapter's layers."""
        module: Any = self._root
        tuners: list[BaseTunerLayer] = []
        for part in name.split(".")[:-1]:
            module = getattr(module, part)
            while isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
                if isinstance(module, BaseTunerLayer):
                    tuners.append(module)
                module = _inside(module)
        return _Leaf(module, tuple(tuners))

    def _require_all(self, wrapped: PeftModel, unexpected: Iterable[str], *, adapter: Adapter) -> None:
        """Raise ValueError where the adapter's file lacks tensors of its config, or has others."""
        with safe_open(adapter.folder / ADAPTER_WEIGHTS, framework="pt") as file:
            has = set(file.keys())
        wanted = get_peft_model_state_dict(wrapped, adapter_name=_NAME, save_embedding_layers=False)
        missing = sorted(name for name in wanted if name not in has and _plain(name) not in self.whole)
        if missing:
            raise ValueError(f"its file lacks {len(missing)} tensors of its config, such as {missing[0]}")
        others = sorted(name for name in unexpected if _COPY.sub(".", _plain(name)) not in self.whole)
        if others:
            raise ValueError(f"the base has no place for {len(others)} of its tensors, such as {others[0]}")


def _hollow(model: PreTrainedModel, *, whole: Mapping[str, tuple[int, ...]]) -> None:
    """Give a model on the meta device weights that take no memory; those that the adapter has ``whole`` take theirs."""
    for path, module in model.named_modules():
        for name, value in list(module.named_parameters(recurse=False)):
            full = f"{path}.{name}" if path else name
            filled = torch.empty(whole[full], dtype=value.dtype) if full in whole else _without_memory(value)
            setattr(module, name, nn.Parameter(filled, requires_grad=False))


def _without_memory(value: Tensor) -> Tensor:
    return torch.zeros((), dtype=value.dtype).expand(value.shape)


def _allocate_copies(wrapped: PeftModel) -> None:
    """Give memory to the modules of which peft trains copies: their weights are loaded."""
    for module in wrapped.modules():
        if isinstance(module, ModulesToSaveWrapper):
            for parameter in module.modules_to_save.parameters():
                parameter.data = torch.empty(parameter.shape, dtype=parameter.dtype)


def _inside(wrapper: Any) -> nn.Module:
    """Return the module in a layer of an adapter, which holds the base's weights or the trained copy of them."""
    if isinstance(wrapper, ModulesToSaveWrapper):
        inner = wrapper.modules_to_save[_NAME]
    elif isinstance(wrapper, AuxiliaryTrainingWrapper):
        inner = wrapper.token_adapter  # trained rows of the embeddings
    else:
        inner = wrapper.base_layer
    assert isinstance(inner, nn.Module), "adapters wrap modules"
    return inner


def _get(module: nn.Module, name: str) -> Tensor:
    value: Tensor = getattr(module, name.rpartition(".")[2])
    return value


def _set(module: nn.Module, name: str, *, tensor: Tensor) -> None:
    setattr(module, name.rpartition(".")[2], nn.Parameter(tensor, requires_grad=False))


@contextmanager
def _refused(adapter: Adapter, base_shown: str) -> Iterator[None]:
    """Raise ModelError where peft cannot put the adapter around the base."""
    try:
        yield
    except Exception as error:  # peft raises whatever its layers do
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        cause = next((line for line in lines if "mismatch for" in line), lines[0])[:300]
        raise ModelError(
            f"the adapter {adapter.shown} does not fit {base_shown} ({cause.rstrip('.')}); name the model that it was "
            "trained on in model.base"
        ) from error


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Hide peft's warnings, which are about training."""
    logger: Any = logging.getLogger("peft")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)
