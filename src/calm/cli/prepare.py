from pathlib import Path
from typing import Annotated

import typer


def prepare(
    sources: Annotated[list[Path], typer.Argument(help=".txt/.md/.py, .jsonl(.gz/.zst), .parquet files, or folders")],
    tokenizer: Annotated[str, typer.Option(help="directory of a tokenizer or model, or a hub id")],
    output: Annotated[Path, typer.Option("--output", "-o", help="directory of the token files")],
    text_key: Annotated[str, typer.Option(help="field or column that holds the text")] = "text",
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="count unreadable records instead of stopping")] = False,
    seed: Annotated[int, typer.Option(help="of the order of documents")] = 0,
    workers: Annotated[int | None, typer.Option(help="processes; default one per core")] = None,
    separator: Annotated[
        str, typer.Option(help="between documents: eos (end of text), or bos (begin of text, as in the paper's data)")
    ] = "eos",
) -> None:
    """Tokenise documents into token files that training reads without unpacking.

    Example: `calm prepare corpus/train.jsonl --tokenizer tokenizer -o data/train`
    """
    from calm.data.prepare import prepare as run
    from calm.data.tokenizer import load_tokenizer

    on_bad = "skip" if skip_bad else "error"
    manifest = run(sources, load_tokenizer(tokenizer), output, text_key, on_bad, seed, workers, separator)
    print(f"{manifest['num_tokens']:,} tokens of {manifest['num_documents']:,} documents: {output}")
    for what, number in manifest["skipped"].items():
        print(f"skipped: {what}" + (f" ({number} times)" if number > 1 else ""))
