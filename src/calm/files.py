"""Writing files so that a kill leaves the old one or the new one, never half of one."""

import os
from collections.abc import Callable
from pathlib import Path


def write_whole(path: str | os.PathLike, content: str | Callable[[Path], object]) -> None:
    """Write a text, or let a function write to a path, and put the result in place in one step."""
    path = Path(path)
    draft = path.with_name(f".{path.name}.partial")
    try:
        if isinstance(content, str):
            draft.write_text(content, encoding="utf-8")
        else:
            content(draft)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)  # where the disk was full
