"""Names of modules and tensors within a layer. The layer itself has the name ""."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn


def is_inside(name: str, path: str) -> bool:
    """Check that a module or tensor is the module at ``path`` or part of it."""
    return not path or name == path or name.startswith(f"{path}.")


def relative_name(name: str, path: str) -> str:
    """Return the name of a module or tensor relative to the module at ``path``, which contains it."""
    return name.removeprefix(path).lstrip(".")


def holder_of(name: str) -> str:
    """Return the module that holds a tensor; for a projection's weight or bias, the one that holds the projection."""
    owner, _, last = name.rpartition(".")
    return owner.rpartition(".")[0] if last in ("weight", "bias") else owner


def paths_around(path: str) -> Iterator[str]:
    """Yield a module's path and those of the modules that contain it, up to the layer itself."""
    while path:
        yield path
        path = path.rpartition(".")[0]
    yield ""


def tensors_of(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters and buffers of a module, with their names in it."""
    yield from module.named_parameters()
    yield from module.named_buffers()


def tensor_of(module: nn.Module, name: str) -> Tensor:
    """Return a parameter or buffer by its name in the module."""
    owner, _, last = name.rpartition(".")
    found: Tensor = getattr(module.get_submodule(owner), last)
    return found
