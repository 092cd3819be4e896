"""Prepared tokens as a map-style dataset of fixed blocks.

Map-style, because only then an interrupted run finds its place again exactly, also in a second pass over the data.
"""

import json
import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from calm.data.checksums import DamagedDataError
from calm.utils.paths import did_you_mean

MANIFEST = "manifest.json"
_TOKENS_AT_ONCE = 2**24


def read_manifest(path: str | os.PathLike) -> dict:
    """The manifest of prepared data; ValueError when the directory holds none or a file is missing or cut short."""
    path = Path(path)
    if not path.exists():
        raise ValueError(f"no prepared data at {path}: there is no such directory{did_you_mean(path)}")
    if not (path / MANIFEST).is_file():
        raise ValueError(f"no prepared data in {path}: {MANIFEST} is missing; `calm prepare` makes it.")
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        sizes = _file_sizes(manifest)
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{path / MANIFEST} is damaged or cut short ({error!r:.200}); run `calm prepare` again."
        ) from error
    for name, expected in sizes.items():
        actual = (path / name).stat().st_size if (path / name).exists() else None
        if actual != expected:
            state = "is missing" if actual is None else f"holds {actual} bytes instead of {expected}"
            raise ValueError(f"prepared data in {path} are damaged: {name} {state}; run `calm prepare` again.")
    return _Manifest(path / MANIFEST, manifest)


def _file_sizes(manifest: dict[str, Any]) -> dict[str, int]:
    """Return the bytes of every token file; any exception where the manifest holds something else than it should."""
    token_bytes, files = {2: 2, 4: 4}[manifest["token_bytes"]], manifest["files"]
    counts = {str(file["name"]): file["num_tokens"] for file in files}
    if not all(isinstance(number, int) and number >= 0 for number in (*counts.values(), manifest["vocab_size"])):
        raise ValueError("a size is no whole number")
    if sum(counts.values()) != manifest["num_tokens"]:
        raise ValueError(f"num_tokens is {manifest['num_tokens']}, and its files hold {sum(counts.values())}")
    return {name: count * token_bytes for name, count in counts.items()}


class _Manifest(dict):
    """A manifest whose missing keys are reported as damage of its file."""

    def __init__(self, path: Path, values: dict[str, Any]):
        super().__init__(values)
        self.path = path

    def __missing__(self, key: str) -> Any:
        raise DamagedDataError(f"{self.path} is damaged: it has no {key!r}; run `calm prepare` again.")

    def __reduce__(self):
        return type(self), (self.path, dict(self))


def check_ids(ids: np.ndarray, manifest: dict[str, Any], place: str) -> None:
    """Raise DamagedDataError for a token id beyond the vocabulary of the data."""
    if ids.size and int(ids.max()) >= manifest["vocab_size"]:
        raise DamagedDataError(
            f"prepared data in {place} are damaged: token id {int(ids.max())}, and the vocabulary has "
            f"{manifest['vocab_size']} tokens; run `calm prepare` again."
        )


def check_block_size(block_size: int, patch_size: int) -> None:
    """ValueError when a block does not hold whole patches."""
    if block_size < 1 or block_size % patch_size:
        raise ValueError(
            f"block_size must be a multiple of the patch size {patch_size}, got {block_size}; "
            f"nearest: {max(1, round(block_size / patch_size)) * patch_size}."
        )


def shuffled(indices: Iterable[int], seed: int | None) -> list[int]:
    """Return indices in a random order that depends on the seed and their number alone; unchanged for None."""
    order = list(indices)
    if seed is not None:
        np.random.default_rng(seed).shuffle(order)
    return order


