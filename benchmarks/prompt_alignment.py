"""What to do with prompts whose length K does not divide: next-token scores of the choices, at every remainder.

    python benchmarks/prompt_alignment.py MODEL --data DIR [--prompts 400] [--length 48] [--output FILE.json]

Prompts are cut from held-out text, inside documents and at their beginnings. Scored is the token that follows, against
the true text: accuracy and Brier-1 (all pairs of draws), at temperature 1.

- separators: document separators in front of the prompt (what `generate` does)
- drop: the first tokens of the prompt left out, so that K divides the rest
- pad: padding behind the prompt, as in the reference implementation
- constrain: the whole patches of the prompt, then only draws whose chunk begins with the tokens left over (out of 400);
  prompts without two such draws fall back to separators
"""

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

from calm.checkpoints.loading import load_language_model
from calm.data.blocks import TokenBlocks

CONSTRAINED_DRAWS = 400


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--data", required=True)
    parser.add_argument("--prompts", type=int, default=400, help="per remainder and place")
    parser.add_argument("--length", type=int, default=48, help="tokens of a prompt, rounded to whole patches")
    parser.add_argument("--draws", type=int, default=32)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    model = load_language_model(arguments.model).eval()
    patch_size = model.config.patch_size
    text = _text(arguments.data)
    length = arguments.length // patch_size * patch_size
    rows = []
    print("| prompts | remainder | choice | accuracy | Brier-1 | +- | fallback |")
    print("|---|---:|---|---:|---:|---:|---:|")
    for place in ("inside", "beginning"):
        for remainder in range(patch_size):
            prompts, target = _cut(text, model.config.separator_id, place, length + remainder, arguments.prompts)
            for choice in CHOICES if remainder else ("separators",):
                generator = torch.Generator().manual_seed(0)
                with torch.no_grad():
                    drawn, fallback = CHOICES[choice](model, prompts, remainder, arguments.draws, generator)
                row = {"place": place, "remainder": remainder, "choice": choice, **_score(drawn, target)}
                row["fallback"] = fallback
                rows.append(row)
                print(
                    f"| {place} | {remainder} | {choice} | {100 * row['accuracy']:.2f} | {100 * row['brier_1']:.2f} | "
                    f"{100 * row['error']:.2f} | {100 * fallback:.0f}% |",
                    flush=True,
                )
    if arguments.output:
        protocol = {"model": arguments.model, "prompts": arguments.prompts, "length": length, "draws": arguments.draws}
        arguments.output.write_text(json.dumps({"protocol": protocol, "rows": rows}, indent=1), encoding="utf-8")


def _text(data: str) -> Tensor:
    blocks = TokenBlocks(data, 256)
    return torch.cat([blocks[index]["input_ids"] for index in range(len(blocks))])


def _cut(text: Tensor, separator: int, place: str, length: int, count: int) -> tuple[Tensor, Tensor]:
    """Prompts ``[P, length]`` without a separator in them, and the token that follows each ``[P]``."""
    ends = (text == separator).nonzero()[:, 0]
    if place == "beginning":
        starts = ends + 1
    else:
        generator = torch.Generator().manual_seed(1)
        starts = torch.randint(0, len(text) - length - 1, (4 * count,), generator=generator)
    starts = starts[starts < len(text) - length - 1]
    windows = text[starts[:, None] + torch.arange(length + 1)]
    windows = windows[(windows != separator).all(1)][:count]
    return windows[:, :-1], windows[:, -1]


def _next_tokens(model, hidden: Tensor, draws: int, offset: int, generator: torch.Generator) -> Tensor:
    """Draws of the token at an offset of the next chunk: ``[P, D] -> [P, draws]``."""
    latents = model.head.sample(hidden, generator=generator, num_samples=draws)
    return model.autoencoder.decode_tokens(latents)[..., offset].T


def _separators(model, prompts: Tensor, _: int, draws: int, generator: torch.Generator):
    hidden = model.prefill(*model.align_prompt(prompts)).hidden
    return _next_tokens(model, hidden, draws, 0, generator), 0.0


def _drop(model, prompts: Tensor, remainder: int, draws: int, generator: torch.Generator):
    return _separators(model, prompts[:, remainder:], 0, draws, generator)


def _pad(model, prompts: Tensor, remainder: int, draws: int, generator: torch.Generator):
    pad = model.config.pad_token_id if model.config.pad_token_id is not None else 0
    fill = prompts.new_full((len(prompts), model.config.patch_size - remainder), pad)
    return _separators(model, torch.cat([prompts, fill], dim=1), 0, draws, generator)


def _constrain(model, prompts: Tensor, remainder: int, draws: int, generator: torch.Generator):
    drawn, _ = _separators(model, prompts, remainder, draws, generator)
    known, left = prompts[:, :-remainder], prompts[:, -remainder:]
    hidden = model.prefill(*model.align_prompt(known)).hidden
    fallbacks = 0
    for row, state in enumerate(hidden):
        latents = model.head.sample(state, generator=generator, num_samples=CONSTRAINED_DRAWS)
        chunks = model.autoencoder.decode_tokens(latents)
        matching = chunks[(chunks[:, :remainder] == left[row]).all(1)][:, remainder]
        if len(matching) < 2:
            fallbacks += 1
            continue
        drawn[row] = -1
        drawn[row, : len(matching)] = matching[:draws]
    return drawn, fallbacks / len(prompts)


CHOICES = {"separators": _separators, "drop": _drop, "pad": _pad, "constrain": _constrain}


def _score(drawn: Tensor, target: Tensor) -> dict[str, float]:
    """Accuracy and Brier-1 over all pairs of a prompt's draws (``[P, draws]``, -1 where there is none)."""
    valid = drawn >= 0
    count = valid.sum(1)
    hit = ((drawn == target[:, None]) & valid).sum(1) / count
    pairs = (drawn[:, :, None] == drawn[:, None]) & valid[:, :, None] & valid[:, None]
    collision = (pairs.sum((1, 2)) - count) / (count * (count - 1))
    brier = 2 * hit - collision
    return {
        "accuracy": hit.mean().item(),
        "brier_1": brier.mean().item(),
        "error": (brier.std() / len(brier) ** 0.5).item(),
    }


if __name__ == "__main__":
    main()
