"""Writing files and directories: a kill leaves the old state or the new one, and one process writes at a time."""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from errno import ENOLCK, ENOSYS, EOPNOTSUPP
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

# In JSON's layout: a line break is never inside of a text.
_NUMBERS = re.compile(r'\[\n[^\[\]{}"]*\]')


def write_whole(path: str | os.PathLike, content: str | Callable[[Path], object]) -> None:
    """Write a text, or let a function write to a path, and put the result in place in one step."""
    path = Path(path)
    # Each process has a name of its own: two that write the same file must not share half-written content.
    draft = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        if isinstance(content, str):
            draft.write_text(content, encoding="utf-8")
        else:
            content(draft)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)  # where the disk was full


def write_json(path: str | os.PathLike, document: Any) -> None:
    """Write a document as JSON that is pleasant to read: indented, a list of numbers in one line."""
    text = json.dumps(document, indent=1)
    write_whole(path, _NUMBERS.sub(lambda numbers: " ".join(numbers.group().split()), text))


@contextmanager
def hold_lock(path: str | os.PathLike, problem: str, keep: bool = False) -> Iterator[None]:
    """Hold a lock file.

    Args:
        path: lock file. Its directory is made where it does not exist.
        problem: message of the ValueError that is raised when another process holds the lock.
        keep: leave the file there at the end.

    File systems that have no locks are used without one.
    """
    lock = FileLock(path, blocking=False)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    try:
        lock.acquire()
    except Timeout as error:
        raise ValueError(problem) from error
    except NotImplementedError:
        pass
    except OSError as error:
        if error.errno not in (ENOSYS, ENOLCK, EOPNOTSUPP):
            raise
    try:
        yield
    finally:
        if lock.is_locked and not keep:
            # Before it is released: FileLock does not accept a file that was removed in the meantime.
            Path(path).unlink(missing_ok=True)
        lock.release()


@contextmanager
def only_writer(output: str | os.PathLike) -> Iterator[None]:
    """Hold the lock of an output file or directory; ValueError when another process is writing there.

    A link and what it leads to have the same lock.
    """
    path = Path(os.path.realpath(output))
    with hold_lock(
        path.with_name(f".{path.name or 'root'}.lock"),
        f"another process is writing {output}: wait for it, or choose another output.",
    ):
        yield


def staging_of(output: str | os.PathLike) -> Path:
    """Return the directory beside an output that holds it until it is complete."""
    path = Path(os.path.realpath(output))
    return path.with_name(f".{path.name}.partial")


def check_free(output: str | os.PathLike) -> None:
    """Raise ValueError when an output directory exists and is not empty."""
    path = Path(output)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{output} is there already: choose another directory, or remove it.")


@contextmanager
def staged_directory(output: str | os.PathLike) -> Iterator[Path]:
    """Yield an empty directory that becomes the output when the block ends without an error.

    Raises:
        ValueError: when the output is there already, or another process is writing it.
    """
    check_free(output)
    with only_writer(output):
        check_free(output)  # another process may have finished it meanwhile
        staging = staging_of(output)
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        try:
            yield staging
            put_in_place(staging, Path(output))
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def put_in_place(staging: Path, output: Path) -> None:
    """Rename a complete staging directory to its output, which is absent, empty, or a link to such a directory."""
    output = Path(os.path.realpath(output))
    if output.exists():
        output.rmdir()
    staging.rename(output)


def check_json(path: Path) -> None:
    """Raise ValueError if the file exists and is not a JSON object: transformers would ignore it silently."""
    if not path.is_file():
        return
    try:
        is_object = isinstance(json.loads(path.read_text(encoding="utf-8")), dict)
    except (ValueError, RecursionError):
        is_object = False
    if not is_object:
        raise ValueError(f"{path} is not a valid JSON object: copy it again.")
