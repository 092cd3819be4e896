"""One continuation with a drafter, printed as it appears."""

import os

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from calm.data.text import encode_plain_text
from calm.generation.completions import PrintingStreamer
from calm.generation.drafting import DraftedText, check_target, generate_with_drafter
from calm.generation.sampling_params import SamplingParams
from calm.models.drafters import load_drafter

_WITHOUT_DRAFTER = ("sampler", "num_candidates", "top_p", "stop", "logprobs")


def complete_with_drafter(
    target: PreTrainedModel,
    drafter: str | os.PathLike,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    params: SamplingParams,
) -> DraftedText:
    """Continue a prompt with a drafter, and print it and the tokens per pass of the target.

    Raises:
        ValueError: for parameters that have no meaning here.
    """
    check_target(target)
    given = [name for name in _WITHOUT_DRAFTER if getattr(params, name) not in (None, (), 1.0)]
    if given:
        raise ValueError(f"with a drafter, leave out {', '.join(given)}: only temperature, length and seed apply.")
    ids = encode_plain_text(tokenizer, prompt)
    if not ids:
        raise ValueError("the prompt is empty: a drafter needs at least one token to read; give --prompt.")
    temperature = params.temperature
    if temperature is None:
        saved = target.generation_config.temperature
        temperature = 1.0 if saved is None else float(saved)
    streamer = PrintingStreamer(tokenizer)
    input_ids = torch.tensor([ids], device=target.device)
    streamer.put(input_ids.cpu())

    def print_tokens(added: list[list[int]]) -> bool:
        streamer.put(torch.tensor(added[0]))
        return False

    result = generate_with_drafter(
        target,
        load_drafter(drafter).to(target.device).attach(target),  # type: ignore[arg-type]
        input_ids,
        max_new_tokens=params.max_new_tokens or 128,
        temperature=temperature,
        generator=torch.Generator().manual_seed(params.seed or 0),
        on_tokens=print_tokens,
    )
    streamer.end()
    statistics = result.statistics
    print(f"{statistics.tokens_per_verification:.2f} tokens per pass of the model ({statistics.num_drafted} drafted, "
          f"{statistics.num_accepted} accepted)")  # fmt: skip
    return result
