"""The embedded corpus: the source text of the running Python's own standard library.

About 9 MB of text that every CPython has, so that everything can be tried without a download. It is source code that
people wrote:

- Tables are left out. A file is a table if literals are most of its characters: character maps, generated topics,
  entity names. Docstrings do not count as literals, because they are text.
- Copies are left out: a file of which most lines are in files before it.
- Validation is 35% of the small files, chosen by a hash of the path. No file is in both splits. The lower limit
  of its size keeps validation varied, and the rest of a large file is not lost for training.
- No file has more than 2% of the characters of its split. A larger one is cut at the end of a line.

The corpus is the same on every machine with the same release of CPython. Another release has another standard library:
compare scores only between runs on one corpus.
"""

import ast
import hashlib
import json
import os
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from calm.utils.files import only_writer, write_whole

# Tests and other people's packages.
_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib2to3"}
_BUILD_FOLDER = "config-"  # what the build of this interpreter wrote, such as config-3.11-x86_64-linux-gnu/
MAX_LITERAL_SHARE = 0.5
MAX_KNOWN_LINES_SHARE = 0.5
# Shorter lines ("return None", "else:") are in many files.
_MIN_LINE_LENGTH = 20
MAX_FILE_SHARE = 0.02
VALIDATION_SHARE = 0.35  # of the files in _VALIDATION_SIZES
_VALIDATION_SIZES = range(1_000, 16_001)  # characters

_CONTAINERS = (ast.Tuple, ast.List, ast.Set, ast.Dict)
_SCOPES = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class SplitSize:
    """Size of one split of the corpus.

    Attributes:
        num_documents: number of files.
        num_characters: characters of all files.
        largest: path of the largest file.
        largest_share: its share of the characters.
    """

    num_documents: int
    num_characters: int
    largest: str
    largest_share: float


def stdlib_documents() -> Iterator[tuple[str, str]]:
    """Return ``(path, text)`` of every module of the corpus, before splitting, in a fixed order.

    The path is relative to the standard library.
    """
    yield from _documents()


@cache
def _documents() -> tuple[tuple[str, str], ...]:
    known_lines: set[str] = set()
    documents = []
    for path, text in _modules():
        lines = {line for line in text.splitlines() if len(line) >= _MIN_LINE_LENGTH}
        is_copy = bool(lines) and len(lines & known_lines) > MAX_KNOWN_LINES_SHARE * len(lines)
        if is_copy or literal_share(text) > MAX_LITERAL_SHARE:
            continue
        known_lines |= lines
        documents.append((path, text))
    return tuple(documents)


def _modules() -> Iterator[tuple[str, str]]:
    """Return ``(path, text)`` of every module that is not a test, in a fixed order."""
    root = sysconfig.get_path("stdlib")
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(set(folders) - _LEFT_OUT - {name for name in folders if name.startswith(_BUILD_FOLDER)})
        for name in sorted(files):
            if name.endswith(".py"):
                path = Path(folder, name)
                try:
                    text = path.read_text(encoding="utf-8")
                except (UnicodeDecodeError, OSError):
                    continue  # a few modules declare another encoding
                if text:
                    yield path.relative_to(root).as_posix(), text


