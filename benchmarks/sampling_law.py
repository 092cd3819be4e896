"""Does the fast path choose chunks with the law of the algorithm it stands for? A two-sample test on a trained model.

    python benchmarks/sampling_law.py MODEL --data DIR [--contexts 300] [--samples 32] [--output FILE.json]

The plain algorithm, written here once more: draw N chunks, decode all of them, count, choose among those seen at least
n times with weight C(count, n), else n - 1, and so on. The test compares M chunks of either way in every context, with
the kernel 1{x = y} (a squared maximum mean discrepancy, 0 if and only if the laws are equal), against permutations
within contexts. Contexts where draws agree sometimes are taken: elsewhere every choice is a plain draw, or the same
chunk. Its power is shown by what it says of laws that are a little off: other temperatures, another N.
"""

import argparse
import json
import math
import random
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

from calm.checkpoints.loading import load_language_model
from calm.data.blocks import TokenBlocks
from calm.generation.sampling_params import SamplingParams

PERMUTATIONS = 400


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--data", required=True)
    parser.add_argument("--contexts", type=int, default=300)
    parser.add_argument("--samples", type=int, default=32, help="chunks per context and way")
    parser.add_argument("--candidates", type=int, default=200)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    random.seed(0)
    model = load_language_model(options.model).eval()
    hidden = contexts_that_agree_sometimes(model, options)
    print(f"{len(hidden)} contexts, {options.samples} chunks of each way in each\n")
    count = options.candidates
    cases = [(f"fast, T = {t:.2f}", t, t, count, True) for t in (1 / 2, 1 / 3, 0.7)]
    cases += [
        ("off on purpose: T = 0.45 against 0.5", 1 / 2, 0.45, count, False),
        ("off on purpose: T = 0.55 against 0.5", 1 / 2, 0.55, count, False),
        (f"off on purpose: N = {count // 4} against {count}, T = 0.33", 1 / 3, 1 / 3, count // 4, False),
    ]
    rows = []
    print("| compared with the plain algorithm | discrepancy | standard error under equality | p | draws/chunk |")
    print("|---|---:|---:|---:|---:|")
    for name, plain_temperature, temperature, candidates, same in cases:
        plain = sample_plainly(model, hidden, plain_temperature, count, options.samples)
        fast, draws = sample_fast(model, hidden, temperature, candidates, options.samples)
        value, spread, p = two_sample_test(fast, plain)
        rows.append({"case": name, "same_law": same, "discrepancy": value, "standard_error": spread, "p": p})
        print(f"| {name} | {value:.5f} | {spread:.5f} | {p:.4f} | {draws:.1f} |", flush=True)
    if options.output:
        options.output.write_text(json.dumps({"protocol": vars(options) | {"output": ""}, "rows": rows}, indent=1))


@torch.no_grad()
def contexts_that_agree_sometimes(model, options: argparse.Namespace) -> Tensor:
    patch_size = model.config.patch_size
    blocks = TokenBlocks(options.data, 64 * patch_size, patch_size)
    kept: list[Tensor] = []
    for ids in blocks.batches(None, 8):
        hidden = model(ids).last_hidden_state[:, 8:].flatten(0, 1)
        latents = model.head.sample(hidden, num_samples=40)
        chunks = model.autoencoder.decode_tokens(latents).movedim(1, 0)  # [R, 40, K]
        collision = ((chunks[:, :, None] == chunks[:, None]).all(-1).sum((1, 2)) - 40) / (40 * 39)
        kept.append(hidden[(collision > 0.005) & (collision < 0.6)])
        if sum(map(len, kept)) >= options.contexts:
            break
    return torch.cat(kept)[: options.contexts]


@torch.no_grad()
def sample_fast(model, hidden: Tensor, temperature: float, candidates: int, samples: int) -> tuple[Tensor, float]:
    params = SamplingParams(temperature, "batch", candidates).with_defaults()
    patches = model.sample_patch(hidden.repeat_interleave(samples, 0), params)
    return patches.tokens.unflatten(0, (-1, samples)), patches.num_samples.double().mean().item()


@torch.no_grad()
def sample_plainly(model, hidden: Tensor, temperature: float, candidates: int, samples: int) -> Tensor:
    chosen = []
    for state in hidden:
        latents = model.head.sample(state, num_samples=samples * candidates)
        chunks = model.autoencoder.decode_tokens(latents).unflatten(0, (samples, candidates))
        chosen.append([choose(list(map(tuple, pool)), 1 / temperature) for pool in chunks.tolist()])
    return torch.tensor(chosen)


def choose(pool: list[tuple], exponent: float) -> tuple:
    counts = Counter(pool)
    while exponent > 1:
        able = {chunk: count for chunk, count in counts.items() if count >= exponent - 1e-9}
        if able:
            logs = [math.lgamma(count + 1) - math.lgamma(count - exponent + 1) for count in able.values()]
            return random.choices(list(able), [math.exp(value - max(logs)) for value in logs])[0]
        exponent -= 1
    return random.choice(pool)


def two_sample_test(first: Tensor, second: Tensor) -> tuple[float, float, float]:
    """Mean discrepancy over contexts, its standard deviation and p under permutations: ``[R, M, K]`` twice."""
    both = torch.cat([first, second], dim=1)
    equal = (both[:, :, None] == both[:, None]).all(-1).double()
    half = first.shape[1]

    def discrepancy(order: Tensor) -> Tensor:
        shuffled = equal.gather(1, order[:, :, None].expand_as(equal)).gather(2, order[:, None].expand_as(equal))
        within = (shuffled[:, :half, :half].sum((1, 2)) - half + shuffled[:, half:, half:].sum((1, 2)) - half) / (
            half * (half - 1)
        )
        return (within - 2 * shuffled[:, :half, half:].mean((1, 2))).mean()

    plain_order = torch.arange(2 * half).expand(len(both), -1)
    value = discrepancy(plain_order).item()
    null = torch.stack([discrepancy(torch.rand(len(both), 2 * half).argsort(1)) for _ in range(PERMUTATIONS)])
    p = (1 + (null >= value).sum().item()) / (1 + PERMUTATIONS)
    return value, null.std().item(), p


if __name__ == "__main__":
    main()
