"""Documents to token files: tokenised, separated by the end-of-text token, shuffled by document."""

import json
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from calm.data.blocks import MANIFEST, read_manifest
from calm.data.checksums import CHUNK_BYTES, file_checksums
from calm.data.output import changed_settings, find_prepared
from calm.data.pipeline import (
    COUNTS,
    JOBS,
    LOGS,
    PLAIN_TOKENIZER,
    UNSHUFFLED,
    WORK,
    DocumentSource,
    Executor,
    check_no_jobs,
    num_complete,
    run_tasks,
    wait_for_workers,
    was_submitted,
)
from calm.data.sources import find_sources, unread_summary
from calm.data.text import plain_tokenizer
from calm.data.tokenizer import load_tokenizer, tokenizer_hash
from calm.utils.files import only_writer, put_in_place, staging_of, write_whole

_MAX_TASKS = 64
_SETTINGS_FILE, _UNREAD_FILE = "settings.json", "unread.json"
MAX_CHARACTERS = 100_000
SEPARATORS = ("eos", "bos")


def prepare(
    sources: Sequence[str | os.PathLike],
    tokenizer: PreTrainedTokenizerBase,
    output: str | os.PathLike,
    text_key: str = "text",
    on_bad: str = "error",
    seed: int = 0,
    separator: str = "eos",
    max_characters: int | None = MAX_CHARACTERS,
    split: str | None = None,
    subset: str | None = None,
    num_tasks: int | None = None,
    executor: Executor | None = None,
) -> dict | None:
    """Tokenise documents into ``output``: ``.ds`` files (raw uint16 or uint32 tokens), a manifest, the tokenizer.

    The directory appears when it is complete, and not before. Interrupted, the same call goes on with the tasks that
    are not complete (they lie in ``.<output>.partial`` meanwhile) and makes the same files. Called again with the same
    arguments and files of the same names and sizes, nothing is done.

    Args:
        sources: files, folders, addresses and datasets, see :func:`calm.data.sources.find_sources`.
        on_bad: ``"error"`` stops at the first unreadable record, ``"skip"`` counts them in the manifest.
        seed: of the order of the documents.
        separator: what stands between documents: ``"eos"``, the end-of-text token, or ``"bos"``, the begin-of-text
            token, as the paper's models were trained.
        max_characters: longer documents become several, cut where a line or word begins; None leaves them whole.
        split, subset: of datasets, as :func:`datasets.load_dataset` calls them.
        num_tasks: pieces of the work, of whole files each; default one per file, at most 64.
        executor: where they run; default one process per core of this machine.

    Returns:
        the manifest; None where the work is only submitted.
    """
    output, executor = Path(output), executor or Executor()
    _separator_id(tokenizer, separator)
    if max_characters is not None and max_characters < 1:
        raise ValueError(f"max_characters must be at least 1, got {max_characters}.")
    unread: list[str] = []
    files = find_sources(sources, split, subset, unread)
    if num_tasks is not None and not 1 <= num_tasks <= len(files):
        raise ValueError(f"num_tasks must be 1 to {len(files)}, the number of files, got {num_tasks}.")
    settings: dict[str, Any] = {
        "sources": [{"path": file.path, "bytes": file.size} for file in files],
        "text_key": text_key,
        "on_bad": on_bad,
        "seed": seed,
        "tokenizer_sha256": tokenizer_hash(tokenizer),
        "separator": separator,
        "max_characters": max_characters,
        "num_tasks": num_tasks or min(len(files), _MAX_TASKS),
    }
    with only_writer(output):
        manifest = find_prepared(output, sources, settings)
        if manifest is not None:
            return manifest
        return _prepare(sources, tokenizer, output, settings, executor, unread_summary(unread))


def _prepare(
    sources: Sequence[str | os.PathLike],
    tokenizer: PreTrainedTokenizerBase,
    output: Path,
    settings: dict[str, Any],
    executor: Executor,
    unread: dict[str, Any],
) -> dict | None:
    draft = staging_of(output)
    check_no_jobs(draft)
    if _begin_or_go_on(draft, settings, tokenizer):
        _tidy_and_put_in_place(draft, output)
        return read_manifest(output)
    write_whole(draft / WORK / _UNREAD_FILE, json.dumps(unread))
    paths = [file["path"] for file in settings["sources"]]
    source = DocumentSource(paths, settings["text_key"], settings["on_bad"], settings["max_characters"], draft)
    finish = partial(_finish, draft, output.absolute(), [str(name) for name in sources])
    separator_id = _separator_id(tokenizer, settings["separator"])
    try:
        if not run_tasks(executor, source, settings["num_tasks"], separator_id, settings["seed"], finish):
            return None
    except (ValueError, OSError) as error:
        if not num_complete(draft) and not was_submitted(draft):
            shutil.rmtree(draft, ignore_errors=True)
            raise
        done = f"{num_complete(draft)} of {settings['num_tasks']} tasks are complete and kept in {draft}"
        raise ValueError(f"{error} ({done}; the same command, also with --skip-bad, goes on)") from error
    return read_manifest(output)


