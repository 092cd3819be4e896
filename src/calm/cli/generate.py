import sys
from typing import Annotated, Any

import typer


def generate(
    model: Annotated[str, typer.Argument(help="directory of a trained model, or a hub id")],
    prompt: Annotated[
        str | None, typer.Option(help="text to continue; `-` reads stdin; none starts a document")
    ] = None,
    temperature: Annotated[float, typer.Option(help="in (0, 1]; lower is safer text")] = 0.5,
    max_new_tokens: Annotated[int, typer.Option(help="tokens to add at most")] = 128,
    sampler: Annotated[str, typer.Option(help="batch (fast, approximate) or exact")] = "batch",
    num_candidates: Annotated[int, typer.Option(help="draws the batch sampler chooses from")] = 200,
    seed: Annotated[int, typer.Option(help="the same seed gives the same text")] = 0,
    tokenizer: Annotated[str | None, typer.Option(help="tokenizer, where the model has none beside it")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, float16; auto is float32 on a CPU")] = "auto",
) -> None:
    """Continue a prompt, printing as it goes.

    Example: `calm generate runs/calm --prompt "def main(" --temperature 0.5`
    """
    import torch
    from transformers import TextStreamer

    from calm.data.tokenizer import load_tokenizer
    from calm.device import resolve_device, resolve_dtype
    from calm.models.loading import load_language_model
    from calm.models.modeling_calm import CalmForCausalLM

    target = resolve_device(device)
    language_model: Any = load_language_model(model, resolve_dtype(dtype, target))
    language_model.to(target)
    words = load_tokenizer(tokenizer or model)
    text = sys.stdin.read() if prompt == "-" else prompt or ""
    ids = words(text, return_tensors="pt", add_special_tokens=False)["input_ids"].long().to(language_model.device)
    streamer = TextStreamer(words, skip_special_tokens=True)
    if isinstance(language_model, CalmForCausalLM):
        generator = torch.Generator(language_model.device).manual_seed(seed)
        language_model.generate(
            ids,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            sampler=sampler,
            num_candidates=num_candidates,
            generator=generator,
            streamer=streamer,
        )
        return
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}.")
    if ids.shape[1] == 0:
        ids = torch.tensor([[words.eos_token_id]], device=language_model.device)
    torch.manual_seed(seed)  # transformers' generate takes no generator
    language_model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        do_sample=True,
        temperature=temperature,
        top_k=0,
        streamer=streamer,
    )
