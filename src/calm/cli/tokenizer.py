from pathlib import Path
from typing import Annotated

import typer

from calm.cli.sources import Sources, Split, Subset, print_skipped, print_unread

tokenizer_app = typer.Typer(help="Tokenizers.", no_args_is_help=True)


@tokenizer_app.callback()
def tokenizer() -> None:
    """Tokenizers."""


@tokenizer_app.command("train")
def train(
    sources: Sources,
    output: Annotated[Path, typer.Option("--output", "-o", help="directory of the tokenizer")],
    vocab_size: Annotated[int, typer.Option(help="number of tokens")] = 8192,
    text_key: Annotated[str, typer.Option(help="field or column that holds the text")] = "text",
    split: Split = None,
    subset: Subset = None,
    max_documents: Annotated[int | None, typer.Option(help="so many of the first documents; default all")] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="pass over unreadable records")] = False,
) -> None:
    """Train a byte-level BPE tokenizer that marks document ends.

    Example: `calm tokenizer train corpus/train.jsonl -o tokenizer --vocab-size 8192`
    """
    from collections import Counter
    from itertools import islice

    from calm.data.documents import read_documents
    from calm.data.sources import find_sources, unread_summary
    from calm.data.tokenizer import train_tokenizer
    from calm.utils.files import staged_directory

    counts: Counter = Counter()
    skipped: dict[str, str] = {}
    unread: list[str] = []
    with staged_directory(output) as staging:
        files = [file.path for file in find_sources(sources, split, subset, unread)]
        texts = read_documents(files, text_key, "skip" if skip_bad else "error", counts, skipped)
        trained = train_tokenizer(islice(texts, max_documents), vocab_size, progress=True)
        trained.save_pretrained(staging)
    print(f"{len(trained)} tokens from {counts['documents']:,} documents: {output}")
    for kind, first in skipped.items():
        print_skipped(kind, counts[f"skipped: {kind}"], first)
    print_unread(unread_summary(unread))
