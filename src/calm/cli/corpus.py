from pathlib import Path
from typing import Annotated

import typer


def corpus(output: Annotated[Path, typer.Argument(help="directory for train.jsonl and validation.jsonl")]) -> None:
    """Write the embedded corpus: the source text of Python's own standard library, without tables and copies.

    Example: `calm corpus corpus/`
    """
    from calm.data.corpus import describe_size, embedded_corpus, write_embedded_corpus

    splits = embedded_corpus()
    for split, path in write_embedded_corpus(output).items():
        print(f"{split}: {path} ({describe_size(splits[split])})")
