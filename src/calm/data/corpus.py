"""The embedded corpus: the source text of the running Python's own standard library.

About 12 MB of real text that is present on every CPython, so that everything can be tried without a download.
"""

import hashlib
import json
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from calm.utils.files import only_writer, write_whole

_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib2to3"}
_VALIDATION_SHARE = 0.05


def stdlib_documents() -> Iterator[tuple[str, str]]:
    """``(path, text)`` of every non-test module, in a fixed order; the path is relative to the library."""
    root = sysconfig.get_path("stdlib")
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(set(folders) - _LEFT_OUT)
        for name in sorted(files):
            if name.endswith(".py"):
                path = Path(folder, name)
                try:
                    text = path.read_text(encoding="utf-8")
                except (UnicodeDecodeError, OSError):
                    continue  # a few modules declare another encoding
                if text:
                    yield path.relative_to(root).as_posix(), text


def in_validation(path: str) -> bool:
    """Whether a file belongs to the validation split: decided by a hash of its path, so it never changes sides."""
    return int(hashlib.sha256(path.encode()).hexdigest()[:8], 16) / 16**8 < _VALIDATION_SHARE


def write_embedded_corpus(directory: str | os.PathLike) -> dict[str, Path]:
    """Write ``train.jsonl`` and ``validation.jsonl`` (fields ``text`` and ``path``); returns their paths.

    ValueError where files of these names hold something else.
    """
    directory = Path(directory)
    with only_writer(directory):
        return _write(directory)


def _write(directory: Path) -> dict[str, Path]:
    directory.mkdir(parents=True, exist_ok=True)
    lines: dict[str, list[str]] = {"train": [], "validation": []}
    for name, text in stdlib_documents():
        split = "validation" if in_validation(name) else "train"
        lines[split].append(json.dumps({"text": text, "path": name}) + "\n")
    paths = {split: directory / f"{split}.jsonl" for split in lines}
    contents = {split: "".join(lines[split]) for split in lines}
    for split, path in paths.items():
        if path.exists() and path.read_bytes() != contents[split].encode():
            raise ValueError(f"{path} is there already and holds something else: choose another directory.")
    for split, path in paths.items():
        write_whole(path, contents[split])
    return paths
