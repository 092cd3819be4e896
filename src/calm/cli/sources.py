"""What commands that read documents have in common."""

from typing import Annotated

import typer

Sources = Annotated[
    list[str],
    typer.Argument(
        help=".txt/.md/.py, .jsonl(.gz/.zst), .parquet files; folders; addresses (https://, hf://, s3://); "
        "datasets of the hub"
    ),
]
Split = Annotated[str | None, typer.Option(help="of a dataset; default train")]
Subset = Annotated[str | None, typer.Option(help="of a dataset, its configuration's name")]


def print_skipped(kind: str, count: int, first: str) -> None:
    print(f"skipped: {kind}, {count:,} times; the first: {first}")
