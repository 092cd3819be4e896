"""The directory of prepared data: there when it is complete, and not before; until then a draft lies beside it."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from calm.data.blocks import MANIFEST, read_manifest


def find_prepared(
    output: Path, sources: Sequence[str | os.PathLike], settings: dict[str, Any]
) -> dict[str, Any] | None:
    """The manifest of an output that holds these settings' data; None where there is none yet.

    Raises ValueError for an output that holds something else, or lies where it would be read as documents.
    """
    for source in map(Path, sources):
        if source.is_dir() and output.resolve().is_relative_to(source.resolve()):
            raise ValueError(f"the output {output} lies inside the source {source}, and would be read as documents.")
    if (output / MANIFEST).exists():
        manifest = read_manifest(output)
        if changed := changed_settings(manifest, settings):
            raise ValueError(
                f"{output} holds data prepared otherwise (different: {', '.join(changed)}): choose another output "
                "directory or remove this one."
            )
        return manifest
    if output.exists() and any(output.iterdir()):
        raise ValueError(f"{output} is not empty and holds no prepared data: choose another output directory.")
    return None


def changed_settings(before: dict[str, Any], settings: dict[str, Any]) -> list[str]:
    """Names of the settings that differ."""
    return [name for name, value in settings.items() if before.get(name) != value]
