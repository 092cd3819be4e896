from pathlib import Path
from typing import Annotated

import typer

from calm.cli.sources import Sources, Split, Subset, print_skipped, print_unread


def prepare(
    sources: Sources,
    tokenizer: Annotated[str, typer.Option(help="directory of a tokenizer or model, or a hub id")],
    output: Annotated[Path, typer.Option("--output", "-o", help="directory of the token files")],
    text_key: Annotated[str, typer.Option(help="field or column that holds the text")] = "text",
    split: Split = None,
    subset: Subset = None,
    conversations: Annotated[
        bool,
        typer.Option(
            "--conversations",
            help="records of prompt and response, or of messages, for fine-tuning: the loss is on responses alone",
        ),
    ] = False,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="count unreadable records instead of stopping")] = False,
    seed: Annotated[int, typer.Option(help="of the order of documents")] = 0,
    separator: Annotated[
        str, typer.Option(help="between documents: eos (end of text), or bos (begin of text, as in the paper's data)")
    ] = "eos",
    max_characters: Annotated[
        int, typer.Option(help="longer documents become several, cut where a line or word begins; 0 leaves them whole")
    ] = 100_000,
    executor: Annotated[str, typer.Option(help="where the tasks run: local, slurm or ray")] = "local",
    tasks: Annotated[int | None, typer.Option(help="pieces of the work; default one per file, at most 64")] = None,
    workers: Annotated[int | None, typer.Option(help="tasks at a time; default one per core, all on a cluster")] = None,
    partition: Annotated[str | None, typer.Option(help="Slurm's")] = None,
    time: Annotated[str | None, typer.Option(help="Slurm's limit for one task, such as 10:00:00")] = None,
    cpus_per_task: Annotated[int | None, typer.Option(help="on Slurm and Ray")] = None,
    memory_per_cpu: Annotated[int | None, typer.Option(help="on Slurm and Ray, GB; default 2")] = None,
    sbatch: Annotated[list[str] | None, typer.Option(help="more for sbatch: account=mine; repeat as needed")] = None,
) -> None:
    """Tokenise documents into token files that training reads without unpacking.

    Interrupted, the same command goes on: complete tasks stay, the others start over.

    Example: `calm prepare corpus/train.jsonl --tokenizer tokenizer -o data/train`

    Example: `calm prepare chats.jsonl --conversations --tokenizer runs/calm -o data/chats`

    Example: `calm prepare monology/pile-uncopyrighted --tokenizer tokenizer -o data/pile --executor slurm
    --partition cpu --time 12:00:00`
    """
    from calm.data.pipeline import Executor
    from calm.data.prepare import prepare as run
    from calm.data.tokenizer import load_tokenizer

    on_bad = "skip" if skip_bad else "error"
    if conversations:
        from calm.data.conversations import prepare_conversations

        manifest = prepare_conversations(sources, load_tokenizer(tokenizer), output, on_bad, seed, split, subset)
        size = f"{manifest['num_tokens']:,} tokens ({manifest['num_response_tokens']:,} in responses)"
        print(f"{size} of {manifest['num_examples']:,} examples: {output}")
        _print_skipped(manifest)
        return
    given = {
        "partition": partition,
        "time": time,
        "cpus_per_task": cpus_per_task,
        "mem_per_cpu_gb": memory_per_cpu,
        "sbatch_args": dict(_pair(argument) for argument in sbatch) if sbatch else None,
    }
    prepared = run(
        sources,
        load_tokenizer(tokenizer),
        output,
        text_key,
        on_bad,
        seed,
        separator,
        max_characters or None,
        split,
        subset,
        tasks,
        Executor(executor, workers, {name: value for name, value in given.items() if value is not None}),
    )
    if prepared is None:
        print(f"submitted; {output} appears when the last job ends. Repeat the command for tasks that failed.")
        return
    cut = f" ({prepared['num_cuts']:,} cuts in long ones)" if prepared["num_cuts"] else ""
    print(f"{prepared['num_tokens']:,} tokens of {prepared['num_documents']:,} documents{cut}: {output}")
    _print_skipped(prepared)


def _print_skipped(manifest: dict) -> None:
    for kind, bad in manifest["skipped"].items():
        print_skipped(kind, bad["count"], bad["first"])
    print_unread(manifest.get("unread"))


def _pair(argument: str) -> tuple[str, str]:
    name, separator, value = argument.partition("=")
    if not separator:
        raise ValueError(f"--sbatch reads name=value, got {argument!r}.")
    return name, value