def _separator_id(tokenizer: PreTrainedTokenizerBase, separator: str) -> int:
    if separator not in SEPARATORS:
        raise ValueError(f"separator must be one of {', '.join(SEPARATORS)}, got {separator!r}.")
    token = tokenizer.eos_token_id if separator == "eos" else tokenizer.bos_token_id
    if token is None:
        raise ValueError(f"the tokenizer has no {separator} token to put between documents: take the other separator.")
    return token


def _begin_or_go_on(draft: Path, settings: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> bool:
    """Make a draft, or leave one of these settings as it is; returns whether all its tasks are complete.

    Raises ValueError rather than lose what a run of other settings has completed.
    """
    path = draft / _SETTINGS_FILE
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        changed = changed_settings(before, settings)
        if before["on_bad"] == "error" and changed == ["on_bad"]:
            changed = []  # a run that stopped at a bad record goes on without it; what is complete had none
        if changed and num_complete(draft):
            raise ValueError(
                f"{draft} holds {num_complete(draft)} complete tasks of an interrupted run with other settings "
                f"(different: {', '.join(changed)}): repeat its command, or remove it."
            )
        if not changed:
            _save_plain_tokenizer(draft, tokenizer)
            write_whole(path, json.dumps(settings))
            return (draft / MANIFEST).exists()
    wait_for_workers(draft)
    shutil.rmtree(draft, ignore_errors=True)
    tokenizer.save_pretrained(draft / "tokenizer")
    _save_plain_tokenizer(draft, tokenizer)
    write_whole(path, json.dumps(settings))
    return False


def _save_plain_tokenizer(draft: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write the tokenizer of the tasks, which reads no control token from a document."""
    path = draft / WORK / PLAIN_TOKENIZER
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        write_whole(path, lambda partial_path: plain_tokenizer(tokenizer).save(str(partial_path)))


def _finish(draft: Path, output: Path, sources: list[str]) -> None:
    """Describe what the tasks wrote, and put the directory in place."""
    settings = json.loads((draft / _SETTINGS_FILE).read_text(encoding="utf-8"))
    manifest = settings | _describe(draft)
    if manifest["num_documents"] == 0:
        shutil.rmtree(draft)  # nothing to go on from once the files are mended
        raise ValueError(f"no text in {', '.join(sources)}: every document is empty.")
    # From here on only this remains to be done, however often it is cut short.
    write_whole(draft / MANIFEST, json.dumps(manifest, indent=1))
    _tidy_and_put_in_place(draft, output)


def _tidy_and_put_in_place(draft: Path, output: Path) -> None:
    for name in (COUNTS, UNSHUFFLED, LOGS, WORK):
        shutil.rmtree(draft / name, ignore_errors=True)
    (draft / JOBS).unlink(missing_ok=True)
    put_in_place(draft, output)
    (output / _SETTINGS_FILE).unlink()


def _describe(draft: Path) -> dict:
    tokenizer = load_tokenizer(draft)
    counts: Counter = Counter()
    skipped: dict[str, dict] = {}
    for path in sorted((draft / COUNTS).glob("*.json")):
        task = json.loads(path.read_text(encoding="utf-8"))
        counts.update(task["counts"])
        for kind, first in task["skipped"].items():
            skipped.setdefault(kind, {"count": 0, "first": first})["count"] += task["counts"][f"skipped: {kind}"]
    token_bytes = 4 if len(tokenizer) > 2**16 else 2
    files = [
        {"name": path.name, "num_tokens": path.stat().st_size // token_bytes, "checksums": _checksums(draft, path)}
        for path in sorted(draft.glob("*.ds"))
    ]
    return {
        "num_tokens": sum(file["num_tokens"] for file in files),
        "num_documents": counts["documents"],
        "num_empty": counts["empty"],
        "num_cuts": counts["cuts"],
        "skipped": skipped,
        "unread": json.loads((draft / WORK / _UNREAD_FILE).read_text(encoding="utf-8")),
        "vocab_size": len(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
        "token_bytes": token_bytes,
        "chunk_bytes": CHUNK_BYTES,
        "files": files,
    }


def _checksums(draft: Path, path: Path) -> list[str]:
    """Return the checksums that the task has taken; take those of a task of an earlier release."""
    taken = draft / WORK / f"{path.name}.json"
    return json.loads(taken.read_text(encoding="utf-8")) if taken.exists() else file_checksums(path)
