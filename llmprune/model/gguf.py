"""A model that an installed package carries as a GGUF file, converted once to an ordinary checkpoint."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import tempfile
from pathlib import Path

from llmprune.errors import ModelError
from llmprune.texts import PACKAGE_SCHEME, package_folder

logger = logging.getLogger(__name__)


def gguf_location(model_id: str) -> Path:
    """The file that ``package://MODULE/FILE.gguf`` names. Raises ModelError where there is none."""
    module_name, _, file_name = model_id.removeprefix(PACKAGE_SCHEME).partition("/")
    folder = package_folder(module_name)
    if folder is None:
        raise ModelError(
            f"{model_id}: no package {module_name!r} is installed; "
            "the demo model comes with: pip install 'llmprune[demo]'"
        )
    path = folder / file_name
    if not path.is_file() or path.suffix != ".gguf":
        there = ", ".join(sorted(entry.name for entry in folder.glob("*.gguf"))) or "none"
        raise ModelError(f"{model_id}: the package has no GGUF file {file_name!r}; it has: {there}")
    return path


def cache_folder(model_id: str) -> Path:
    """Where the converted checkpoint lies, or will lie: under HF_HOME, named by the file's contents."""
    from huggingface_hub.constants import HF_HOME

    path = gguf_location(model_id)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:12]
    return Path(HF_HOME) / "llmprune" / f"{path.stem}-{digest}"


def converted_folder(model_id: str) -> Path:
    """A plain float32 checkpoint of the GGUF file, kept in the user's cache."""
    path, folder = gguf_location(model_id), cache_folder(model_id)
    if not folder.is_dir():
        logger.info("converting %s once, into %s", path.name, folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=folder.name))
        try:
            _convert(path, beside)
            _rename_once(beside, folder)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
    return folder


def _rename_once(beside: Path, folder: Path) -> None:
    try:
        os.rename(beside, folder)
    except OSError:
        if not folder.is_dir():  # else another process was first, with the same result
            raise


def _convert(path: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    location = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    model = AutoModelForCausalLM.from_pretrained(**location, dtype=torch.float32, trust_remote_code=False)
    # transformers leaves the marks of the quantized file on what is now plain float32, and will not save it
    del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**location, trust_remote_code=False).save_pretrained(folder)
