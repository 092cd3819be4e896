"""Where documents are: local files and folders, remote files, datasets of the Hugging Face hub."""

import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec

from calm.data.documents import FORMATS, is_readable
from calm.utils.paths import did_you_mean, looks_local

_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


@dataclass(frozen=True)
class SourceFile:
    """A file of documents; ``size`` in bytes, None where a server does not tell."""

    path: str
    size: int | None


def find_sources(
    sources: Sequence[str | os.PathLike],
    split: str | None = None,
    subset: str | None = None,
    unread: list[str] | None = None,
) -> list[SourceFile]:
    """The document files among ``sources``, in a fixed order; nothing is downloaded.

    Args:
        sources: files and folders (searched; other files in them are passed over), addresses that fsspec knows
            (``https://``, ``s3://``, ``hf://datasets/...``, with ``*`` and ``[0-9]``), and dataset ids of the hub such
            as ``monology/pile-uncopyrighted``.
        split, subset: of datasets; with one of them a folder, too, is read as a dataset of the hub's layout.
        unread: gets the files of folders that are passed over because their names state another format. Hidden files
            are left out.

    Raises ValueError that names a source that is not there or cannot be read.
    """
    found: list[SourceFile] = []
    unread = [] if unread is None else unread
    for source in [os.fspath(given) for given in sources]:
        if "://" in source:
            found += _remote_files(source, unread)
        elif _is_dataset(source, split or subset):
            found += _dataset_files(source, split or "train", subset)
        else:
            found += _local_files(Path(source), unread)
    return found


def _is_dataset(source: str, asked_for: str | None) -> bool:
    if Path(source).exists():
        return asked_for is not None and Path(source).is_dir()
    return bool(_HUB_ID.fullmatch(source)) and not looks_local(source) and not is_readable(source)


def unread_summary(unread: Sequence[str]) -> dict[str, Any]:
    """Return how many files a folder holds that are not read, by suffix, and the first of them."""
    kinds = Counter(PurePosixPath(path).suffix.lower() or "none" for path in unread)
    return {"count": len(unread), "suffixes": dict(kinds.most_common(10)), "first": list(unread[:3])}


def _local_files(source: Path, unread: list[str]) -> list[SourceFile]:
    if source.is_dir():
        files = sorted(path for path in source.rglob("*") if path.is_file())
        paths = [path for path in files if is_readable(path.name)]
        unread += [str(path) for path in files if not is_readable(path.name) and not _is_hidden(path, source)]
        if not paths:
            raise ValueError(f"no documents in {source}: looked for {FORMATS}.")
    elif not source.exists():
        raise ValueError(f"no such file or folder: {source}{did_you_mean(source)}")
    else:
        _check_suffix(str(source))
        paths = [source]
    return [SourceFile(str(path), path.stat().st_size) for path in paths]


def _is_hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def _remote_files(source: str, unread: list[str]) -> list[SourceFile]:
    try:
        files, path = fsspec.core.url_to_fs(source)
        if "*" in path or ("[" in path and not files.exists(path)):
            paths = sorted(files.glob(path))
        elif not is_readable(path) and files.isdir(path):
            listed = sorted(files.find(path))
            paths = [found for found in listed if is_readable(found)]
            unread += [found for found in listed if not is_readable(found)]
        else:
            _check_suffix(source)
            paths = [path]
        found = [SourceFile(files.unstrip_protocol(path), files.info(path).get("size")) for path in paths]
    except (OSError, ImportError) as error:
        raise ValueError(f"cannot read {source}: {' '.join(str(error).split()) or type(error).__name__}.") from error
    if not found:
        raise ValueError(f"no documents at {source}: looked for {FORMATS}.")
    for file in found:
        _check_suffix(file.path)
    return found


def _dataset_files(name: str, split: str, subset: str | None) -> list[SourceFile]:
    """The files of a dataset's split, found as `load_dataset` finds them and pinned to the present revision."""
    try:
        from datasets import load_dataset_builder
        from datasets.exceptions import DatasetNotFoundError
    except ImportError as error:
        raise ValueError(f"reading {name} from the hub takes the datasets library: pip install datasets.") from error
    try:
        splits = load_dataset_builder(name, subset).config.data_files or {}
    except DatasetNotFoundError as error:
        raise ValueError(f"no such file, folder or dataset of the hub: {name}.") from error
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{name} is no file or folder here, and as a dataset of the hub it cannot be read: "
            f"{' '.join(str(error).split())}"
        ) from error
    if split not in splits:
        raise ValueError(f"the dataset {name} has no split {split!r}, but {', '.join(map(str, splits))}.")
    found = []
    for path in map(str, splits[split]):
        found += _remote_files(path, []) if "://" in path else _local_files(Path(path), [])
    return found


def _check_suffix(path: str) -> None:
    if not is_readable(path):
        raise ValueError(f"cannot read {path}: documents are {FORMATS} files.")
