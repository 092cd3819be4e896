"""Run by training.py, in our interpreter or the reference's: one model, trained on one batch, on request.

Reads lines from stdin and answers each with a line of JSON: `time N` seconds of N optimiser steps; `memory` the peak
resident (or device) memory of two steps and what was there before them, in bytes; `parts` milliseconds of an optimiser
step by part (our CALM).
"""

import json
import re
import statistics
import sys
import time
from pathlib import Path

import torch


def main() -> None:
    kind, folder, device, dtype, compiled, clone = sys.argv[1:7]
    plain = (load_reference if clone else load_ours)(kind, folder, clone).to(device).train()
    model = torch.compile(plain) if compiled == "compile" else plain
    ids = torch.load(f"{folder}/batch.pt").to(device)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=not clone)  # as either's Trainer does by default

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = loss_of(model, ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()  # waits for the device

    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        command, *arguments = line.split()
        if command == "time":
            seconds = []
            for _ in range(int(arguments[0])):
                started = time.perf_counter()
                step()
                seconds.append(time.perf_counter() - started)
            print(json.dumps(seconds), flush=True)
        elif command == "memory":
            print(json.dumps(peak_memory(step, device)), flush=True)
        else:
            with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
                parts = time_parts(plain, ids)
            print(json.dumps(parts | {"optimiser": milliseconds(lambda: update(parameters, optimizer))}), flush=True)


def update(parameters: list, optimizer: torch.optim.Optimizer) -> None:
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter) if parameter.grad is None else parameter.grad
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()


def time_parts(model, ids: torch.Tensor) -> dict[str, float]:
    """Forward and backward pass of each part by itself."""
    patch_size = model.config.patch_size
    with torch.no_grad():
        posterior = model.autoencoder.encode(ids[:, patch_size:])
        hidden = model(input_ids=ids).last_hidden_state[:, :-1]
    hidden.requires_grad_()

    def encode() -> None:
        with torch.no_grad():
            model.autoencoder.encode(ids[:, patch_size:])

    def backbone() -> None:
        model(input_ids=ids).last_hidden_state.sum().backward()

    def draw() -> None:
        model.head.sample(hidden, num_samples=model.head.config.num_samples).sum().backward()

    def head_loss() -> None:
        model.head.loss(hidden, posterior).loss.sum().backward()

    taken = {"targets": milliseconds(encode), "embedding and backbone": milliseconds(backbone)}
    whole = milliseconds(head_loss)
    if model.config.head_config.type != "energy":
        return taken | {"head": whole}
    drawn = milliseconds(draw)
    return taken | {"head": drawn, "energy score": max(0.0, whole - drawn)}


def milliseconds(part, repeats: int = 5) -> float:
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        part()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return 1000 * statistics.median(times[1:])


def load_ours(kind: str, folder: str, _: str) -> torch.nn.Module:
    from calm.checkpoints.loading import load_model
    from calm.training.loop.token_loss import use_linear_cross_entropy

    model = load_model(folder + "/ours")
    if kind == "baseline":
        use_linear_cross_entropy(model)
    return model


def load_reference(kind: str, folder: str, clone: str) -> torch.nn.Module:
    sys.path.insert(0, clone)
    if kind == "baseline":
        # What the reference trains as its baseline: transformers' Llama.
        from transformers import LlamaForCausalLM

        return LlamaForCausalLM.from_pretrained(folder + "/ours", attn_implementation="sdpa")
    from models.modeling_autoencoder import Autoencoder
    from models.modeling_energy import EnergyTransformer

    model = {"autoencoder": Autoencoder, "energy": EnergyTransformer}[kind]
    return model.from_pretrained(folder + "/reference", attn_implementation="sdpa")


def loss_of(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    output = model(input_ids=ids, labels=ids)
    return output.loss if hasattr(output, "loss") else output[0]


def peak_memory(step, device: str) -> dict:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        idle = torch.cuda.memory_allocated()
        step()
        step()
        return {"idle": idle, "peak": torch.cuda.max_memory_allocated()}
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again
    idle = resident("VmRSS")
    step()  # here the optimiser's moments are made,
    step()  # there all are held at once
    return {"idle": idle, "peak": resident("VmHWM")}


def resident(name: str) -> int:
    return 1024 * int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


if __name__ == "__main__":
    main()
