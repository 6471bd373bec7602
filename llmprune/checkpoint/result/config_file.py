"""Write the pruned model's config.json: the base's own file, in its spelling, with only the cut's changes.

transformers reads the field names of its earlier versions but writes only its current ones, which those versions
misread. The file is therefore edited, and read back: it must equal the intended config.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig

from llmprune.anatomy.config_edits import clear_heads
from llmprune.anatomy.meta_model import Config, quiet_transformers, text_config
from llmprune.checkpoint.copied_files import CONFIG, without_code
from llmprune.checkpoint.quantized.formats import without_quantization
from llmprune.checkpoint.weight_headers import read_config
from llmprune.common.errors import ModelError
from llmprune.common.linalg.precision import dtype_name
from llmprune.common.nested import value_at

Raw = dict[str, Any]
Place = tuple[str, ...]
Values = dict[Place, Any]

# Fields of the library, of its code or of the weights file, which do not describe the model.
_OWN = (
    *("transformers_version", "_name_or_path", "architectures", "dtype", "auto_map", "custom_pipelines"),
    "transformers_weights",
)
_DTYPES = ("torch_dtype", "dtype")
_COPIES = 4  # after which every config class tried is stable


@dataclass(frozen=True)
class ConfigChange:
    """The config of a base model before and after a cut.

    ``base``: its folder; ``layers``: the kept layers; ``trusted``: True if its Python code is run and copied;
    ``heads``: True if the result keeps the base's prediction heads, which ``after`` counts then.
    """

    base: Path
    before: Config
    after: Config
    layers: tuple[int, ...]
    trusted: bool
    heads: bool = False


@dataclass(frozen=True)
class _Difference:
    """A field, by its place in the config, whose value the edited file does not express yet."""

    place: Place
    old: Any
    new: Any


def edited_config(change: ConfigChange, clear: Collection[str] = ()) -> Raw:
    """Return the fields of the base's file with the cut in them. ``clear``: fields that count heads to be left out.

    Raises ModelError where they cannot express the cut.
    """
    raw = read_config(change.base)
    raw.pop("transformers_weights", None)  # names a file of the base that the result does not have
    without_quantization(raw)
    without_code(raw, change.trusted)
    if not change.heads and not change.before.is_custom_code():
        clear_heads(raw)
    return _edit(raw, change, after=_clear(change.after, clear))


def write_config(
    change: ConfigChange, folder: Path, *, architecture: str, dtype: torch.dtype, clear: Collection[str] = ()
) -> None:
    """Write config.json into a folder, to which the base's trusted code is copied already.

    ``architecture``, ``dtype``: of the saved weights. Raises ModelError as ``edited_config`` does.
    """
    edited = edited_config(change, clear)
    if architecture not in (edited.get("architectures") or ()):
        edited["architectures"] = [architecture]
    _spell_dtype(edited, change.before, dtype=dtype)
    original = (change.base / CONFIG).read_bytes()
    same = edited == json.loads(original)
    text = json.dumps(edited, indent=2, ensure_ascii=False) + "\n"
    (folder / CONFIG).write_bytes(original if same else text.encode())
    with quiet_transformers():
        found = AutoConfig.from_pretrained(folder, trust_remote_code=change.trusted)
    _require_equal(_values(found), _values(_clear(change.after, clear)), model_type=change.after.model_type)


def _edit(raw: Raw, change: ConfigChange, *, after: Config) -> Raw:
    """Return the base's fields with the cut in them.

    Fields of the file are edited first. Differences that are left are then expressed by other fields of the file, by
    the class's own field names, and in the end by setting the field at its own place.
    """
    before, after = _settled(change.before), _settled(after)
    old, wanted = dict(leaves(before)), dict(leaves(after))
    changed = _differing(old, wanted)
    edited = copy.deepcopy(raw)
    _respell(edited, before, after=after, change=change)
    if _parsed(edited, change.before) is None:  # refused, perhaps because a list does not fit the number of layers
        for place in wanted:
            if place in changed or (isinstance(wanted[place], list) and place[-1] in (_part(edited, place[:-1]) or ())):
                _set(edited, place, value=wanted[place])
    proposers: tuple[Callable[[Raw, _Difference], Iterator[Raw]], ...]
    proposers = (partial(_under_other_names, change=change), _in_own_spelling)
    for propose in proposers:
        for place in sorted(changed & _remaining(edited, change.before, wanted=wanted)):
            candidates = propose(edited, _Difference(place, old.get(place), wanted.get(place)))
            edited = _closest(edited, candidates, change=change, wanted=wanted)
    for place in sorted(_remaining(edited, change.before, wanted=wanted)):
        _set(edited, place, value=wanted.get(place))
    _require_equal(_parsed(edited, change.before) or {}, wanted, model_type=change.after.model_type)
    return edited


def _respell(edited: Raw, before: Config, *, after: Config, change: ConfigChange) -> None:
    """Edit the fields of the file, in place, under any name that the class accepts: a field, an alias, a property."""
    for name, written in edited.items():
        if name in (*_OWN, *_DTYPES):
            continue
        part = vars(before).get(name)
        if isinstance(part, PretrainedConfig) and isinstance(written, dict):
            _respell(written, part, after=getattr(after, name), change=change)
            continue
        old, new = (_read_field(config, name) for config in (before, after))
        if old != new:
            edited[name] = _as_spelled(written, old, new=new, change=change)


def _read_field(config: Config, name: str) -> Any:
    """Return the value of a field, or of an attribute with a plain value."""
    fields, own = config.to_dict(), config.attribute_map.get(name, name)
    value = fields[own] if own in fields else getattr(config, name, None)
    return value if isinstance(value, bool | int | float | str | list | dict | None) else None


def _as_spelled(written: Any, old: Any, *, new: Any, change: ConfigChange) -> Any:
    """Return a field's new value; for a list by layer, the file's own entries, which may be spelled differently."""
    if isinstance(old, list) and _is_by_layer(written, change) and [old[index] for index in change.layers] == new:
        return _kept(written, change)
    return new


def _closest(edited: Raw, candidates: Iterable[Raw], *, change: ConfigChange, wanted: Values) -> Raw:
    """Return the first candidate that removes differences and adds none; the fields unchanged if there is none."""
    remaining = _remaining(edited, change.before, wanted=wanted)
    for candidate in candidates if remaining else ():
        found = _parsed(candidate, change.before)
        if found is not None and _differing(found, wanted) < remaining:
            return candidate
    return edited


def _under_other_names(edited: Raw, difference: _Difference, *, change: ConfigChange) -> Iterator[Raw]:
    """Yield the fields with the new value in another field, of any part, that has the old one."""
    for place, value in list(_holders(edited, difference, change=change)):
        candidate = copy.deepcopy(edited)
        _set(candidate, place, value=value)
        yield candidate


def _in_own_spelling(edited: Raw, difference: _Difference) -> Iterator[Raw]:
    """Yield the fields with the new value under the class's own name, in its part or in a part that contains it."""
    place = difference.place
    for depth in reversed(range(len(place))):
        if _part(edited, place[:depth]) is not None:
            candidate = copy.deepcopy(edited)
            _set(candidate, (*place[:depth], place[-1]), value=difference.new)
            yield candidate


