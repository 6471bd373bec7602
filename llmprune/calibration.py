"""Text to token windows: seeded, packed, fingerprinted.

Shapes: N windows, L sequence length.

Documents are shuffled with the seed, tokenised without special tokens, joined
with the end-of-text token and cut into windows of L tokens; no window overlaps
another. Where the shuffled documents give fewer windows than were asked for,
that is an error and not a repetition.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pydantic import Field, model_validator

from llmprune.errors import CalibrationError
from llmprune.schema import Section

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

PACKAGE_SCHEME = "package://"
FILE_BUILDERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}


class TextSource(Section):
    """One source of text: a hub data set, a local file, or text that an installed package carries."""

    dataset: str = Field(
        min_length=1,
        description="Hub id, a .txt, .jsonl or .parquet file, or package://MODULE/NAME for a file in a "
        "package or a mapping of texts in a module.",
    )
    config: str | None = Field(None, description="Configuration (subset) of a hub data set.")
    split: str = Field("train", description="Split, slices allowed: train[:80%].")
    text_field: str | None = Field(None, description="Column that holds the text; default: text.")
    messages_field: str | None = Field(
        None, description="Column of chat messages, rendered with the model's chat template."
    )
    weight: float = Field(1.0, gt=0, description="Share of the windows that this source gets.")

    @model_validator(mode="after")
    def _one_field(self) -> Self:
        if self.text_field is not None and self.messages_field is not None:
            raise ValueError("text_field and messages_field exclude each other; keep one")
        return self


class TokenWindows(Section):
    """Token windows [samples, sequence_length] from one source, several, or a file of ready tokens."""

    dataset: str | None = Field(None, min_length=1, description=TextSource.model_fields["dataset"].description)
    config: str | None = Field(None, description=TextSource.model_fields["config"].description)
    split: str = Field("train", description=TextSource.model_fields["split"].description)
    text_field: str | None = Field(None, description=TextSource.model_fields["text_field"].description)
    messages_field: str | None = Field(None, description=TextSource.model_fields["messages_field"].description)
    sources: tuple[TextSource, ...] | None = Field(
        None, strict=False, min_length=1, description="Several sources, mixed by weight."
    )
    tokens: str | None = Field(None, description="A safetensors file of ready token windows [N, L].")
    key: str | None = Field(None, description="Name of the tensor in the tokens file.")
    samples: int | None = Field(None, gt=0, description="Number of windows N.")
    sequence_length: int | None = Field(None, ge=8, description="Tokens in a window L.")
    seed: int = Field(0, ge=0, description="Seed of the document shuffle.")
    batch_size: int = Field(4, gt=0, description="Windows that go through a layer at a time.")

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        given = [name for name in ("dataset", "sources", "tokens") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"needs exactly one of dataset, sources or tokens; {' and '.join(given) or 'none'} given"
            )
        if self.tokens is None and self.key is not None:
            raise ValueError("key belongs to a tokens file; remove it")
        if self.tokens is not None and self.key is None:
            raise ValueError("a tokens file needs key: the name of the tensor in it")
        if self.dataset is None:
            single = ("config", "split", "text_field", "messages_field")
            stray = [name for name in single if name in self.model_fields_set]
            if stray:
                raise ValueError(f"{', '.join(stray)} belongs to dataset, not to {given[0]}")
        if self.dataset is not None:
            self.text_sources()
        return self

    def text_sources(self) -> tuple[TextSource, ...]:
        """The sources of text, one or several; none for ready tokens."""
        if self.sources is not None:
            return self.sources
        if self.dataset is None:
            return ()
        fields = ("dataset", "config", "split", "text_field", "messages_field")
        return (TextSource(**{name: getattr(self, name) for name in fields}),)


class Calibration(TokenWindows):
    """The text that scores and repairs are measured on."""

    def shape(self) -> tuple[int, int]:
        """(N, L) that the recipe asks for; a tokens file decides for itself where nothing is asked."""
        return self.samples or 128, self.sequence_length or 2048


def load_windows(
    windows: TokenWindows, tokenizer: PreTrainedTokenizerBase | None, default_shape: tuple[int, int]
) -> Tensor:
    """Token windows int64 [N, L].

    ``default_shape`` holds where the recipe says neither samples nor sequence_length.
    Raises CalibrationError where the text cannot be read or is too short.
    """
    if windows.tokens is not None:
        return _ready_windows(windows)
    import torch

    assert tokenizer is not None, "text needs a tokenizer"
    samples = windows.samples or default_shape[0]
    length = windows.sequence_length or default_shape[1]
    sources = windows.text_sources()
    counts = _share(samples, [source.weight for source in sources])
    parts = [
        _pack(source, tokenizer, count, length, windows.seed)
        for source, count in zip(sources, counts, strict=True)
        if count
    ]
    windows_NL = torch.cat(parts)
    order_N = torch.randperm(len(windows_NL), generator=torch.Generator().manual_seed(windows.seed))
    return windows_NL[order_N]


def fingerprint_tokens(windows_NL: Tensor) -> str:
    """SHA-256 over shape and token ids: equal exactly where the tokens are."""
    head = json.dumps(list(windows_NL.shape)).encode()
    return hashlib.sha256(head + windows_NL.cpu().numpy().astype("<i8").tobytes()).hexdigest()


def _share(samples: int, weights: list[float]) -> list[int]:
    """Split a number of windows by weight, the largest remainders rounded up."""
    exact = [samples * weight / sum(weights) for weight in weights]
    counts = [int(value) for value in exact]
    by_remainder = sorted(range(len(exact)), key=lambda index: counts[index] - exact[index])
    for index in by_remainder[: samples - sum(counts)]:
        counts[index] += 1
    return counts


def _ready_windows(windows: TokenWindows) -> Tensor:
    import torch
    from safetensors import SafetensorError, safe_open

    path = Path(str(windows.tokens))
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            if windows.key not in names:
                raise CalibrationError(f"{path} has no tensor {windows.key!r}; it has: {', '.join(names)}")
            tokens_NL: Tensor = file.get_tensor(windows.key)
    except (OSError, SafetensorError) as error:
        raise CalibrationError(f"the tokens file {path} cannot be read ({error}); check calibration.tokens") from error
    if tokens_NL.ndim != 2 or tokens_NL.is_floating_point() or tokens_NL.numel() == 0:
        raise CalibrationError(
            f"{windows.key!r} in {path} is {tokens_NL.dtype} {list(tokens_NL.shape)}; "
            "token windows are integers [N, L] with at least one window"
        )
    samples = windows.samples or tokens_NL.shape[0]
    length = windows.sequence_length or tokens_NL.shape[1]
    if samples > tokens_NL.shape[0] or length > tokens_NL.shape[1]:
        raise CalibrationError(
            f"{windows.key!r} in {path} is {list(tokens_NL.shape)}, which is less than the "
            f"{samples} × {length} asked; lower samples or sequence_length"
        )
    return tokens_NL[:samples, :length].to(torch.int64)


def _pack(
    source: TextSource, tokenizer: PreTrainedTokenizerBase, samples: int, length: int, seed: int
) -> Tensor:
    import torch

    needed, ids = samples * length, []
    documents = 0
    for text in _documents(source, tokenizer, seed):
        tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if not tokens:
            continue
        documents += 1
        ids += tokens
        if tokenizer.eos_token_id is not None:
            ids.append(tokenizer.eos_token_id)
        if len(ids) >= needed:
            break
    if len(ids) < needed:
        raise CalibrationError(
            f"{source.dataset} ({source.split}) has {len(ids):,} tokens in {documents:,} documents; "
            f"{samples} samples of {length} need {needed:,}: "
            f"ask for at most {len(ids) // length} samples, shorten sequence_length, or add text"
        )
    return torch.tensor(ids[:needed], dtype=torch.int64).view(samples, length)


def _documents(source: TextSource, tokenizer: PreTrainedTokenizerBase, seed: int) -> Iterator[str]:
    dataset = load_text(source)
    column = source.messages_field or source.text_field or "text"
    if column not in dataset.column_names:
        wanted = "messages_field" if source.messages_field else "text_field"
        raise CalibrationError(
            f"{source.dataset} has no column {column!r}; set {wanted} to one of: {', '.join(dataset.column_names)}"
        )
    for row in dataset.shuffle(seed=seed):
        if source.messages_field:
            yield str(tokenizer.apply_chat_template(row[column], tokenize=False))
        elif row[column]:
            yield row[column]


def load_text(source: TextSource) -> Dataset:
    """The rows of a source as a data set; raises CalibrationError where it cannot be read."""
    import datasets

    path = Path(source.dataset)
    try:
        if source.dataset.startswith(PACKAGE_SCHEME):
            return _package_text(source)
        if path.suffix in FILE_BUILDERS:
            if not path.is_file():
                raise CalibrationError(f"the data file {path} does not exist (looked in {os.getcwd()})")
            builder = FILE_BUILDERS[path.suffix]
            options = {"sample_by": "paragraph"} if builder == "text" else {}
            return datasets.load_dataset(builder, data_files={_split_name(source): str(path)}, split=source.split, **options)
        return datasets.load_dataset(source.dataset, source.config, split=source.split)
    except CalibrationError:
        raise
    except Exception as error:  # the library raises dozens of kinds, down to plain OSError
        raise CalibrationError(
            f"the data set {source.dataset!r} ({source.config or 'default'}, {source.split}) cannot be loaded: "
            f"{type(error).__name__}: {error}; check the name, or HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE"
        ) from error


def _split_name(source: TextSource) -> str:
    return source.split.split("[")[0]


def _package_text(source: TextSource) -> Dataset:
    """``package://MODULE/NAME``: NAME is a file of the package, or a mapping or list of texts in it."""
    import datasets

    module_name, _, name = source.dataset.removeprefix(PACKAGE_SCHEME).rpartition("/")
    folder = package_folder(module_name)
    if folder is not None and (folder / name).suffix in FILE_BUILDERS:
        return load_text(source.model_copy(update={"dataset": str(folder / name)}))
    try:
        texts = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise CalibrationError(
            f"{source.dataset} cannot be read: {error}; the form is package://MODULE/NAME of an installed module"
        ) from error
    rows = [texts[key] for key in sorted(texts)] if isinstance(texts, dict) else list(texts)
    if not rows or not all(isinstance(row, str) for row in rows):
        raise CalibrationError(f"{source.dataset} is not a non-empty mapping or list of texts")
    return _sliced(datasets.Dataset.from_dict({source.text_field or "text": rows}), source)


def _sliced(dataset: Dataset, source: TextSource) -> Dataset:
    """Apply the split's slice, in the notation of datasets, to rows that are already in memory."""
    import datasets

    name = _split_name(source)
    read = datasets.ReadInstruction.from_spec(source.split)
    chosen = [
        index
        for part in read.to_absolute({name: len(dataset)})
        for index in range(part.from_ or 0, len(dataset) if part.to is None else part.to)
    ]
    return dataset.select(chosen)


def package_folder(module_name: str) -> Path | None:
    """The folder of an installed top-level package, found without importing it."""
    try:
        spec: Any = importlib.util.find_spec(module_name)
    except (ImportError, ValueError):
        return None
    places = list(spec.submodule_search_locations or ()) if spec else []
    return Path(places[0]) if places else None