class TokenBlocks(Dataset):
    """Consecutive blocks of ``block_size`` tokens, memory-mapped: nothing is read before it is asked for.

    Documents run on across blocks, with the end-of-text token between them, and blocks across files; the tokens behind
    the last whole block are left out. An item holds ``input_ids`` and ``labels``, int64 ``[block_size]``, equal.

    Args:
        path: a directory made by ``calm prepare``.
        block_size: tokens per block, a multiple of ``patch_size``.
        patch_size: K of the model that reads them; 1 for a token model.
    """

    def __init__(self, path: str | os.PathLike, block_size: int, patch_size: int = 1):
        check_block_size(block_size, patch_size)
        self.path = Path(path)
        self.block_size = block_size
        self.manifest = read_manifest(path)
        if self.manifest.get("kind") == "conversations":
            raise ValueError(f"{path} holds prompts and responses; documents are needed here.")
        self._first_token = [0, *accumulate(file["num_tokens"] for file in self.manifest["files"])]
        if len(self) == 0:
            raise ValueError(
                f"prepared data in {path} are shorter than one block: {self.manifest['num_tokens']} tokens, block_size "
                f"{block_size}; take a smaller block_size or more text."
            )

    def __len__(self) -> int:
        return self._first_token[-1] // self.block_size

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"block {index} of {len(self)}")
        start, parts, missing = index * self.block_size, [], self.block_size
        while missing:
            file = bisect_right(self._first_token, start) - 1
            begin = start - self._first_token[file]
            parts.append(self._files[file][begin : begin + missing])
            start += len(parts[-1])
            missing -= len(parts[-1])
        tokens = np.concatenate(parts, dtype=np.int64)
        check_ids(tokens, self.manifest, f"{self.path} (block {index})")
        ids = torch.from_numpy(tokens)
        return {"input_ids": ids, "labels": ids.clone()}

    def spread(self, num_blocks: int | None) -> list[int]:
        """Indices of ``num_blocks`` blocks, evenly spread over the data (all of them for None)."""
        total = len(self)
        count = min(num_blocks or total, total)
        return [position * total // count for position in range(count)]

    def batches(
        self, num_blocks: int | None, batch_size: int, shuffle_seed: int | None = None
    ) -> Iterator[torch.Tensor]:
        """Token ids ``[<= batch_size, block_size]`` of evenly spread blocks, in order or shuffled."""
        indices = shuffled(self.spread(num_blocks), shuffle_seed)
        for first in range(0, len(indices), batch_size):
            yield torch.stack([self[index]["input_ids"] for index in indices[first : first + batch_size]])

    def documents(self, num_blocks: int | None = None) -> list[int]:
        """Return the document of each of ``num_blocks`` evenly spread blocks: the one with most of its tokens.

        Documents are numbered in the order of the text.
        """
        documents = []
        for index in self.spread(num_blocks):
            start, stop = index * self.block_size, (index + 1) * self.block_size
            first, last = np.searchsorted(self._separators, (start, stop - 1))
            ends = self._separators[first:last] + 1
            documents.append(int(first + np.diff([start, *ends, stop]).argmax()))
        return documents

    @cached_property
    def _separators(self) -> np.ndarray:
        """Positions of the tokens between documents."""
        if self.manifest.get("separator", "eos") == "bos":
            from calm.data.tokenizer import load_tokenizer

            separator = load_tokenizer(self.path).bos_token_id
        else:
            separator = self.manifest["eos_token_id"]
        found = [
            first + start + np.flatnonzero(tokens[start : start + _TOKENS_AT_ONCE] == separator)
            for first, tokens in zip(self._first_token, self._files, strict=False)
            for start in range(0, len(tokens), _TOKENS_AT_ONCE)
        ]
        return np.concatenate(found)

    @cached_property
    def _files(self) -> list[np.ndarray]:
        dtype = {2: np.uint16, 4: np.uint32}[self.manifest["token_bytes"]]
        names = [self.path / file["name"] for file in self.manifest["files"]]
        return [np.memmap(name, dtype=dtype, mode="r") if name.stat().st_size else np.empty(0, dtype) for name in names]

    def __getstate__(self) -> dict:
        # Workers map the files themselves.
        return {name: value for name, value in self.__dict__.items() if name not in ("_files", "_separators")}
