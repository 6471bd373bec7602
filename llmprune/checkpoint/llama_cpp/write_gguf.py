"""Write a checkpoint as GGUF files with llama.cpp's own converter and quantiser."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from llmprune.checkpoint.copied_files import CONFIG, copy_selected, select_files, without_code
from llmprune.checkpoint.llama_cpp.tools import LlamaCpp
from llmprune.common.distributed import environment_of_one
from llmprune.common.errors import ModelError
from llmprune.common.files import disk_errors, write_atomically
from llmprune.recipe.export import CONVERTED

_WIDE = ("f32", "bf16", "f16")  # kinds from which the others can be quantised
_BYTES = {"f32": 4.0, "f16": 2.0, "bf16": 2.0, "q8_0": 1.0625}  # of one weight
_LESS = 0.9  # bytes of one weight in the kinds below 8 bits, at most: a row that k-quants do not divide takes more
_RAISED = re.compile(r"(?:\w+\.)*(\w+(?:Error|Exception)): (.*)")


@dataclass(frozen=True)
class GgufWriter:
    """Writer of GGUF files. ``tools``: llama.cpp's; ``name``: of the model, in the metadata of the files."""

    tools: LlamaCpp
    name: str

    def write(self, model: Path, folder: Path, *, kinds: Sequence[str]) -> dict[str, Path]:
        """Write one file of each kind into ``folder``, and return them by kind.

        Each is complete or absent; one that is there is kept. Raises ModelError where a tool refuses the model,
        DiskError.
        """
        files = {kind: folder / f"model-{kind.upper()}.gguf" for kind in kinds}
        missing = [kind for kind in kinds if not files[kind].is_file()]
        with disk_errors(folder.parent):
            folder.mkdir(exist_ok=True)
        for kind in missing:
            if self._is_converted(kind):
                write_atomically(files[kind], partial(self._convert, model, kind=kind))
        quantised = [kind for kind in missing if not self._is_converted(kind)]
        if not quantised:
            return files
        with TemporaryDirectory(prefix=".gguf-", dir=folder) as temporary:
            source = next((files[kind] for kind in _WIDE if kind in files), None)
            if source is None:
                source = Path(temporary) / "wide.gguf"
                self._convert(model, source, kind="auto")
            for kind in quantised:
                write_atomically(files[kind], partial(self._quantise, source, kind=kind))
        return files

    def _is_converted(self, kind: str) -> bool:
        """Check that the converter writes a kind: the quantiser, compiled code, makes Q8_0 sooner."""
        return kind in _WIDE or (kind in CONVERTED and not self.tools.quantizer)

    def _convert(self, model: Path, file: Path, *, kind: str) -> None:
        assert self.tools.converter, "LlamaCpp.require was called before"
        options = ("--outtype", kind, "--outfile", str(file), "--model-name", self.name)
        run_tool((*self.tools.converter, str(model), *options), "converter", file=file)

    def _quantise(self, source: Path, file: Path, *, kind: str) -> None:
        assert self.tools.quantizer, "LlamaCpp.require was called before"
        run_tool((*self.tools.quantizer, str(source), str(file), kind.upper()), "quantiser", file=file)


def gguf_bytes(parameters: int, kinds: Sequence[str]) -> int:
    """Return an upper bound of the bytes on disk while GGUF files of these kinds are written."""
    weights = sum(_BYTES.get(kind, _LESS) for kind in kinds)
    if kinds and not any(kind in _WIDE for kind in kinds):
        weights += _BYTES["bf16"]  # the file to quantise from
    return int(weights * parameters)


def refused_vocabulary(tools: LlamaCpp, folder: Path) -> str | None:
    """Return why the converter refuses a model by its config and its tokenizer alone; None where it takes them.

    ``folder``: has these files; weights are not needed. They are copied without the names of Python code, which the
    converter would run: it loads tokenizers with ``trust_remote_code``.
    """
    assert tools.converter, "LlamaCpp.require was called before"
    with TemporaryDirectory(prefix="llmprune-gguf-") as name:
        copy, file = Path(name) / "model", Path(name) / "vocabulary.gguf"
        copy.mkdir()
        copy_selected(folder, select_files(folder, trusted=False), target=copy, trusted=False)
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        without_code(config, trusted=False)
        (copy / CONFIG).write_text(json.dumps(config), encoding="utf-8")
        try:
            run_tool((*tools.converter, str(copy), "--vocab-only", "--outfile", str(file)), "converter", file=file)
        except ModelError as error:
            return str(error)
    return None


def names_code(folder: Path) -> bool:
    """Check whether JSON files of a checkpoint name Python code, which the converter would run."""
    texts = (path.read_text(encoding="utf-8", errors="replace") for path in folder.glob("*.json"))
    return any('"auto_map"' in text for text in texts)


def run_tool(command: Sequence[str], tool: str, *, file: Path | None = None) -> str:
    """Run one of llama.cpp's tools and return its standard output. ``file``: must be there afterwards.

    Raises ModelError with the tool's own reason.
    """
    try:
        done = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", check=False, env=environment_of_one()
        )
    except OSError as error:
        raise ModelError(f"llama.cpp's {tool} cannot be started: {error}") from error
    if done.returncode or (file is not None and not file.is_file()):
        why = _reason(done.stderr) or _reason(done.stdout) or f"it ended with {done.returncode}"
        raise ModelError(f"llama.cpp's {tool} ({command[0]}) refused the model: {why}")
    return done.stdout


def _reason(text: str) -> str:
    """Return the last error that a tool printed; its last line where it printed none."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    raised = [match for line in lines if (match := _RAISED.match(line))]
    if raised:
        kind, message = raised[-1].groups()
        return message if kind in ("RuntimeError", "ValueError") else f"{kind}: {message}"
    told = [line for line in lines if line.startswith("ERROR")]
    return (told or lines or [""])[-1]