def _holders(
    raw: Raw, difference: _Difference, *, change: ConfigChange, part: Place = ()
) -> Iterator[tuple[Place, Any]]:
    """Yield places that may hold a field under another name or in another part, each with its new value.

    Some classes move or rename fields as they read them, or derive a list by layer from a text with one letter each.
    """
    old = difference.old
    for name, found in raw.items():
        if isinstance(found, dict):
            yield from _holders(found, difference, change=change, part=(*part, name))
        elif type(found) is type(old) and found == old and not isinstance(old, bool | None):
            yield (*part, name), difference.new
        elif _is_by_layer(found, change):
            yield (*part, name), _kept(found, change)


def _is_by_layer(value: Any, change: ConfigChange) -> bool:
    return isinstance(value, list | str) and len(value) == text_config(change.before).num_hidden_layers


def _kept(value: list[Any] | str, change: ConfigChange) -> list[Any] | str:
    kept = [value[index] for index in change.layers]
    return "".join(kept) if isinstance(value, str) else kept


def _parsed(raw: Raw, before: Config) -> Values | None:
    """Return the values that the base's config class reads from the fields; None if it refuses them."""
    try:
        with quiet_transformers():
            return _values(type(before).from_dict(type(before)._decode_special_floats(copy.deepcopy(raw))))
    except Exception:  # a config class may raise anything for values that it refuses
        return None


