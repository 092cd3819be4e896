"""Writing files so that a kill leaves the old one or the new one, never half of one."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

# In JSON's layout: a line break is never inside of a text.
_NUMBERS = re.compile(r'\[\n[^\[\]{}"]*\]')


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


def write_json(path: str | os.PathLike, document: Any) -> None:
    """Write a document as JSON that is pleasant to read: indented, a list of numbers in one line."""
    text = json.dumps(document, indent=1)
    write_whole(path, _NUMBERS.sub(lambda numbers: " ".join(numbers.group().split()), text))
