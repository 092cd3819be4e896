"""Documents to token files with datatrove: tokenised, separated by the end-of-text token, shuffled by document."""

import json
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from calm.data.blocks import MANIFEST, read_manifest
from calm.data.documents import find_files, read_documents
from calm.data.tokenizer import tokenizer_hash

_MAX_TASKS = 64
_SETTINGS = ("sources", "text_key", "on_bad", "seed", "tokenizer_sha256", "separator")
SEPARATORS = ("eos", "bos")


def prepare(
    sources: Sequence[str | os.PathLike],
    tokenizer: PreTrainedTokenizerBase,
    output: str | os.PathLike,
    text_key: str = "text",
    on_bad: str = "error",
    seed: int = 0,
    workers: int | None = None,
    separator: str = "eos",
) -> dict:
    """Tokenise documents into ``output``: ``.ds`` files (raw uint16 or uint32 tokens), a manifest, the tokenizer.

    The directory appears when it is complete, and not before. Called again with the same arguments and files of the
    same names and sizes, nothing is done.

    Args:
        sources: files and folders, see :mod:`calm.data.documents`.
        on_bad: ``"error"`` stops at the first unreadable record, ``"skip"`` counts them in the manifest.
        seed: of the order of the documents.
        workers: processes; default one per core.
        separator: what stands between documents: ``"eos"``, the end-of-text token, or ``"bos"``, the begin-of-text
            token, as the paper's models were trained.

    Returns:
        the manifest.
    """
    output = Path(output)
    if separator not in SEPARATORS:
        raise ValueError(f"separator must be one of {', '.join(SEPARATORS)}, got {separator!r}.")
    separating_token = tokenizer.eos_token if separator == "eos" else tokenizer.bos_token
    if separating_token is None:
        raise ValueError(f"the tokenizer has no {separator} token to put between documents: take the other separator.")
    files = find_files(sources)
    settings = {
        "sources": [{"path": str(file), "bytes": os.path.getsize(file)} for file in files],
        "text_key": text_key,
        "on_bad": on_bad,
        "seed": seed,
        "tokenizer_sha256": tokenizer_hash(tokenizer),
        "separator": separator,
    }
    if (output / MANIFEST).exists():
        manifest = {"separator": "eos"} | read_manifest(output)
        if all(manifest.get(name) == settings[name] for name in _SETTINGS):
            return manifest
        changed = [name for name in _SETTINGS if manifest.get(name) != settings[name]]
        raise ValueError(
            f"{output} holds data prepared otherwise (different: {', '.join(changed)}): choose another output "
            "directory or remove this one."
        )
    if output.exists() and any(output.iterdir()):
        raise ValueError(f"{output} is not empty and holds no prepared data: choose another output directory.")

    draft = output.with_name(f".{output.name}.partial")
    shutil.rmtree(draft, ignore_errors=True)
    try:
        tokenizer.save_pretrained(draft / "tokenizer")
        _tokenize(files, separating_token, draft, text_key, on_bad, seed, workers)
        manifest = settings | _describe(draft, tokenizer)
        if manifest["num_documents"] == 0:
            raise ValueError(f"no text in {', '.join(map(str, sources))}: every document is empty.")
        (draft / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        if output.exists():
            output.rmdir()
        draft.rename(output)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return manifest


def _tokenize(files, separator: str, draft: Path, text_key: str, on_bad: str, seed: int, workers: int | None) -> None:
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.tokens import DocumentTokenizer
    from loguru import logger

    logger.disable("datatrove")
    tasks = min(len(files), _MAX_TASKS)
    executor = LocalPipelineExecutor(
        pipeline=[
            DocumentSource(files, text_key, on_bad, draft / "counts"),
            DocumentTokenizer(
                str(draft),
                str(draft / "tokenizer" / "tokenizer.json"),
                eos_token=separator,
                batch_size=1000,
                seed=seed,
            ),
        ],
        tasks=tasks,
        workers=min(tasks, workers or os.cpu_count() or 1),
        logging_dir=str(draft / "logs"),
    )
    executor.run()


class DocumentSource:
    """First step of the datatrove pipeline: this task's share of the files as documents."""

    def __init__(self, files: list[str], text_key: str, on_bad: str, counts_folder: Path):
        self.files, self.text_key, self.on_bad, self.counts_folder = files, text_key, on_bad, counts_folder

    def __setstate__(self, state: dict) -> None:
        from loguru import logger

        logger.disable("datatrove")  # worker processes log for themselves
        self.__dict__.update(state)

    def __call__(self, data=None, rank: int = 0, world_size: int = 1):
        from datatrove.data import Document

        counts: Counter = Counter()
        texts = read_documents(self.files[rank::world_size], self.text_key, self.on_bad, counts)
        for index, text in enumerate(texts):
            yield Document(text=text, id=f"{rank}/{index}")
        self.counts_folder.mkdir(exist_ok=True)
        (self.counts_folder / f"{rank:05d}.json").write_text(json.dumps(counts), encoding="utf-8")


def _describe(draft: Path, tokenizer: PreTrainedTokenizerBase) -> dict:
    counts: Counter = Counter()
    for path in sorted((draft / "counts").glob("*.json")):
        counts.update(json.loads(path.read_text(encoding="utf-8")))
    for name in ("counts", "logs"):
        shutil.rmtree(draft / name, ignore_errors=True)
    token_bytes = 4 if len(tokenizer) > 2**16 else 2
    files = [
        {"name": path.name, "num_tokens": path.stat().st_size // token_bytes} for path in sorted(draft.glob("*.ds"))
    ]
    return {
        "num_tokens": sum(file["num_tokens"] for file in files),
        "num_documents": counts["documents"],
        "num_empty": counts["empty"],
        "skipped": {what.removeprefix("skipped: "): n for what, n in counts.items() if what.startswith("skipped: ")},
        "vocab_size": len(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
        "token_bytes": token_bytes,
        "files": files,
    }
