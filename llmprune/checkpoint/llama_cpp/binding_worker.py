"""Process that quantises a GGUF file, or computes with it, through a Python binding of llama.cpp's library.

Run as ``python binding_worker.py quantize SOURCE TARGET KIND`` or ``python binding_worker.py logits FILE JOB``. The job
is a JSON file with ``text`` and ``new_tokens``; the result is printed as one line of JSON. Imports no llmprune: the
Python that runs this may be another environment's.

Shapes in names: L tokens, V vocabulary.
"""

from __future__ import annotations

import json
import os
import struct
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any


class Library:
    """The functions of ``llama.h`` in the installed binding: by cffi in one package, by ctypes in the other."""

    def __init__(self) -> None:
        if find_spec("llama_cpp_py_sync"):
            from llama_cpp_py_sync import _cffi_bindings as bindings

            self.ffi, self.c = bindings.get_ffi(), bindings.get_lib()
        else:
            import llama_cpp

            self.ffi, self.c = None, llama_cpp
        self.c.llama_backend_init()
        _load_backends()

    def pointer(self, params: Any) -> Any:
        """Return the address of a struct."""
        import ctypes

        return self.ffi.addressof(params) if self.ffi else ctypes.byref(params)

    def tokens(self, length: int) -> Any:
        """Return an array for this number of token ids."""
        return self.ffi.new(f"llama_token[{length}]") if self.ffi else (self.c.llama_token * length)()

    def row(self, pointer: Any, width: int) -> bytes:
        """Return the bytes of a row of float32 values."""
        import ctypes

        return bytes(self.ffi.buffer(pointer, 4 * width)) if self.ffi else ctypes.string_at(pointer, 4 * width)


def _threads() -> int:
    """Return how many threads compute."""
    return int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)))


def _load_backends() -> None:
    """Load the backends of a build that has them in files of their own, beside ``libggml``; Linux names the files."""
    import ctypes

    maps = Path("/proc/self/maps")
    paths = {line.split()[-1] for line in maps.read_text().splitlines() if "/libggml." in line} if maps.exists() else ()
    for path in paths:
        load = getattr(ctypes.CDLL(path), "ggml_backend_load_all_from_path", None)
        if load is not None and any(Path(path).parent.glob("libggml-cpu-*")):
            load(str(Path(path).parent).encode())


def quantize(source: str, target: str, *kind: str) -> None:
    """Write a GGUF file in another kind, such as ``Q4_K_M``. Exits with 1 where the library refuses."""
    (name,) = kind
    library = Library()
    params = library.c.llama_model_quantize_default_params()
    params.ftype = getattr(library.c, f"LLAMA_FTYPE_MOSTLY_{name}")
    params.nthread = _threads()
    if library.c.llama_model_quantize(source.encode(), target.encode(), library.pointer(params)):
        sys.exit(f"RuntimeError: llama.cpp did not quantise {Path(source).name} to {name}")


def logits(file: str, job: str) -> None:
    """Print the token ids of a text, the greedy tokens after it and their text; write its logits [L, V] as float32."""
    library, asked = Library(), json.loads(Path(job).read_text(encoding="utf-8"))
    c, text = library.c, asked["text"].encode()
    settings = c.llama_model_default_params()
    settings.n_gpu_layers = 0
    model = c.llama_model_load_from_file(file.encode(), settings)
    if not model:
        sys.exit(f"RuntimeError: llama.cpp did not load {Path(file).name}")
    vocabulary, found = c.llama_model_get_vocab(model), library.tokens(len(text) + 8)
    length = c.llama_tokenize(vocabulary, text, len(text), found, len(text) + 8, True, True)
    ids, room = list(found)[: max(length, 0)], length + asked["new_tokens"] + 8
    of_context = c.llama_context_default_params()
    of_context.n_ctx = of_context.n_batch = of_context.n_ubatch = max(room, 64)
    of_context.n_threads = of_context.n_threads_batch = _threads()  # its own default of 4 waits for busy cores
    context = c.llama_init_from_model(model, of_context)
    width = c.llama_vocab_n_tokens(vocabulary)
    rows: list[bytes] = []
    for token in ids:  # one at a time, so that every row is the last one of its batch
        rows.append(_step(library, context, token=token, width=width))
    new: list[int] = []
    row_V = rows[-1]
    for _ in range(asked["new_tokens"]):
        values = struct.unpack(f"{width}f", row_V)
        new.append(max(range(width), key=values.__getitem__))
        row_V = _step(library, context, token=new[-1], width=width)
    Path(asked["logits"]).write_bytes(b"".join(rows))
    print(json.dumps({"ids": ids, "new": new, "vocabulary": width}))


def _step(library: Library, context: Any, *, token: int, width: int) -> bytes:
    """Compute the logits after one more token."""
    array = library.tokens(1)
    array[0] = token
    if library.c.llama_decode(context, library.c.llama_batch_get_one(array, 1)):
        sys.exit("RuntimeError: llama.cpp did not compute the token")
    return library.row(library.c.llama_get_logits_ith(context, -1), width)


if __name__ == "__main__":
    (quantize if sys.argv[1] == "quantize" else logits)(*sys.argv[2:])
