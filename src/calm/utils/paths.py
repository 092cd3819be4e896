"""Telling a path on this machine from an id of the hub, and naming what a mistyped path may have meant."""

import difflib
import os
from pathlib import Path


def looks_local(name: str | os.PathLike) -> bool:
    """Return whether a name that could be a hub id is a path, so that it is not looked up on the hub.

    A path starts with ``.``, ``/`` or ``~``, or has a separator and its parent directory exists.
    """
    text = os.fspath(name)
    if text.startswith((".", "/", "~", os.sep)) or os.path.isabs(text):
        return True
    parent = os.path.dirname(text.rstrip("/" + os.sep))
    return bool(parent) and os.path.isdir(parent)


def nearest_existing(path: str | os.PathLike) -> str | None:
    """Return the existing path whose parts are nearest to those of a path that does not exist; None if none is near."""
    path = Path(path).expanduser()
    if path.exists():
        return None
    found = Path(path.anchor)
    for part in path.relative_to(path.anchor).parts:
        if not (found / part).exists():
            try:
                names = os.listdir(found)
            except OSError:  # a file, or a directory that may not be read
                return None
            near = difflib.get_close_matches(part, names, n=1)
            if not near:
                return None
            part = near[0]
        found /= part
    return str(found)


def did_you_mean(path: str | os.PathLike) -> str:
    """Return the end of an error message about a path that does not exist: the nearest existing path, or a period."""
    near = nearest_existing(path)
    return "." if near is None else f"; did you mean {near}?"
