from pathlib import Path
from typing import Annotated, Any

import typer


def drafter(
    target: Annotated[str, typer.Argument(help="directory of a token model, or a hub id")],
    prompts: Annotated[Path, typer.Option(help="text file with one prompt per line, or JSONL with a field `text`")],
    output: Annotated[Path, typer.Option("--output", "-o", help="directory of the drafter")],
    kind: Annotated[str, typer.Option("--type", help="mtp, categorical_flow or eagle")] = "mtp",
    num_tokens: Annotated[int, typer.Option(min=1, help="tokens of a draft")] = 4,
    chat: Annotated[bool, typer.Option("--chat", help="prompts are messages: apply the chat template")] = False,
    continuation_tokens: Annotated[
        int, typer.Option(min=0, help="tokens the target adds to every prompt; 0 trains on the texts as they are")
    ] = 160,
    shortlist: Annotated[int, typer.Option(min=1, help="most frequent tokens that may be drafted")] = 4096,
    epochs: Annotated[int, typer.Option(min=1, help="passes over the texts")] = 4,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
) -> None:
    """Train a drafter that makes a token model faster without changing its text. Interrupted runs resume.

    Example: `calm drafter SmolLM2 --prompts prompts.txt --chat -o runs/drafter`, then
    `calm generate SmolLM2 --drafter runs/drafter --prompt "Once upon a time"`
    """
    import torch

    from calm.checkpoints.loading import load_language_model
    from calm.data.documents import read_documents
    from calm.data.text import encode_chat, encode_plain_text
    from calm.data.tokenizer import load_tokenizer
    from calm.generation.drafting import check_target
    from calm.models.drafters import DRAFTERS
    from calm.training.drafting.train import DraftTraining
    from calm.utils.device import resolve_device
    from calm.utils.paths import did_you_mean
    from calm.utils.progress import make_progress
    from calm.workflows.drafter import DrafterPlan, make_drafter

    if kind not in DRAFTERS:
        raise ValueError(f"--type must be one of {', '.join(sorted(DRAFTERS))}, got {kind!r}.")
    if not prompts.is_file():
        raise ValueError(f"no such file: {prompts}{did_you_mean(prompts)}")
    model = load_language_model(target, torch.float32)
    check_target(model)
    model.to(resolve_device(device))  # type: ignore[arg-type]
    tokenizer = load_tokenizer(target)
    is_lines = prompts.suffix.lower() == ".txt"
    texts = prompts.read_text(encoding="utf-8").split("\n") if is_lines else read_documents([str(prompts)])
    texts = [text for text in texts if text.strip()]
    if chat:
        messages = [[{"role": "user", "content": text}] for text in texts]
        ids = [encode_chat(tokenizer, message, add_generation_prompt=True) for message in messages]
    else:
        ids = [encode_plain_text(tokenizer, text) for text in texts]
    plan = DrafterPlan(kind, num_tokens, shortlist, continuation_tokens, DraftTraining(num_epochs=epochs))
    with make_progress() as progress:
        tasks: dict[str, Any] = {}

        def advance(stage: str, done: int, total: int, note: str) -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage, total=total, note="")
            progress.update(tasks[stage], completed=done, note=note)

        make_drafter(model, ids, plan, output, advance)
    print(f"drafter: {output}\nnext: calm generate {target} --drafter {output} --prompt TEXT")
