"""Cost of training: tokens per second, peak memory, time by part, beside a token model and the reference.

    python benchmarks/training.py                                        # the heads at K = 4, autoencoder, baseline
    python benchmarks/training.py --kinds energy --patch-sizes 1 2 4 8
    python benchmarks/training.py --reference CLONE --reference-python VENV/bin/python
    python benchmarks/training.py --shape paper --batch-size 4 --block-size 8192 --device cuda --dtype bfloat16 \
        --peak-tflops 989                                                # one H100 or H200

Every model is trained in a process of its own (training_worker.py), all on the same batch; the processes take turns,
and medians are compared. With --reference, a clone of the reference implementation trains the same weights in its own
interpreter (torch, transformers 4.43) with torch's fused attention. Memory is that of two steps, in a fresh process,
above what the process held before them.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from calm import CalmAutoencoder, CalmAutoencoderConfig, CalmConfig, CalmForCausalLM
from calm.checkpoints.reference import save_reference
from calm.evaluation.compute import compute

SHAPES = {
    # The study of the house: small enough for two cores.
    "study": {
        "backbone": {
            "vocab_size": 8192, "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 6,
            "num_attention_heads": 4, "max_position_embeddings": 8192,
        },
        "autoencoder": {"vocab_size": 8192, "hidden_size": 256, "intermediate_size": 640, "latent_size": 64},
    },
    # CALM-M of the paper.
    "paper": {
        "backbone": {
            "vocab_size": 128257, "hidden_size": 1024, "intermediate_size": 2752, "num_hidden_layers": 16,
            "num_attention_heads": 16, "max_position_embeddings": 8192,
        },
        "autoencoder": {},
    },
}  # fmt: skip
KINDS = ("energy", "flow", "diffusion", "autoencoder", "baseline")
REFERENCE_KINDS = ("energy", "autoencoder", "baseline")  # its other heads do not train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="study")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--patch-sizes", type=int, nargs="+", default=[4])
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--block-size", type=int, default=512)
    parser.add_argument("--memory-block-size", type=int, help="block of the memory measurement; default --block-size")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--compile", action="store_true", help="add our models through torch.compile")
    parser.add_argument("--peak-tflops", type=float, help="of the device; adds model FLOPs utilisation")
    parser.add_argument("--reference", type=Path, help="clone of the reference implementation")
    parser.add_argument("--reference-python", default=sys.executable, help="interpreter it runs in")
    parser.add_argument("--output", type=Path, help="write JSON here")
    options = parser.parse_args()

    rows = []
    for kind in options.kinds:
        for patch_size in options.patch_sizes if kind != "baseline" else [1]:
            print(f"{kind}, K = {patch_size} ...", file=sys.stderr)
            rows += measure(kind, patch_size, options)
    print_tables(rows, options)
    if options.output:
        about = {
            "options": {name: str(value) for name, value in vars(options).items()},
            "machine": torch.cuda.get_device_name() if options.device == "cuda" else platform.processor(),
            "torch": torch.__version__,
        }
        options.output.write_text(json.dumps({"about": about, "rows": rows}, indent=1), encoding="utf-8")


def measure(kind: str, patch_size: int, options) -> list[dict]:
    """One row for each implementation of one model."""
    with tempfile.TemporaryDirectory() as folder:
        flops = save_model(kind, patch_size, options, Path(folder))
        settings = [("ours", "eager", "")]
        if options.compile:
            settings.append(("ours, compiled", "compile", ""))
        if options.reference and kind in REFERENCE_KINDS:
            settings.append(("reference", "eager", str(options.reference)))

        def worker(mode: str, clone: str) -> "Worker":
            python = options.reference_python if clone else sys.executable
            return Worker([python, kind, folder, options.device, options.dtype, mode, clone])

        def save_batch(block_size: int) -> None:
            torch.manual_seed(0)
            ids = torch.randint(2, SHAPES[options.shape]["backbone"]["vocab_size"], (options.batch_size, block_size))
            torch.save(ids, Path(folder) / "batch.pt")

        save_batch(options.memory_block_size or options.block_size)
        memory = {}
        for name, mode, clone in settings:
            with worker(mode, clone) as one:
                memory[name] = one.ask("memory")
        save_batch(options.block_size)
        workers = {name: worker(mode, clone) for name, mode, clone in settings}
        seconds: dict[str, list[float]] = {name: [] for name in workers}
        for one in workers.values():
            one.ask("time 3")
        for _ in range(options.repeats):
            for name, one in workers.items():
                seconds[name] += one.ask("time 1")
        is_calm = kind not in ("autoencoder", "baseline")
        parts = workers["ours"].ask("parts") if is_calm else None
        for one in workers.values():
            one.close()
    tokens = options.batch_size * options.block_size
    return [
        {
            "kind": kind, "patch_size": patch_size, "implementation": name,
            "tokens_per_second": tokens / statistics.median(times),
            "tflops": flops * tokens / statistics.median(times) / 1e12,
            "memory": memory[name] | {"block_size": options.memory_block_size or options.block_size},
            "milliseconds_by_part": parts if name == "ours" else None,
        }
        for name, times in seconds.items()
    ]  # fmt: skip


def save_model(kind: str, patch_size: int, options, folder: Path) -> float:
    """Random weights in our layout and the reference's; returns the training FLOPs per token."""
    shape = SHAPES[options.shape]
    torch.manual_seed(0)
    if kind == "baseline":
        model = AutoModelForCausalLM.from_config(LlamaConfig(**shape["backbone"]))
    elif kind == "autoencoder":
        model = CalmAutoencoder(CalmAutoencoderConfig(patch_size=patch_size, **shape["autoencoder"]))
    else:
        config = CalmConfig(
            backbone_config=shape["backbone"],
            autoencoder_config=CalmAutoencoderConfig(patch_size=patch_size, **shape["autoencoder"]),
            head_config={"type": kind},
        )
        model = CalmForCausalLM(config)
    model.save_pretrained(folder / "ours")
    if kind in REFERENCE_KINDS and kind != "baseline":
        save_reference(model, folder / "reference")
    return compute(model, options.block_size // patch_size).training_flops_per_token


class Worker:
    """A process that trains one model on request."""

    def __init__(self, command: list[str]):
        python, *arguments = command
        script = str(Path(__file__).with_name("training_worker.py"))
        self.process = subprocess.Popen(
            [python, script, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.read()

    def ask(self, question: str):
        print(question, file=self.process.stdin, flush=True)
        return self.read()

    def read(self):
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{' '.join(self.process.args)} failed:\n{self.process.stderr.read()[-2000:]}")
        return json.loads(line)

    def close(self) -> None:
        self.process.communicate()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def print_tables(rows: list[dict], options) -> None:
    def other(one: dict, **changes) -> dict | None:
        wanted = {name: one[name] for name in ("kind", "patch_size", "implementation")} | changes
        return next((row for row in rows if all(row[name] == value for name, value in wanted.items())), None)

    def ratio(one: dict, against: dict | None) -> str:
        same = against is None or against is one
        return "" if same else f"{one['tokens_per_second'] / against['tokens_per_second']:.2f}"

    print(f"{options.batch_size} x {options.block_size} tokens a step, {options.device}, {options.dtype}\n")
    block_size = options.memory_block_size or options.block_size
    memory_head = f"peak memory above idle, {options.batch_size} x {block_size}"
    print(f"| model | K | | tokens/s | x token model | x reference | {memory_head} | of the reference's | FLOPs/s |")
    print("|---|---:|---|---:|---:|---:|---:|---:|---:|")
    for one in rows:
        reference = other(one, implementation="reference")
        above = one["memory"]["peak"] - one["memory"]["idle"]
        share = ""
        if reference is not None and reference is not one:
            share = f"{above / (reference['memory']['peak'] - reference['memory']['idle']):.2f}"
        use = f"{one['tflops']:.3g}T"
        if options.peak_tflops:
            use += f" ({100 * one['tflops'] / options.peak_tflops:.1f}%)"
        against_tokens = ratio(one, other(one, kind="baseline", patch_size=1, implementation="ours"))
        print(
            f"| {one['kind']} | {one['patch_size']} | {one['implementation']} | {one['tokens_per_second']:,.0f} | "
            f"{against_tokens} | {ratio(one, reference)} | {above / 2**20:,.0f} MiB | {share} | {use} |"
        )
    for one in rows:
        if one["milliseconds_by_part"]:
            parts = ", ".join(f"{name} {value:.0f}" for name, value in one["milliseconds_by_part"].items())
            print(f"\n{one['kind']}, K = {one['patch_size']}, milliseconds by part: {parts}")


if __name__ == "__main__":
    main()
