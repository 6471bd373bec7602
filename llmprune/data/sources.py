"""Read rows of text from the hub, a local file, or an installed package."""

from __future__ import annotations

import glob
import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from llmprune.common.errors import CalibrationError, did_you_mean
from llmprune.common.hub.client import resolve_revision
from llmprune.common.hub.errors import is_hub_error, is_unreachable
from llmprune.common.hub.explanations import explain
from llmprune.common.hub.secrets import redact, redact_error
from llmprune.common.libraries import count_no_loads
from llmprune.common.paths import is_plain_path
from llmprune.common.text_files import fault_of, require_text_file, unread_kind
from llmprune.data.dataset_cards import archives_refused, require_own_data, without_media
from llmprune.data.image_rows import with_raw_images
from llmprune.data.packages import is_pattern, package_files, package_folder, package_texts
from llmprune.recipe.text_source import FILE_BUILDERS, PACKAGE_SCHEME, TextSource, is_local

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_WITHOUT_HUB = "; text of this machine needs no hub: dataset: texts.txt, .jsonl or .parquet"
SHUFFLE_BUFFER = 10_000  # rows of a streamed data set that are shuffled at a time; the order of shards too


def read_documents(source: TextSource, tokenizer: PreTrainedTokenizerBase, *, seed: int) -> Iterator[str]:
    """Yield the texts of a source that are not blank, shuffled with the seed. Raises CalibrationError.

    Blank texts are logged with their number among the rows that were read.
    """
    rows = blank = 0
    try:
        for row in read_rows(source, seed=seed):
            rows += 1
            text = _text_of(row, source, tokenizer=tokenizer)
            if text is None:
                blank += 1
            else:
                yield text
    finally:  # a caller stops where its windows are full
        if blank:
            logger.info("%s (%s): %d of %d rows are blank and left out", source.dataset, source.split, blank, rows)


def read_rows(source: TextSource, *, seed: int) -> Iterator[dict[str, Any]]:
    """Yield the rows of a source, shuffled with the seed. Raises CalibrationError."""
    with _explained(source), archives_refused(source.dataset):
        yield from _shuffled(load_text(source), seed)


def load_text(source: TextSource) -> Dataset | IterableDataset:
    """Return the rows of a source. Hub data is streamed unless the split has a slice. Raises CalibrationError."""
    import datasets

    count_no_loads()
    with _explained(source), _quiet(), archives_refused(source.dataset):
        if source.dataset.startswith(PACKAGE_SCHEME):
            return _package_text(source)
        path = Path(source.dataset)
        if is_local(source.dataset):
            return _readable(_file_text(path, source), source)
        if path.is_file():
            raise CalibrationError(unread_kind(path, ", ".join(FILE_BUILDERS)))
        streaming = source.split.isidentifier()
        revision = source.revision if path.exists() else _pinned(source, streaming)
        require_own_data(source.dataset, revision, streaming=streaming)
        rows = datasets.load_dataset(
            source.dataset, source.config, split=source.split, revision=revision, streaming=streaming
        )
        return _readable(rows, source)


def _readable(rows: Dataset | IterableDataset, source: TextSource) -> Dataset | IterableDataset:
    """Return rows without media, but for the images that the source asks for, which are not decoded."""
    if source.images_field is None:
        return without_media(rows)
    return without_media(with_raw_images(rows, source), but=source.images_field)


def require_present(source: TextSource) -> None:
    """Raise CalibrationError where a local file or a package's text is missing, empty or of another kind.

    Of a data set on the hub only the form of its name is checked.
    """
    if source.dataset.startswith(PACKAGE_SCHEME):
        module, _, name = source.dataset.removeprefix(PACKAGE_SCHEME).partition("/")
        folder = package_folder(module)
        a_file = is_plain_path(name) and not is_pattern(name) and Path(name).suffix in FILE_BUILDERS
        if folder is not None and a_file:
            require_text_file(folder / name)
        else:
            package_texts(source)
    elif is_local(source.dataset):
        require_text_file(Path(source.dataset))
    elif Path(source.dataset).is_file():
        raise CalibrationError(unread_kind(Path(source.dataset), ", ".join(FILE_BUILDERS)))
    elif not Path(source.dataset).is_dir():
        try:
            validate_repo_id(source.dataset)
        except HFValidationError as error:
            raise CalibrationError(
                f"there is no file {source.dataset!r} (looked in {Path.cwd()}), and as a data set of the hub "
                f"{explain(error)}; give one of them"
            ) from error


def local_bytes(source: TextSource) -> int | None:
    """Return the size of a source in bytes; None for data that is not in one local file or package."""
    if source.dataset.startswith(PACKAGE_SCHEME):
        module, _, name = source.dataset.removeprefix(PACKAGE_SCHEME).partition("/")
        if is_pattern(name):
            return sum(file.stat().st_size for file in package_files(source))
        path = (package_folder(module) or Path()) / name
        return path.stat().st_size if is_plain_path(name) and path.is_file() else 0
    path = Path(source.dataset)
    return path.stat().st_size if is_local(source.dataset) and path.is_file() else None


