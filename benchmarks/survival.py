"""Training killed with kill -9 at random moments and started again: is it bit for bit the uninterrupted run?

    python benchmarks/survival.py                     # 20 kills, some minutes
    python benchmarks/survival.py --kills 5 --seed 1

A tiny CALM is trained on the embedded corpus for two and a half passes over its data, with gradient accumulation and a
checkpoint every other step. Each trial starts `calm train`, kills it once, and lets the same command finish: after a
random time for two trials of three, and while a checkpoint is being written for the third. Weights, optimiser,
scheduler and records must then equal those of the run that nothing happened to.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file

from calm.data.corpus import stdlib_documents
from calm.data.prepare import prepare
from calm.data.tokenizer import train_tokenizer
from calm.training.loop.metrics_log import read_metrics
from calm.training.recipe.recipe import Recipe
from calm.training.run import train

STEPS = 40
TIMES = ("tokens_per_second", "eval_runtime", "eval_samples_per_second", "eval_steps_per_second")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("survival.json"))
    arguments = parser.parse_args()
    chance = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe = make_recipe(folder)
        start = time.perf_counter()
        subprocess.run(command(recipe, folder / "whole"), check=True, capture_output=True)
        seconds = time.perf_counter() - start
        print(f"uninterrupted: {STEPS} steps in {seconds:.0f} s")
        trials = []
        for number in range(arguments.kills):
            output = folder / f"trial-{number}"
            writing = number % 3 == 2
            steps, inside = kill_once(recipe, output, chance, seconds, writing)
            subprocess.run(command(recipe, output), check=True, capture_output=True)
            differences = compare(folder / "whole", output)
            trials.append({"kind": "writing" if writing else "time", "steps": steps, "inside": inside,
                           "differences": differences})  # fmt: skip
            where = "inside a checkpoint" if inside else f"after step {steps}" if steps else "before the first step"
            print(f"{number + 1:3}: killed {where}: {', '.join(differences) or 'identical'}", flush=True)
            shutil.rmtree(output)
    same = sum(not trial["differences"] for trial in trials)
    print(f"{same} of {len(trials)} identical to the uninterrupted run")
    arguments.output.write_text(json.dumps({"identical": same, "trials": trials}, indent=1), encoding="utf-8")
    sys.exit(same != len(trials))


def make_recipe(folder: Path) -> Path:
    """Data, an autoencoder, and the recipe of a CALM of 16 blocks a pass."""
    texts = [text for _, text in stdlib_documents()][:40]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text[:4000]}) + "\n" for text in texts))
    prepare([folder / "text.jsonl"], train_tokenizer(texts, 512), folder / "data")
    common = {"data": {"train": str(folder / "data"), "block_size": 256}, "seed": 5}
    sizes = {"hidden_size": 32, "intermediate_size": 64}
    steps = {"max_steps": 20, "per_device_train_batch_size": 4, "use_cpu": True, "report_to": "none"}
    autoencoder = common | {
        "stage": "autoencoder", "output_dir": str(folder / "autoencoder"), "training": steps,
        "model": sizes | {"patch_size": 4, "latent_size": 16},
    }  # fmt: skip
    train(Recipe.from_dict(autoencoder))
    blocks = json.loads((folder / "data" / "manifest.json").read_text())["num_tokens"] // 256
    backbone = sizes | {"num_hidden_layers": 2, "num_attention_heads": 2}
    accumulation = max(1, blocks * 5 // 2 // STEPS // 2)
    calm = common | {
        "stage": "calm", "output_dir": "", "model": {"autoencoder": str(folder / "autoencoder"), "backbone": backbone},
        "training": steps | {
            "max_steps": STEPS, "per_device_train_batch_size": 2, "gradient_accumulation_steps": accumulation,
            "save_steps": 2, "logging_steps": 3, "warmup_steps": 10,
        },
    }  # fmt: skip
    print(f"{blocks} blocks, {STEPS * 2 * accumulation / blocks:.1f} passes, accumulation over {accumulation}")
    path = folder / "calm.yaml"
    path.write_text(yaml.safe_dump(calm))
    return path


def command(recipe: Path, output: Path) -> list[str]:
    return [sys.executable, "-m", "calm.cli.main", "train", str(recipe), f"output_dir={output}"]


def kill_once(recipe: Path, output: Path, chance: random.Random, seconds: float, writing: bool) -> tuple[int, bool]:
    """The last step with a checkpoint when the run was killed, and whether one was being written."""
    process = subprocess.Popen(command(recipe, output), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    if writing:
        target = chance.randrange(1, STEPS // 2 - 1)
        while process.poll() is None and not (newest(output) >= 2 * target and unsealed(output)):
            time.sleep(0.0002)
        time.sleep(chance.uniform(0, 0.005))
    else:
        time.sleep(chance.uniform(0.4, 0.95) * seconds)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return newest(output), bool(unsealed(output))


def newest(output: Path) -> int:
    """The last step with a whole checkpoint."""
    sealed = (output / "checkpoints").glob("checkpoint-*/checkpoint_manifest.json")
    return max([int(path.parent.name.split("-")[1]) for path in sealed], default=0)


def unsealed(output: Path) -> list[Path]:
    return [
        path
        for path in (output / "checkpoints").glob("checkpoint-*")
        if not (path / "checkpoint_manifest.json").exists()
    ]


def compare(whole: Path, other: Path) -> list[str]:
    """What differs."""
    differences = []
    first, second = load_file(whole / "model.safetensors"), load_file(other / "model.safetensors")
    if first.keys() != second.keys() or not all(torch.equal(first[name], second[name]) for name in first):
        differences.append("weights")
    for name in ("optimizer.pt", "scheduler.pt"):
        states = [torch.load(run / "checkpoints" / f"checkpoint-{STEPS}" / name) for run in (whole, other)]
        if not same(*states):
            differences.append(name)
    if records(whole) != records(other):
        differences.append("records")
    return differences


def same(first: object, second: object) -> bool:
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[name], second[name]) for name in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


def records(run: Path) -> list[dict]:
    return [{name: value for name, value in record.items() if name not in TIMES} for record in read_metrics(run)]


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    main()
