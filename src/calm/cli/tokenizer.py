from pathlib import Path
from typing import Annotated

import typer

tokenizer_app = typer.Typer(help="Tokenizers.", no_args_is_help=True)


@tokenizer_app.callback()
def tokenizer() -> None:
    """Tokenizers."""


@tokenizer_app.command("train")
def train(
    sources: Annotated[list[Path], typer.Argument(help=".txt/.md/.py, .jsonl(.gz/.zst), .parquet files, or folders")],
    output: Annotated[Path, typer.Option("--output", "-o", help="directory of the tokenizer")],
    vocab_size: Annotated[int, typer.Option(help="number of tokens")] = 8192,
    text_key: Annotated[str, typer.Option(help="field or column that holds the text")] = "text",
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="pass over unreadable records")] = False,
) -> None:
    """Train a byte-level BPE tokenizer that marks document ends.

    Example: `calm tokenizer train corpus/train.jsonl -o tokenizer --vocab-size 8192`
    """
    from collections import Counter

    from calm.data.documents import find_files, read_documents
    from calm.data.tokenizer import train_tokenizer

    if output.exists() and any(output.iterdir()):
        raise ValueError(f"{output} is not empty: choose another --output.")
    counts: Counter = Counter()
    texts = read_documents(find_files(sources), text_key, "skip" if skip_bad else "error", counts)
    trained = train_tokenizer(texts, vocab_size, progress=True)
    trained.save_pretrained(output)
    print(f"{len(trained)} tokens from {counts['documents']:,} documents: {output}")
    for what, number in counts.items():
        if what.startswith("skipped"):
            print(f"{what}" + (f" ({number} times)" if number > 1 else ""))