def commit_of(source: TextSource) -> str | None:
    """Return the commit of a hub data set; None for other text, or where it is unknown."""
    if is_local(source.dataset) or Path(source.dataset).exists():
        return None
    try:
        return str(resolve_revision(source.dataset, source.revision, repo_type="dataset").resolved)
    except Exception as error:  # the hub client's errors have no base in common
        logger.info("the commit of the data set %s is not known: %s", source.dataset, explain(error))
        return None


def _pinned(source: TextSource, streaming: bool) -> str | None:
    """Return the commit to read; the revision itself where the hub cannot be reached and the data may be cached."""
    try:
        return str(resolve_revision(source.dataset, source.revision, repo_type="dataset").resolved)
    except Exception as error:
        if streaming or not is_unreachable(error):
            raise
        return source.revision


def _shuffled(rows: Dataset | IterableDataset, seed: int) -> Any:
    import datasets

    if isinstance(rows, datasets.IterableDataset):
        return rows.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
    return rows.shuffle(seed=seed, keep_in_memory=True)


def _text_of(row: dict[str, Any], source: TextSource, *, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the text of a row; None where it is empty or only white space."""
    column = source.messages_field or source.text_field or "text"
    key = "messages_field" if source.messages_field else "text_field"
    if column not in row:
        near = did_you_mean(column, list(row))
        raise CalibrationError(
            f"{source.dataset} has no column {column!r}{near}; set {key} to one of: {', '.join(row)}"
        )
    value = row[column]
    if value is None or value == [] or (isinstance(value, str) and not value.strip()):
        return None
    if source.messages_field:
        return _rendered(value, source, tokenizer=tokenizer)
    if not isinstance(value, str):
        kind = type(value).__name__
        remedy = "set messages_field instead" if isinstance(value, list) else "set text_field to a column of texts"
        raise CalibrationError(f"column {column!r} of {source.dataset} holds {kind}, not text; {remedy}")
    return value


def _rendered(messages: Any, source: TextSource, *, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a conversation as text: by the model's chat template, or without one as paragraphs ``role: content``."""
    if not tokenizer.chat_template:
        try:
            return "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)
        except (KeyError, TypeError) as error:
            raise CalibrationError(
                f"{source.messages_field!r} of {source.dataset} holds no lists of {{role: …, content: …}}; set "
                "text_field to a column of texts"
            ) from error
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
    """Return the rows of ``package://MODULE/NAME``: NAME is a file, a pattern of files, or a mapping of texts."""
    import datasets

    module_name, _, name = source.dataset.removeprefix(PACKAGE_SCHEME).partition("/")
    folder = package_folder(module_name)
    if is_plain_path(name) and not is_pattern(name) and folder is not None and Path(name).suffix in FILE_BUILDERS:
        return _file_text(folder / name, source)
    rows = package_texts(source)
    return _sliced(datasets.Dataset.from_dict({source.text_field or "text": rows}), source)


def _sliced(dataset: Dataset, source: TextSource) -> Dataset:
    """Apply the split's slice, in the notation of datasets, to rows in memory."""
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
    """Turn errors of the datasets library into one CalibrationError that names the source and the remedy."""
    try:
        yield
    except CalibrationError:
        raise
    except Exception as error:  # the library raises dozens of kinds, down to plain OSError
        local = is_local(source.dataset) or Path(source.dataset).exists()
        remedy = "the file and the split" if local else "the name, or HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE"
        cause: BaseException = error
        while cause.__cause__ is not None:  # the library's own "An error occurred" does not help
            cause = cause.__cause__
        if isinstance(cause, CalibrationError):
            raise cause from error
        if is_local(source.dataset) and (fault := _file_fault(Path(source.dataset))):
            raise CalibrationError(fault) from error
        redact_error(error)
        message = redact(" ".join(str(cause).split()))
        why = explain(error) if is_hub_error(error) else f"{type(cause).__name__}: {message}; check {remedy}"
        why += _WITHOUT_HUB if is_unreachable(error) else ""
        raise CalibrationError(
            f"the data set {source.dataset!r} ({source.config or 'default'}, {source.split}) cannot be read: {why}"
        ) from error


def _file_fault(path: Path) -> str | None:
    """Return the fault of a text file that could not be read; None where it is not known."""
    try:
        return fault_of(path) if path.suffix in (".txt", ".jsonl", ".json") else None
    except OSError:
        return None


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide progress bars of the datasets library where standard error is no terminal."""
    import datasets

    if sys.stderr.isatty() or datasets.are_progress_bars_disabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()
