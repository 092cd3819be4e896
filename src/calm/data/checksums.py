"""Checksums of token files, by chunks: a few chunks are checked at every start of a run, all of them on request."""

import hashlib
import random
from pathlib import Path
from typing import Any

CHUNK_BYTES = 2**22
_SAMPLED_CHUNKS = 64  # of all files together, so that a start reads 256 MiB at most


class DamagedDataError(ValueError):
    """Prepared data that are not what `calm prepare` wrote.

    PyTorch raises the errors of its worker processes again, with a traceback for a message; only its last line is kept.
    """

    def __init__(self, message: str):
        super().__init__(message.strip().splitlines()[-1].rpartition(f"{type(self).__name__}: ")[2])


def file_checksums(path: Path, chunk_bytes: int = CHUNK_BYTES) -> list[str]:
    """Return the checksum of every chunk of a file."""
    with open(path, "rb") as file:
        return [_checksum(chunk) for chunk in iter(lambda: file.read(chunk_bytes), b"")]


def check_checksums(folder: Path, manifest: dict[str, Any], every_chunk: bool = False) -> None:
    """Compare token files with the checksums in their manifest.

    Args:
        folder: directory of prepared data.
        manifest: its manifest. One of a release without checksums is accepted.
        every_chunk: read the files to their end, instead of their first and last chunks and a random sample.

    Raises:
        DamagedDataError: names the file and the place of a chunk that differs.
    """
    size = manifest.get("chunk_bytes", CHUNK_BYTES)
    files = [*manifest["files"], *manifest.get("other_files", [])]
    chunks = [
        (file["name"], index, wanted) for file in files for index, wanted in enumerate(file.get("checksums") or [])
    ]
    if not every_chunk and len(chunks) > _SAMPLED_CHUNKS:
        # Not the seeded generator: what one start does not look at, the next one may.
        chunks = [chunks[0], *random.SystemRandom().sample(chunks[1:-1], _SAMPLED_CHUNKS - 2), chunks[-1]]
    for name, index, wanted in chunks:
        with open(folder / name, "rb") as file:
            file.seek(index * size)
            if _checksum(file.read(size)) != wanted:
                raise DamagedDataError(
                    f"prepared data in {folder} are damaged: {name} does not have its checksum between bytes "
                    f"{index * size} and {(index + 1) * size}; run `calm prepare` again."
                )


def _checksum(chunk: bytes) -> str:
    return hashlib.blake2b(chunk, digest_size=8).hexdigest()
