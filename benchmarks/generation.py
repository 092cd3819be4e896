"""Speed of generation: CALM at several temperatures, a token model of the same backbone, the reference implementation.

    python benchmarks/generation.py --shape study                      # random weights
    python benchmarks/generation.py --shape paper --batch-sizes 1 --new-tokens 32
    python benchmarks/generation.py --model runs/calm --baseline runs/baseline --data data/validation
    python benchmarks/generation.py --shape study --reference CLONE --reference-python VENV/bin/python

What low temperature costs hangs on how often draws agree, so random weights come in two kinds: `agree` (the head's last
layer is zero, as in a new model: all draws are one) and `differ` (no two draws are alike: the worst case). Token
prediction in the place of the head, which costs the same at every temperature, has rows of its own. With
--reference, a clone of the reference implementation generates from the same weights and prompts, in its own interpreter
(torch, transformers 4.43). Everything is measured in turn, several times; medians are printed.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from calm import CalmAutoencoderConfig, CalmConfig, CalmForCausalLM
from calm.checkpoints.loading import load_language_model
from calm.checkpoints.reference import save_reference
from calm.data.blocks import TokenBlocks

SHAPES = {
    # The study of the house: small enough for two cores.
    "study": {
        "backbone": {
            "vocab_size": 8192, "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 6,
            "num_attention_heads": 4,
        },
        "autoencoder": {
            "vocab_size": 8192, "patch_size": 4, "hidden_size": 256, "intermediate_size": 640, "latent_size": 128,
        },
    },
    # CALM-M of the paper.
    "paper": {
        "backbone": {
            "vocab_size": 128257, "hidden_size": 1024, "intermediate_size": 2752, "num_hidden_layers": 16,
            "num_attention_heads": 16,
        },
        "autoencoder": {},
    },
}  # fmt: skip
PROMPT_TOKENS = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, help="random weights of this size")
    parser.add_argument("--model", help="a trained CALM instead")
    parser.add_argument("--baseline", help="token model to stand beside --model; default random weights of its shape")
    parser.add_argument("--data", help="prepared text to take prompts from; default random tokens")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--temperatures", type=float, nargs="+", default=[1.0, 0.7, 0.5, 1 / 3])
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--compile", action="store_true", help="compiled steps, for CALM and baseline")
    parser.add_argument("--reference", type=Path, help="clone of the reference implementation")
    parser.add_argument("--reference-python", default=sys.executable, help="interpreter it runs in")
    parser.add_argument("--output", type=Path, help="write JSON here")
    options = parser.parse_args()
    if (options.shape is None) == (options.model is None):
        parser.error("say either --shape or --model")

    models, baseline = load_models(options)
    rows = []
    for batch_size in options.batch_sizes:
        prompts = choose_prompts(batch_size, baseline.config.vocab_size, options.data).to(options.device)
        rows.append(measure_baseline(baseline, prompts, options))
        for name, model in models.items():
            for temperature in options.temperatures:
                rows.append(measure_calm(model, prompts, temperature, "batch", options) | {"weights": name})
            if "mtp" in model.samplers:
                rows.append(measure_calm(model, prompts, 0.5, "mtp", options) | {"weights": name})
        if options.reference:
            for name, model in models.items():
                rows += measure_reference(model, prompts, name, options)
    print_tables(rows)
    if options.output:
        protocol = {name: str(value) for name, value in vars(options).items()}
        protocol |= {"machine": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
        protocol |= {"torch": torch.__version__}
        options.output.write_text(json.dumps({"protocol": protocol, "rows": rows}, indent=1), encoding="utf-8")


def load_models(options: argparse.Namespace) -> tuple[dict[str, Any], Any]:
    """CALMs by the name of their weights, and the token model."""
    dtype = getattr(torch, options.dtype)
    if options.model:
        models = {"trained": load_language_model(options.model, dtype)}
        if options.baseline:
            baseline = load_language_model(options.baseline, dtype)
        else:
            baseline = LlamaForCausalLM(models["trained"].config.backbone_config)
    else:
        shape = SHAPES[options.shape]
        fields = {"max_position_embeddings": 4096} | shape["backbone"]
        models = {}
        for name, scale in (("agree", 0.0), ("differ", 0.3)):
            torch.manual_seed(0)
            config = CalmConfig(
                backbone_config=fields,
                autoencoder_config=CalmAutoencoderConfig(**shape["autoencoder"]),
                mtp_weight=1.0 if name == "differ" else 0.0,
                mtp_type="autoregressive",
            )
            models[name] = CalmForCausalLM(config)
            torch.nn.init.normal_(models[name].head.output_layer.weight, std=scale)
        baseline = LlamaForCausalLM(LlamaConfig(**fields))
    for model in (*models.values(), baseline):
        model.to(device=options.device, dtype=dtype).eval()
        model.generation_config.eos_token_id = None  # every row runs to the end
        model.generation_config.pad_token_id = 0
    return models, baseline


def choose_prompts(batch_size: int, vocab_size: int, data: str | None) -> torch.Tensor:
    if data is not None:
        return next(TokenBlocks(data, PROMPT_TOKENS).batches(batch_size, batch_size))
    generator = torch.Generator().manual_seed(0)
    return torch.randint(2, vocab_size, (batch_size, PROMPT_TOKENS), generator=generator)


def median_seconds(run: Callable[[], Any], options: argparse.Namespace) -> float:
    run()
    times = []
    for _ in range(options.repeats):
        started = time.perf_counter()
        run()
        if options.device != "cpu":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def measure_baseline(model: Any, prompts: torch.Tensor, options: argparse.Namespace) -> dict:
    extra = {"cache_implementation": "static"} if options.compile else {}
    seconds = median_seconds(
        lambda: model.generate(
            prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=options.new_tokens, do_sample=True,
            top_k=0, **extra,
        ),
        options,
    )  # fmt: skip
    return row("token model", prompts, 1.0, seconds, options.new_tokens, 1) | {"weights": ""}


def measure_calm(
    model: Any, prompts: torch.Tensor, temperature: float, sampler: str, options: argparse.Namespace
) -> dict:
    def run() -> Any:
        return model.generate(
            prompts, max_new_tokens=options.new_tokens, temperature=temperature, sampler=sampler,
            return_dict_in_generate=True,
            generator=torch.Generator(prompts.device).manual_seed(0), compile=options.compile,
        )  # fmt: skip

    patch_size = model.config.patch_size
    seconds = median_seconds(run, options)
    parts, out = timed_parts(model, run, options)
    steps = -(-options.new_tokens // patch_size)
    name = "CALM" if sampler == "batch" else "CALM, token prediction"
    return row(name, prompts, temperature, seconds, options.new_tokens, patch_size) | {
        "samples_per_patch": out.num_samples.double().mean().item(),
        "decoded_per_token": out.num_decoded.double().mean().item() / patch_size,
        "milliseconds_by_part": {name: 1000 * value / steps for name, value in parts.items()},
    }


def timed_parts(model: Any, run: Callable[[], Any], options: argparse.Namespace) -> tuple[dict[str, float], Any]:
    """Seconds in the parts of one more run; what is left of it is choosing, and the prompt."""
    spent: dict[str, float] = defaultdict(float)

    def watch(owner: Any, name: str, part: str) -> None:
        inner = getattr(owner, name)

        @wraps(inner)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            result = inner(*args, **kwargs)
            if options.device != "cpu":
                torch.cuda.synchronize()
            spent[part] += time.perf_counter() - started
            return result

        setattr(owner, name, wrapper)
        watched.append((owner, name))

    watched: list[tuple[Any, str]] = []
    watch(model, "extend", "backbone")
    watch(model.head, "sample", "head")
    watch(model.autoencoder.decoder, "patch_states", "decoder")
    watch(model.autoencoder.decoder, "token_states", "decoder")
    watch(model.autoencoder, "best_tokens", "vocabulary")
    if "mtp" in model.samplers:
        watch(model.mtp_head, "draw", "token prediction")
    started = time.perf_counter()
    out = run()
    total = time.perf_counter() - started
    for owner, name in watched:
        delattr(owner, name)
    return {**spent, "rest": total - sum(spent.values())}, out


def measure_reference(model: Any, prompts: torch.Tensor, name: str, options: argparse.Namespace) -> list[dict]:
    temperatures = [t for t in options.temperatures if abs(1 / t - round(1 / t)) < 1e-9]  # it takes no others
    with tempfile.TemporaryDirectory() as folder:
        model.config.backbone_config.pad_token_id = model.config.pad_token_id
        save_reference(model, Path(folder) / "model")
        torch.save(prompts, Path(folder) / "prompts.pt")
        command = [
            options.reference_python, str(Path(__file__).with_name("reference_generation.py")),
            str(options.reference), folder, str(options.new_tokens), str(options.repeats), *map(repr, temperatures),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"the reference failed:\n{done.stderr[-2000:]}")
    seconds = json.loads(done.stdout.splitlines()[-1])
    patch_size = model.config.patch_size
    return [
        row("reference", prompts, temperature, taken, options.new_tokens, patch_size)
        | {"weights": name, "samples_per_patch": 1 if temperature == 1 else 200}
        | {"decoded_per_token": 1 if temperature == 1 else 200}
        for temperature, taken in zip(temperatures, seconds, strict=True)
    ]


def row(model: str, prompts: torch.Tensor, temperature: float, seconds: float, new_tokens: int, chunk: int) -> dict:
    return {
        "model": model,
        "batch_size": len(prompts),
        "temperature": temperature,
        "tokens_per_second": len(prompts) * new_tokens / seconds,
        "milliseconds_per_step": 1000 * seconds / -(-new_tokens // chunk),
    }


def print_tables(rows: list[dict]) -> None:
    def find(one: dict, model: str) -> float | None:
        for other in rows:
            same = other["batch_size"] == one["batch_size"] and other["model"] == model
            if same and (model == "token model" or all(other[k] == one[k] for k in ("weights", "temperature"))):
                return other["tokens_per_second"]
        return None

    def ratio(one: dict, model: str) -> str:
        other = find(one, model)
        return "" if other is None or one["model"] == model else f"{one['tokens_per_second'] / other:.2f}"

    print("| batch | model | weights | T | tokens/s | x token model | x reference | draws/chunk | products/token |")
    print("|---:|---|---|---:|---:|---:|---:|---:|---:|")
    for one in rows:
        draws = f"{one['samples_per_patch']:.1f}" if "samples_per_patch" in one else ""
        products = f"{one['decoded_per_token']:.1f}" if "decoded_per_token" in one else ""
        print(
            f"| {one['batch_size']} | {one['model']} | {one['weights']} | {one['temperature']:.2f} | "
            f"{one['tokens_per_second']:.0f} | {ratio(one, 'token model')} | {ratio(one, 'reference')} | {draws} | "
            f"{products} |"
        )
    print("\nMilliseconds of a CALM step by part:\n")
    names = ("backbone", "head", "decoder", "vocabulary", "token prediction", "rest")
    print(f"| batch | weights | T | step | {' | '.join(names)} | step / backbone |")
    print("|---:|---|" + "---:|" * (len(names) + 3))
    for one in rows:
        if "backbone" in one.get("milliseconds_by_part", {}):  # not where it is compiled
            parts = one["milliseconds_by_part"]
            total = sum(parts.values())
            cells = [f"{parts.get(name, 0):.1f}" for name in names]
            print(
                f"| {one['batch_size']} | {one['weights']} | {one['temperature']:.2f} | {total:.1f} | "
                f"{' | '.join(cells)} | {total / parts['backbone']:.1f} |"
            )


if __name__ == "__main__":
    main()