def literal_share(source: str) -> float:
    """Return the share of the characters of a Python source that are literals: strings, numbers, tables of them.

    Docstrings are not counted. A table is a tuple, list, set or dict of constants, names and other tables. A source
    with a syntax error has share 1.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # invalid escapes in the strings of others
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return 1.0
    starts = [0]
    for line in source.encode().splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    return _literal_bytes(tree, starts) / max(starts[-1], 1)


def _literal_bytes(node: ast.AST, starts: list[int]) -> int:
    total = 0
    docstring = None
    if isinstance(node, _SCOPES) and node.body and isinstance(node.body[0], ast.Expr):
        docstring = node.body[0]
    for child in ast.iter_child_nodes(node):
        if child is docstring and isinstance(docstring.value, ast.Constant):
            continue
        if isinstance(child, ast.Constant | ast.JoinedStr) or (isinstance(child, _CONTAINERS) and _is_table(child)):
            assert child.end_lineno is not None
            assert child.end_col_offset is not None
            total += starts[child.end_lineno - 1] + child.end_col_offset - starts[child.lineno - 1] - child.col_offset
        else:
            total += _literal_bytes(child, starts)
    return total


def _is_table(node: ast.AST) -> bool:
    if isinstance(node, _CONTAINERS):
        return all(_is_table(child) for child in ast.iter_child_nodes(node) if not isinstance(child, ast.expr_context))
    if isinstance(node, ast.UnaryOp):
        return _is_table(node.operand)
    return isinstance(node, ast.Constant | ast.Name | ast.Attribute)


def in_validation(path: str, num_characters: int) -> bool:
    """Return whether a file belongs to the validation split.

    Args:
        path: path of the file relative to the standard library.
        num_characters: size of the file. Only small files are held out.
    """
    if num_characters not in _VALIDATION_SIZES:
        return False
    return int(hashlib.sha256(path.encode()).hexdigest()[:8], 16) / 16**8 < VALIDATION_SHARE


def embedded_corpus() -> dict[str, list[tuple[str, str]]]:
    """Return the ``(path, text)`` pairs of both splits, ``train`` and ``validation``."""
    splits: dict[str, list[tuple[str, str]]] = {"train": [], "validation": []}
    for path, text in stdlib_documents():
        splits["validation" if in_validation(path, len(text)) else "train"].append((path, text))
    return {split: cap_documents(documents) for split, documents in splits.items()}


def cap_documents(documents: list[tuple[str, str]], max_share: float = MAX_FILE_SHARE) -> list[tuple[str, str]]:
    """Cut documents at the end of a line until none has more than ``max_share`` of all characters.

    Raises:
        ValueError: there are too few documents.
    """
    if len(documents) * max_share < 1:
        raise ValueError(
            f"the standard library of this Python has {len(documents)} usable files for one split of the corpus; "
            f"{round(1 / max_share)} are needed. Use a Python that has its library as .py files."
        )
    while True:
        limit = int(max_share * sum(len(text) for _, text in documents))
        if all(len(text) <= limit for _, text in documents):
            return documents
        # A line that is longer than the limit alone leaves an empty text.
        cut = [
            (path, text if len(text) <= limit else text[: text.rfind("\n", 0, limit) + 1]) for path, text in documents
        ]
        documents = [(path, text) for path, text in cut if text]


def corpus_size(documents: list[tuple[str, str]]) -> SplitSize:
    """Return the size of one split."""
    total = sum(len(text) for _, text in documents)
    path, text = max(documents, key=lambda document: len(document[1]))
    return SplitSize(len(documents), total, path, len(text) / total)


def describe_size(documents: list[tuple[str, str]]) -> str:
    """Return the size of one split in one line."""
    size = corpus_size(documents)
    return (
        f"{size.num_documents} documents, {size.num_characters:,} characters, "
        f"largest {size.largest} ({size.largest_share:.1%})"
    )


def write_embedded_corpus(directory: str | os.PathLike) -> dict[str, Path]:
    """Write ``train.jsonl`` and ``validation.jsonl`` (fields ``text`` and ``path``) and return their paths.

    Raises:
        ValueError: a file with one of these names has other content.
    """
    directory = Path(directory)
    with only_writer(directory):
        directory.mkdir(parents=True, exist_ok=True)
        paths = {}
        contents = {}
        for split, documents in embedded_corpus().items():
            paths[split] = directory / f"{split}.jsonl"
            contents[split] = "".join(json.dumps({"text": text, "path": path}) + "\n" for path, text in documents)
        for split, path in paths.items():
            if path.exists() and path.read_bytes() != contents[split].encode():
                raise ValueError(f"{path} exists and has other content: choose another directory.")
        for split, path in paths.items():
            write_whole(path, contents[split])
        return paths
