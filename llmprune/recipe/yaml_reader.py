"""Read strict YAML for recipes, ``--set`` values and the web form: plain values of YAML 1.2, no repeated keys.

PyYAML follows YAML 1.1, where 010 is 8, 1:30 is 90, 1e-3 is text and a revision such as 2024-07-01 is a date. It keeps
the last of two equal keys without a warning, and its constructors raise errors of any kind for a value that does not
fit its tag. Here every node is checked before a value is constructed from it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import yaml

from llmprune.common.errors import RecipeError

NOT_YAML = (yaml.YAMLError, ValueError, OverflowError, RecursionError)  # raised by PyYAML's parser and composer
_MOST_DIGITS = 100  # of a whole number; a commit of digits is shorter, and the recipe's own check reports it better
_TAG = "tag:yaml.org,2002:"
_PLAIN = {
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "int": (r"[-+]?[0-9]+", "-+0123456789"),
    "float": (
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
    "merge": (r"<<", "<"),
}
_PATTERNS = {_TAG + name: re.compile(f"(?:{pattern})$") for name, (pattern, _) in _PLAIN.items()}


@dataclass(frozen=True)
class Document:
    """Data read from YAML, the nodes with their positions in the text, and a sentence for each repeated key."""

    data: Any
    root: yaml.Node | None
    repeated: list[str]


def read(text: str) -> Document:
    """Read one YAML document. Raises RecipeError where it is not valid."""
    try:
        loader = _StrictLoader(text)
        try:
            root = loader.get_single_node()
            data = None if root is None else loader.construct_document(root)
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        problem = " ".join(str(getattr(error, "problem", None) or error).split())
        hint = "; indent with spaces" if r"'\t'" in problem else ""
        raise RecipeError(f"{place}not valid YAML: {problem}{hint}") from None
    except RecursionError:
        raise RecipeError(
            "not a recipe: brackets or mappings are nested hundreds deep; close those that are open"
        ) from None
    except (ValueError, OverflowError):
        raise RecipeError(
            r"not valid YAML: a \U escape is above \U0010FFFF, or the version after %YAML is too long; correct it"
        ) from None
    return Document(data, root, loader.repeated)


def read_value(text: str) -> Any:
    """Read one value. Raises RecipeError where it is not valid or repeats a key."""
    document = read(text)
    if document.repeated:
        raise RecipeError(document.repeated)
    return document.data


def dump(data: Any, *, width: int = 80) -> str:
    """Write data as YAML, without aliases, that ``read`` and YAML 1.1 interpret in the same way."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=width)


class _StrictLoader(yaml.SafeLoader):
    """Loader that refuses unknown or unfitting tags and keys that are no words, and records repeated keys."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.repeated: list[str] = []

    def compose_scalar_node(self, anchor: Any) -> yaml.ScalarNode:
        node: yaml.ScalarNode = super().compose_scalar_node(anchor)
        if node.tag == _TAG + "str":
            if re.search(r"[\ud800-\udfff]", node.value):
                raise _refused(node, r"\uD800 to \uDFFF are halves of a character; write the whole character")
        elif node.tag not in _PATTERNS:
            raise _unread_tag(node)
        elif not _PATTERNS[node.tag].fullmatch(node.value):
            name = node.tag.removeprefix(_TAG)
            raise _refused(node, f"{node.value[:60]!r} does not fit its tag !!{name}; correct it or remove the tag")
        elif node.tag == _TAG + "int" and len(node.value) > _MOST_DIGITS:
            digits = f"a whole number of {len(node.value):,} digits"
            raise _refused(node, f"{digits}; at most {_MOST_DIGITS} are read: put it in quotes if it is a name")
        return node

    def compose_sequence_node(self, anchor: Any) -> yaml.SequenceNode:
        node: yaml.SequenceNode = super().compose_sequence_node(anchor)
        if node.tag != _TAG + "seq":
            raise _unread_tag(node)
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        if node.tag != _TAG + "map":
            raise _unread_tag(node)
        seen = set()
        for key, _ in node.value:
            line = f"line {key.start_mark.line + 1}"
            if not isinstance(key, yaml.ScalarNode):
                raise RecipeError(f"{line}: a key must be a word, not a list or a mapping")
            if key.tag.removeprefix(_TAG) not in ("str", "int", "merge"):
                raise RecipeError(f"{line}: a key must be a word, not {key.value!r}; put it in quotes if it is one")
            if key.value in seen:
                self.repeated.append(f"{line}: {key.value!r} is given twice; keep one of them")
            seen.add(key.value)
        return node


class _Dumper(yaml.SafeDumper):
    """Dumper that quotes text which either version of YAML would read as another type."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_StrictLoader.yaml_implicit_resolvers = {}
for _name, (_, _first) in _PLAIN.items():
    _StrictLoader.add_implicit_resolver(_TAG + _name, _PATTERNS[_TAG + _name], list(_first))
    _Dumper.add_implicit_resolver(_TAG + _name, _PATTERNS[_TAG + _name], list(_first))
_StrictLoader.add_constructor(_TAG + "int", lambda _, node: int(node.value))


def _refused(node: yaml.Node, problem: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)


def _unread_tag(node: yaml.Node) -> yaml.MarkedYAMLError:
    tag = f"!!{node.tag.removeprefix(_TAG)}" if node.tag.startswith(_TAG) else node.tag
    return _refused(node, f"the tag {tag[:60]!r} is not supported on {_KINDS[type(node)]} of a recipe; leave it out")


_KINDS: dict[type[yaml.Node], str] = {
    yaml.ScalarNode: "a value",
    yaml.SequenceNode: "a list",
    yaml.MappingNode: "a mapping",
}
