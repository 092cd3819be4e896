"""Checkpoints that are complete or invisible, and known for damaged when they are."""

import json
import shutil
import zlib
from collections.abc import Collection
from pathlib import Path
from typing import Any

from calm.utils.files import write_whole

SEAL = "checkpoint_manifest.json"
# What checkpoints called it before: `complete.json` is now only the file that marks a finished run.
_OLD_SEAL = "complete.json"


def seal(checkpoint: Path, about: dict[str, Any]) -> None:
    """Mark a checkpoint as written to its end, with size and checksum of every file, and what its run was like."""
    files = {
        str(path.relative_to(checkpoint)): [path.stat().st_size, _checksum(path)]
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file()
    }
    content = about | {"files": files}
    write_whole(checkpoint / SEAL, json.dumps(content | {"checksum": _content_checksum(content)}, indent=1))


def read_seal(checkpoint: Path) -> dict[str, Any]:
    """Return what a checkpoint says about its run; ValueError where this does not have its own checksum."""
    content = json.loads(_find_seal(checkpoint).read_text(encoding="utf-8"))
    if not isinstance(content, dict) or not isinstance(content.get("files"), dict):
        raise ValueError("no record of files")
    # Checkpoints of an earlier release have no checksum here.
    if "checksum" in content and content.pop("checksum") != _content_checksum(content):
        raise ValueError("it does not have its own checksum")
    return content


def _content_checksum(content: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def _find_seal(checkpoint: Path) -> Path:
    """Return the path of a checkpoint's manifest, under its present name or the old one."""
    old = checkpoint / _OLD_SEAL
    return old if old.is_file() and not (checkpoint / SEAL).exists() else checkpoint / SEAL


def sealed_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run that were written to their end, oldest first."""
    return sorted((path for path in folder.glob("checkpoint-*") if _find_seal(path).exists()), key=_step_of)


def find_checkpoint(folder: Path, needed: Collection[str] = ()) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint of a run, and a sentence for each newer one that is damaged.

    One that a kill cut short is as good as not there: it has no seal.

    Args:
        folder: directory of the checkpoints.
        needed: what a checkpoint must say about its run.

    Raises ValueError when there are checkpoints, and all of them are damaged.
    """
    complaints: list[str] = []
    for checkpoint in reversed(sealed_checkpoints(folder)):
        damage = _damage(checkpoint, needed)
        if damage is None:
            return checkpoint, complaints
        complaints.append(f"{checkpoint} is damaged ({damage})")
    if complaints:
        raise ValueError(f"{'; '.join(complaints)}: no checkpoint is whole. Remove {folder} to start again.")
    return None, []


def remove_unsealed(folder: Path) -> None:
    """Clear away what a kill left of checkpoints that were being written."""
    for checkpoint in folder.glob("checkpoint-*"):
        if not _find_seal(checkpoint).exists():
            shutil.rmtree(checkpoint)


def rotate(folder: Path, keep: int | None, best: str | None = None) -> None:
    """Remove all sealed checkpoints but the newest ``keep`` and the ``best``; none where ``keep`` is None or 0."""
    if not keep:
        return
    for checkpoint in sealed_checkpoints(folder)[:-keep]:
        if best is not None and checkpoint == Path(best):
            continue
        _find_seal(checkpoint).unlink()  # first: half a checkpoint must not pass for a whole one
        shutil.rmtree(checkpoint)


def _damage(checkpoint: Path, needed: Collection[str]) -> str | None:
    try:
        content = read_seal(checkpoint)
        files = [(name, size, checksum) for name, (size, checksum) in content["files"].items()]
    except (OSError, ValueError, TypeError, RecursionError) as error:
        return f"{_find_seal(checkpoint).name} cannot be read: {error}"
    if missing := sorted(set(needed) - content.keys()):
        return f"{_find_seal(checkpoint).name} lacks {', '.join(missing)}"
    for name, size, checksum in files:
        path = checkpoint / name
        if not path.exists():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} holds {path.stat().st_size} bytes instead of {size}"
        if _checksum(path) != checksum:
            return f"{name} does not have its checksum"
    return None


def _checksum(path: Path) -> int:
    checksum = 0
    with open(path, "rb") as file:
        while data := file.read(2**24):
            checksum = zlib.crc32(data, checksum)
    return checksum


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])
