"""Cost of BrierLM: ours and the reference implementation's, on the same weights and text.

    python benchmarks/brier.py [--reference CLONE --reference-python VENV/bin/python] [--model runs/calm --data DIR]
    python benchmarks/brier.py --memory        # peak memory at block 8192 and 128257 tokens

The weights are random and of a small model (256 x 6, vocabulary 8192), such that samples always agree: the worst case.
(The head's last layer is zero; the token model's logits are large.) Time is that of one block of 2048 tokens, the
median of several; a plain forward pass of the same model on the same block stands beside it. With --model, a trained
CALM, the standard deviation of the score of one batch over repeated draws is measured for 2, 8 and 16 samples (the
reference takes 2).
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from generation import SHAPES
from transformers import LlamaConfig, LlamaForCausalLM

from calm import CalmAutoencoderConfig, CalmConfig, CalmForCausalLM
from calm.checkpoints.loading import load_language_model
from calm.checkpoints.reference import save_reference
from calm.data.blocks import TokenBlocks
from calm.evaluation.brier_lm import evaluate_brier

BLOCK = 2048
CASES = [
    ("token model", 1, 2), ("K = 1", 1, 2), ("K = 2", 2, 2), ("K = 4", 4, 2), ("K = 4, 16 samples", 4, 16),
    ("K = 8", 8, 2),
]  # fmt: skip


class OneText:
    """Given tokens in the place of prepared data."""

    def __init__(self, ids: torch.Tensor, vocab_size: int):
        self.ids, self.block_size, self.manifest = ids, ids.shape[1], {"vocab_size": vocab_size}

    def batches(self, *_: Any) -> Any:
        yield self.ids


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reference", type=Path, help="clone of the reference implementation")
    parser.add_argument("--reference-python", default=sys.executable, help="interpreter it runs in")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--model", help="a trained CALM")
    parser.add_argument("--data", help="prepared validation data for it")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--output", type=Path, help="write JSON here")
    options = parser.parse_args()
    results: dict[str, Any] = {"threads": torch.get_num_threads(), "torch": torch.__version__}
    if options.memory:
        results["memory"] = memory()
    else:
        results["worst_case"] = worst_case(options)
        if options.model:
            results["variance"] = variance(options)
    if options.output:
        options.output.write_text(json.dumps(results, indent=1), encoding="utf-8")


def calm(patch_size: int) -> Any:
    torch.manual_seed(0)
    shape = SHAPES["study"]
    config = CalmConfig(
        backbone_config={"max_position_embeddings": 2048} | shape["backbone"],
        autoencoder_config=CalmAutoencoderConfig(**shape["autoencoder"] | {"patch_size": patch_size}),
    )
    return CalmForCausalLM(config).eval()


def token_model() -> Any:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(max_position_embeddings=2048, **SHAPES["study"]["backbone"])).eval()
    model.lm_head.weight.data *= 100
    return model


def worst_case(options: argparse.Namespace) -> list[dict]:
    ids = torch.randint(2, 8192, (1, BLOCK), generator=torch.Generator().manual_seed(0))
    text: Any = OneText(ids, 8192)
    rows = []
    print("| model | plain pass, s | BrierLM, s | passes' time | reference, s | x reference |")
    print("|---|---:|---:|---:|---:|---:|")
    for name, patch_size, num_samples in CASES:
        model = token_model() if name == "token model" else calm(patch_size)
        with torch.no_grad():
            plain = median_seconds(lambda: model(ids), options.repeats)  # noqa: B023
        ours = median_seconds(
            lambda: evaluate_brier(model, text, patch_size, num_samples=num_samples),  # noqa: B023
            options.repeats,
        )
        row = {"model": name, "plain_seconds": plain, "seconds": ours, "reference_seconds": None}
        if options.reference:
            row["reference_seconds"] = reference_seconds(model, ids, options)
        rows.append(row)
        cells = [name, f"{plain:.2f}", f"{ours:.2f}", f"{ours / plain:.1f}"]
        theirs = row["reference_seconds"]
        cells += [f"{theirs:.2f}", f"{theirs / ours:.1f}"] if theirs else ["", ""]
        print("| " + " | ".join(cells) + " |", flush=True)
    return rows


def median_seconds(run: Callable[[], Any], repeats: int) -> float:
    run()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def reference_seconds(model: Any, ids: torch.Tensor, options: argparse.Namespace) -> float:
    with tempfile.TemporaryDirectory() as folder:
        if isinstance(model, CalmForCausalLM):
            save_reference(model, Path(folder) / "model")
        else:
            model.config.architectures = ["LlamaForCausalLM"]
            model.save_pretrained(Path(folder) / "model")
        torch.save(ids, Path(folder) / "ids.pt")
        worker = Path(__file__).with_name("reference_brier.py")
        done = subprocess.run(
            [options.reference_python, str(worker), str(options.reference), folder], capture_output=True, text=True
        )
    if done.returncode != 0:
        raise SystemExit(f"the reference failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def variance(options: argparse.Namespace) -> list[dict]:
    """Spread of one batch's scores over the draws, and the time they take."""
    model = load_language_model(options.model).eval()
    patch_size = model.config.patch_size
    blocks = TokenBlocks(options.data, 512, patch_size)
    ids = next(blocks.batches(8, 8))
    text: Any = OneText(ids, blocks.manifest["vocab_size"])
    rows = []
    print("\n| samples | seconds | standard deviation of Brier-1 | Brier-2 | Brier-3 | Brier-4 |")
    print("|---:|---:|---:|---:|---:|---:|")
    for num_samples in (2, 8, 16):
        results = [
            evaluate_brier(model, text, patch_size, num_samples=num_samples, seed=seed)
            for seed in range(10 * options.repeats)
        ]
        spread = torch.tensor([result.brier for result in results]).std(0).tolist()
        seconds = statistics.median(result.seconds for result in results)
        rows.append({"num_samples": num_samples, "seconds": seconds, "brier_std": spread})
        print(f"| {num_samples} | {seconds:.2f} | " + " | ".join(f"{value:.3f}" for value in spread) + " |", flush=True)
    return rows


