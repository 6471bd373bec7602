"""Check that a data set names no files but its own.

``datasets`` opens every pattern in a card's ``data_files`` and ``data_dir``, even a URL, a path of this machine or
another repository; and when a row is read, it opens the paths and URLs in columns of images, audio and other media.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

from llmprune.common.errors import CalibrationError
from llmprune.common.hub.client import with_retries
from llmprune.common.hub.errors import is_unreachable
from llmprune.common.paths import first_link_outside, is_plain_path

if TYPE_CHECKING:
    from datasets import Dataset, DownloadConfig, IterableDataset

_CARD, _STANDALONE = "README.md", ".huggingface.yaml"
_PLACES = ("data_files", "data_dir")
_ONE_FILE = ("gzip", "xz", "zstd", "bz2", "lz4")  # formats that hold one file, whose name is not used


def require_own_data(dataset: str, revision: str | None, *, streaming: bool) -> None:
    """Raise CalibrationError where the card of a hub data set, or of a folder, names data outside the data set.

    The message does not reveal whether the named data exists. ``streaming``: the hub must answer; otherwise a cached
    card is enough. Raises the hub client's errors too.
    """
    folder = Path(dataset)
    if folder.exists():
        outside = first_link_outside(folder.rglob("*"), folder)
        if outside is not None:
            raise CalibrationError(
                f"{outside.relative_to(folder).as_posix()!r} in the data folder {dataset} is a link to a place outside "
                "it, and only files inside it are read; put the file itself in its place"
            )
        card, standalone = (path if (path := folder / name).is_file() else None for name in (_CARD, _STANDALONE))
    else:
        card, standalone = (_fetched(dataset, revision, name=name, needed=streaming) for name in (_CARD, _STANDALONE))
    metadata = list(_metadata(card, standalone))
    if not all(is_plain_path(name) for data in metadata for name in _named(data)):
        raise CalibrationError(
            f"the card of the data set {dataset!r} names data that is no relative path in the data set itself, and "
            f"nothing else is read; correct data_files and data_dir in its {_CARD}, or give a file with the text"
        )
    if not all(_is_folder_name(value) for data in metadata for value in _written_to(data)):
        raise CalibrationError(
            f"the card of the data set {dataset!r} has a version or a config_name that is no plain word, and a folder "
            f"of the cache would be named after it; correct it in its {_CARD}"
        )


@contextmanager
def archives_refused(dataset: str) -> Iterator[None]:
    """Make ``datasets`` raise CalibrationError for zip, tar and other archives while the context lasts.

    Names and links inside an archive can lead to any file or address: a link is checked before another link that it
    passes through exists, and a member's name becomes part of an address. Formats that compress one file are allowed.
    """
    from datasets.download import streaming_download_manager
    from datasets.utils import file_utils
    from datasets.utils.extract import Extractor

    single = file_utils.SINGLE_FILE_COMPRESSION_PROTOCOLS
    by_content, by_address = Extractor.infer_extractor_format, file_utils._get_extraction_protocol

    def format_of(path: Path | str) -> str | None:
        return _require_single(by_content(path), _ONE_FILE, dataset=dataset)

    def protocol_of(address: str, download_config: DownloadConfig | None = None) -> str | None:
        return _require_single(by_address(address, download_config), single, dataset=dataset)

    with (
        mock.patch.object(Extractor, "infer_extractor_format", staticmethod(format_of)),
        mock.patch.object(file_utils, "_get_extraction_protocol", protocol_of),
        mock.patch.object(streaming_download_manager, "_get_extraction_protocol", protocol_of),
    ):
        yield


def without_media(rows: Dataset | IterableDataset, *, but: str | None = None) -> Dataset | IterableDataset:
    """Return rows without columns of images, audio and other media, whose values name files or addresses to open.

    ``but``: a column that is kept, because its values are not decoded.
    """
    features = rows.features or {}
    kept = [name for name, feature in features.items() if name == but or not _has_media(feature)]
    return rows if len(kept) == len(features) else rows.select_columns(kept)


def _require_single(kind: str | None, single: Collection[str], *, dataset: str) -> str | None:
    if kind is not None and kind not in single:
        raise CalibrationError(
            f"the data set {dataset!r} is an archive ({kind}), and archives are not unpacked, because names and links "
            "in them can lead anywhere; give files of text, JSON lines or parquet; each may be compressed on its own"
        )
    return kind


def _fetched(dataset: str, revision: str | None, *, name: str, needed: bool) -> Path | None:
    """Return a file of a hub data set; None where it does not exist, or is not ``needed`` and not cached."""
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError

    def fetch() -> str:
        return str(hf_hub_download(dataset, name, repo_type="dataset", revision=revision))

    try:
        return Path(with_retries(fetch, reached=needed))
    except RemoteEntryNotFoundError:
        return None
    except LocalEntryNotFoundError as error:
        if constants.is_offline_mode() or (is_unreachable(error) and not needed):
            return None
        raise


def _metadata(card: Path | None, standalone: Path | None) -> Iterator[Any]:
    """Yield the metadata that datasets reads: of the card, and of the file that overrides the card."""
    import yaml
    from huggingface_hub import DatasetCard

    if card is not None:
        yield DatasetCard.load(card).data.to_dict()
    if standalone is not None:
        yield yaml.safe_load(standalone.read_text(encoding="utf-8"))


def _named(metadata: Any, asked: bool = False) -> Iterator[Any]:
    """Yield every value of metadata that names data, without the names of splits.

    ``asked``: the metadata is inside a field that names data.
    """
    if isinstance(metadata, dict):
        for key, value in metadata.items():
            if key != "split" or not asked:
                yield from _named(value, asked or key in _PLACES)
    elif isinstance(metadata, list | tuple):
        for value in metadata:
            yield from _named(value, asked)
    elif asked and metadata not in (None, ""):
        yield metadata


def _written_to(metadata: Any) -> Iterator[Any]:
    """Yield every value of metadata after which datasets names a folder of its cache."""
    if isinstance(metadata, dict):
        for key, value in metadata.items():
            if key in ("version", "config_name"):
                yield value
            else:
                yield from _written_to(value)
    elif isinstance(metadata, list | tuple):
        for value in metadata:
            yield from _written_to(value)


def _is_folder_name(value: Any) -> bool:
    if isinstance(value, dict):  # a version by its parts
        return all(map(_is_folder_name, value.values()))
    return value is None or (is_plain_path(text := str(value)) and "/" not in text and text.strip(". ") != "")


def _has_media(feature: Any) -> bool:
    """Check whether a feature, or one inside it, is decoded from a file when it is read. JSON is not."""
    if isinstance(feature, dict):
        return any(map(_has_media, feature.values()))
    if isinstance(feature, list | tuple):
        return any(map(_has_media, feature))
    inner = getattr(feature, "feature", None)
    if inner is not None:
        return _has_media(inner)
    return hasattr(feature, "decode_example") and type(feature).__name__ != "Json"
