from pathlib import Path
from typing import Annotated

import typer


def corpus(output: Annotated[Path, typer.Argument(help="directory for train.jsonl and validation.jsonl")]) -> None:
    """Write the embedded corpus: the source text of Python's own standard library.

    Example: `calm corpus corpus/`
    """
    from calm.data.corpus import write_embedded_corpus

    for split, path in write_embedded_corpus(output).items():
        print(f"{split}: {path} ({path.stat().st_size / 1e6:.1f} MB)")