def memory() -> list[dict]:
    """Peak memory of scoring a block of 8192 tokens with a vocabulary of 128257, model by model."""
    rows = []
    print("| model | weights, GiB | peak, GiB | seconds |")
    print("|---|---:|---:|---:|")
    for name in ("CALM-M, K = 4", "CALM-M, K = 1", "token model"):
        # A process of its own: the peak of a process never falls.
        code = (
            f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import brier; brier.memory_of({name!r})"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        row = {"model": name, **json.loads(done.stdout.splitlines()[-1])}
        rows.append(row)
        print(f"| {name} | {row['weights']:.2f} | {row['peak']:.2f} | {row['seconds']:.0f} |", flush=True)
    return rows


def memory_of(name: str) -> None:
    fields = {"max_position_embeddings": 8192} | SHAPES["paper"]["backbone"]
    if name == "token model":
        model: Any = LlamaForCausalLM(LlamaConfig(**fields)).eval()
    else:
        patch_size = int(name[-1])
        config = CalmConfig(backbone_config=fields, autoencoder_config=CalmAutoencoderConfig(patch_size=patch_size))
        model = CalmForCausalLM(config).eval()
    ids = torch.randint(0, 128257, (1, 8192))
    started = time.perf_counter()
    patch_size = getattr(model.config, "patch_size", 1)
    text: Any = OneText(ids, 128257)
    evaluate_brier(model, text, 4 * patch_size if patch_size == 1 else patch_size, num_samples=2)
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({"weights": weights, "peak": peak, "seconds": time.perf_counter() - started}))


if __name__ == "__main__":
    main()
