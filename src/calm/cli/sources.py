"""What commands that read documents have in common."""

from typing import Annotated, Any

import typer

Sources = Annotated[
    list[str],
    typer.Argument(
        help=".txt/.md/.py, .jsonl/.ndjson/.json (each also .gz and .zst) and .parquet files; folders; "
        "addresses (https://, hf://, s3://); datasets of the hub"
    ),
]
Split = Annotated[str | None, typer.Option(help="of a dataset; default train")]
Subset = Annotated[str | None, typer.Option(help="of a dataset, its configuration's name")]


def print_skipped(kind: str, count: int, first: str) -> None:
    _print(f"skipped: {kind}, {count:,} times; the first: {first}")


def print_unread(unread: dict[str, Any] | None) -> None:
    """Print how many files of folders are not read, if any; a manifest of an earlier release does not have them."""
    if not unread or not unread["count"]:
        return
    suffixes = ", ".join(f"{suffix} {count:,}" for suffix, count in unread["suffixes"].items())
    more = ", ..." if unread["count"] > len(unread["first"]) else ""
    _print(f"not read: {unread['count']:,} files of other formats ({suffixes}): {', '.join(unread['first'])}{more}")


def _print(text: str) -> None:
    # File names may hold what no output takes.
    print(text.encode("utf-8", "backslashreplace").decode())