def _remaining(raw: Raw, before: Config, *, wanted: Values) -> set[Place]:
    """Return the places where the config that the class reads from these fields differs from the wanted one."""
    return _differing(_parsed(raw, before) or {}, wanted)


def _differing(found: Values, wanted: Values) -> set[Place]:
    return {place for place in found.keys() | wanted.keys() if found.get(place) != wanted.get(place)}


def _values(config: Config) -> Values:
    return dict(leaves(_settled(config)))


def _settled(config: Config) -> Config:
    """Copy a config until the copy is equal: some classes change fields when they read their own output."""
    for _ in range(_COPIES):
        with quiet_transformers():
            copied: Config = type(config).from_dict(config.to_dict())
        same = dict(leaves(copied)) == dict(leaves(config))
        config = copied
        if same:
            break
    return config


def leaves(config: Config, place: Place = ()) -> Iterator[tuple[Place, Any]]:
    """Yield (place, value) of the fields of a config and of its parts that describe the model."""
    for name, value in config.to_dict().items():
        part = vars(config).get(name)
        if isinstance(part, PretrainedConfig):
            yield from leaves(part, (*place, name))
        elif name not in _OWN:
            yield (*place, name), value


def _clear(config: Config, names: Collection[str]) -> Config:
    """Return a copy of a config in which these fields, in any part, are 0."""
    whole = config.to_dict()
    for place, _ in list(leaves(config)):
        part = _part(whole, place[:-1])
        if place[-1] in names and part is not None:
            part[place[-1]] = 0
    cleared: Config = type(config).from_dict(whole)
    return cleared


def _part(raw: Raw, place: Place) -> Raw | None:
    part = value_at(raw, place)
    return part if isinstance(part, dict) else None


def _set(raw: Raw, place: Place, *, value: Any) -> None:
    for name in place[:-1]:
        raw = raw.setdefault(name, {})
    if value is None:
        raw.pop(place[-1], None)
    else:
        raw[place[-1]] = value


def _spell_dtype(edited: Raw, before: Config, *, dtype: torch.dtype) -> None:
    """Set the dtype under the names that the file has for it, where the weights have another than the base."""
    stored = getattr(before, "dtype", None) or getattr(text_config(before), "dtype", None)
    if stored is None or stored == dtype:
        return
    parts = [edited, *(edited[name] for name in before.sub_configs if isinstance(edited.get(name), dict))]
    for part in parts:
        for name in _DTYPES:
            if part.get(name):
                part[name] = dtype_name(dtype)


def _require_equal(found: Values, wanted: Values, *, model_type: str) -> None:
    wrong = sorted(_differing(found, wanted))
    if wrong:
        place = wrong[0]
        raise ModelError(
            f"{model_type}: the base's {CONFIG} cannot be edited to express this cut: {'.'.join(place)} is read back "
            f"as {str(found.get(place))[:80]}, not {str(wanted.get(place))[:80]}; save the base again with "
            "save_pretrained, and prune the new folder"
        )
