"""Sections that a recipe gives in one of several kinds, such as a criterion, and how new kinds are found.

A family of kinds is a direct subclass of ``Variant``. A subclass of the family that declares

    kind: Literal["share"] = "share"

is one of its kinds as soon as it is defined: recipes accept it, and messages, schema and reference list it.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from inspect import get_annotations
from pkgutil import iter_modules
from typing import Any, ClassVar, Literal, Self, get_origin

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

from llmprune.common.schema import Section


class Variant(Section):
    """A section whose key ``kind`` names one of the subclasses that declare it.

    ``needs_kind``: the key is required; else a section without it is the first kind that has all of its keys.
    """

    needs_kind: ClassVar[bool] = True
    registry: ClassVar[dict[str, type[Variant]]]  # of a family, by kind

    kind: str

    @classmethod
    def kinds(cls) -> tuple[type[Self], ...]:
        """Return the kinds of a family in the order of their definition; a kind itself returns only itself."""
        if get_origin(cls.model_fields["kind"].annotation) is Literal:
            return (cls,)
        return tuple(kind for kind in cls.registry.values() if issubclass(kind, cls))

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        if Variant in cls.__bases__:
            cls.registry = {}
        elif "kind" in get_annotations(cls):
            name = cls.model_fields["kind"].default
            assert name not in cls.registry, f"{cls.registry[name]} has the kind {name} already"
            cls.registry[name] = cls

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler, /) -> CoreSchema:
        """Return the schema of one kind, or for a family that of all its kinds so far."""
        if cls.kinds() == (cls,):
            return handler(source)
        choices = {kind.model_fields["kind"].default: handler.generate_schema(kind) for kind in cls.kinds()}
        if cls.needs_kind:
            return core_schema.tagged_union_schema(choices, discriminator="kind", strict=False, from_attributes=True)
        if len(choices) == 1:
            return next(iter(choices.values()))
        return core_schema.union_schema(list(choices.values()))


def import_kinds(package: str, first: Sequence[str] = ()) -> None:
    """Import every module of a package, those named ``first`` before the others, so that their kinds are known."""
    found = sorted(module.name for module in iter_modules(import_module(package).__path__))
    for name in sorted(found, key=lambda name: first.index(name) if name in first else len(first)):
        import_module(f"{package}.{name}")
