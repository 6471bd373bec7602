"""Find text in installed packages: files of a package, one or many, or a mapping of texts in a module."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

from llmprune.common.errors import CalibrationError
from llmprune.common.paths import is_plain_path
from llmprune.recipe.text_source import PACKAGE_SCHEME, TextSource


def package_folder(module_name: str) -> Path | None:
    """Return the folder of an installed package, without importing it; None where it is not installed."""
    try:
        spec: Any = importlib.util.find_spec(module_name)
    except (ImportError, ValueError):
        return None
    places = list(spec.submodule_search_locations or ()) if spec else []
    return Path(places[0]) if places else None


def is_pattern(name: str) -> bool:
    """Check that the name in a package source is a pattern of files, such as ``**/README.md``."""
    return "*" in name


def package_files(source: TextSource) -> list[Path]:
    """Return the files of an installed package that a source's pattern matches, sorted; links are left out.

    None match a pattern that is no pattern of files below the package, such as ``**.py`` or ``../*``.
    """
    module_name, _, pattern = source.dataset.removeprefix(PACKAGE_SCHEME).partition("/")
    folder = package_folder(module_name)
    if folder is None or not is_plain_path(pattern):
        return []
    try:
        found = list(folder.glob(pattern))
    except ValueError:  # ** together with other characters, before Python 3.13
        return []
    return sorted(path for path in found if path.is_file() and not path.is_symlink())


def package_texts(source: TextSource) -> list[str]:
    """Return the texts that a package source names: files by a pattern with ``*``, or a module's mapping or list.

    A module is imported, a pattern's package is not. Raises CalibrationError where there is none.
    """
    module_name, _, name = source.dataset.removeprefix(PACKAGE_SCHEME).partition("/")
    if not is_plain_path(name):
        raise CalibrationError(
            f"{source.dataset} does not name a part of a package; give package://MODULE/NAME of an installed module"
        )
    if is_pattern(name):
        found = [path.read_text(encoding="utf-8", errors="replace") for path in package_files(source)]
        if not any(found):
            raise CalibrationError(
                f"{source.dataset} matches no file with text; check package and pattern, "
                "such as *.py, or **/*.py for all folders below"
            )
        return found
    try:
        texts = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise CalibrationError(
            f"{source.dataset} cannot be read: {error}; give package://MODULE/NAME of an installed module"
        ) from error
    rows = [texts[key] for key in sorted(texts)] if isinstance(texts, dict) else texts
    if not isinstance(rows, list | tuple) or not rows or not all(isinstance(row, str) for row in rows):
        raise CalibrationError(f"{source.dataset} is not a non-empty mapping or list of texts; name one that is")
    return list(rows)
