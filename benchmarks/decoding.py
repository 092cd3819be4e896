"""Tokens per second of trained models, all through the same loop: sample a patch, take a step.

    python benchmarks/decoding.py runs/baseline runs/calm:direct runs/calm:token_prediction --data data/validation

The loop is that of the server without its queue (`calm.generation.model_runner`), so that token models and CALMs are
measured with the same overhead. A sampler may follow the name of a CALM; the default is `batch`. Prompts are the
beginnings of held-out blocks. Models take turns, several times; medians are printed, and ratios to the first model.
"""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import torch

from calm.checkpoints.loading import load_language_model
from calm.data.blocks import TokenBlocks
from calm.generation.model_runner import ModelRunner, model_runner
from calm.generation.sampling_params import SamplingParams
from calm.utils.device import resolve_device


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", help="directories; after that of a CALM, :SAMPLER")
    parser.add_argument("--data", required=True, help="prepared data, for prompts")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, help="write JSON here")
    options = parser.parse_args()

    device = resolve_device(options.device)
    runners = {}
    for name in options.models:
        model = load_language_model(name.partition(":")[0]).eval()
        model.to(device)
        runners[name] = model_runner(model)
    blocks = TokenBlocks(options.data, options.prompt_tokens)
    prompts = torch.stack([blocks[index]["input_ids"] for index in blocks.spread(max(options.batch_sizes))]).to(device)
    rates: dict[str, dict[int, list[float]]] = {name: {size: [] for size in options.batch_sizes} for name in runners}
    for size in options.batch_sizes:
        for _ in range(options.repeats):
            for name, runner in runners.items():
                sampler = name.partition(":")[2] or ("batch" if runner.samplers else None)
                params = runner.resolve(SamplingParams(options.temperature, sampler, top_p=1.0))
                rates[name][size].append(tokens_per_second(runner, params, prompts[:size], options.new_tokens))
    medians = {
        name: {size: statistics.median(several) for size, several in of_model.items()}
        for name, of_model in rates.items()
    }
    first = medians[options.models[0]]
    print("| model | " + " | ".join(f"batch {size} | x first" for size in options.batch_sizes) + " |")
    print("|---" + "|---:|---:" * len(options.batch_sizes) + "|")
    for name, of_model in medians.items():
        cells = " | ".join(f"{rate:,.0f} | {rate / first[size]:.2f}" for size, rate in of_model.items())
        print(f"| {name} | {cells} |")
    if options.output:
        about = {"options": {name: str(value) for name, value in vars(options).items()}, "torch": torch.__version__}
        about["machine"] = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor()
        options.output.write_text(json.dumps({"about": about, "medians": medians, "rates": rates}, indent=1))


@torch.no_grad()
def tokens_per_second(runner: ModelRunner, params: SamplingParams, prompts: torch.Tensor, new_tokens: int) -> float:
    """Of decoding alone; the prompts are read before the clock starts."""
    generator: list[torch.Generator] = [torch.Generator(runner.device).manual_seed(row) for row in range(len(prompts))]
    conditions, cache, (position, *_) = runner.prefill([runner.whole_patches(row) for row in prompts.tolist()])
    started = time.perf_counter()
    for step in range(new_tokens // runner.patch_size):
        patches = runner.sample(conditions, params, generator)
        positions = torch.full((len(prompts),), position + step, device=runner.device)
        conditions = runner.step(patches.tokens, positions, None, cache)
    if runner.device.type == "cuda":
        torch.cuda.synchronize()
    return len(prompts) * new_tokens / (time.perf_counter() - started)


if __name__ == "__main__":
    main()
