"""Ten minutes on one GPU: are the results right, and how fast is everything.

    python benchmarks/gpu.py -o gpu.json                    # one H200: at most 9 minutes
    python benchmarks/gpu.py -o gpu.json --minutes 4 --only correctness training
    python benchmarks/gpu.py -o gpu.json --tiny --device cpu  # every row once, at a size that means nothing
    python benchmarks/gpu.py --predict                       # predicted times from counted launches; needs no GPU

Correctness comes first: the loss and the gradient of every head against the CPU in float64, generation with compiled
steps against generation without for one seed, and tensors recorded from the reference implementation. Then the table:
training (tokens/s, share of the peak, peak memory) and generation (tokens/s). A row that fails is recorded with its
error, and the others follow. The file is written anew after every row, so that a run that is cut keeps what it has;
rows that are in the file already are not measured again.
"""

import argparse
import copy
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from calm import CalmAutoencoderConfig, CalmConfig, CalmForCausalLM
from calm.compat.masking import no_packed_sequences
from calm.evaluation.compute import compute
from calm.functional.rng import RowStreams
from calm.models.configuration_codes import TokenCodesConfig
from calm.training.loop.token_loss import use_linear_cross_entropy
from calm.utils.files import write_whole

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

PEAK_TFLOPS = 989  # of an H200, dense bfloat16, as its data sheet has it
HEADS = ("energy", "flow", "diffusion", "categorical_flow")
_M = {"hidden_size": 1024, "intermediate_size": 2752, "num_hidden_layers": 16, "num_attention_heads": 16}
_L = _M | {"hidden_size": 1536, "intermediate_size": 4096}
_TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES = {"M": _M, "L": _L, "tiny": _TINY}
Row = tuple[str, Callable[[], dict[str, Any]]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, help="JSON file; rows it has are not measured again")
    parser.add_argument("--minutes", type=float, default=9.0, help="no row starts later than this")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--tiny", action="store_true", help="models of no size, one repeat: whether everything runs")
    parser.add_argument("--predict", action="store_true", help="print the predictions and end")
    options = parser.parse_args()
    if options.predict:
        return print_predictions()
    started = time.monotonic()
    results = _read(options.output)
    results["about"] = {
        "device": torch.cuda.get_device_name() if options.device == "cuda" else options.device,
        "torch": torch.__version__,
        "tiny": options.tiny,
    }
    for section in options.only:
        rows = results.setdefault(section, {})
        for name, measure in SECTIONS[section](options):
            if name in rows and "error" not in rows[name]:
                continue
            if time.monotonic() - started > 60 * options.minutes:
                print(f"no time is left for {section}: {name}", flush=True)
                continue
            rows[name] = _measured(measure)
            print(f"{section:12s} {name:44s} {_line(rows[name])}", flush=True)
            if options.output:
                write_whole(options.output, json.dumps(results, indent=1))
    return None


def _read(path: Path | None) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path is not None and path.exists() else {}


def _measured(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return measure()
    except Exception as error:  # the other rows are still worth their time
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error!s:.300}"}
    finally:
        torch._dynamo.reset()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _line(row: dict[str, Any]) -> str:
    values = (f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in row.items())
    return ", ".join(values)


# --- models -----------------------------------------------------------------------------------------------------------


def new_model(kind: str, size: str, vocab_size: int = 128257, mtp: bool = False) -> Any:
    """Return a language model of random weights: a token model for ``baseline``, else a CALM with that head."""
    torch.manual_seed(0)
    backbone = SIZES[size] | {"vocab_size": vocab_size, "max_position_embeddings": 8192}
    if kind == "baseline":
        model: Any = LlamaForCausalLM(LlamaConfig(**backbone))
        return model
    small = {"hidden_size": 16, "intermediate_size": 24, "latent_size": 8} if size == "tiny" else {}
    if kind == "categorical_flow":
        autoencoder: Any = TokenCodesConfig(vocab_size=vocab_size, patch_size=4, code_size=4 if size == "tiny" else 32)
    else:
        autoencoder = CalmAutoencoderConfig(vocab_size=vocab_size, **small)
    head = {"type": kind} | ({"num_samples": 4, "num_target_samples": 8} if kind == "energy" and small else {})
    weight = {"mtp_weight": 1.0, "mtp_type": "autoregressive"} if mtp else {}
    config = CalmConfig(backbone_config=backbone, autoencoder_config=autoencoder, head_config=head, **weight)
    return CalmForCausalLM(config)


# --- correctness ------------------------------------------------------------------------------------------------------


def correctness(options: Any) -> Iterator[Row]:
    for head in HEADS:
        yield f"loss and gradient, {head}", partial(_against_the_cpu, head, options.device)
    yield "compiled generation, energy", partial(_compiled_equals_eager, "energy", options.device, {})
    direct = {"sampler": "direct"}
    yield (
        "compiled generation, categorical_flow",
        partial(_compiled_equals_eager, "categorical_flow", options.device, direct),
    )
    yield "golden tensors", partial(_golden, options.device)


def _against_the_cpu(head: str, device: str) -> dict[str, Any]:
    """Compare float32 on the device with float64 on the CPU, for the same weights, tokens and random numbers."""
    exact = new_model(head, "tiny", vocab_size=64).double().train()
    for parameter in exact.parameters():  # no layer that starts at zero hides a fault
        if parameter.dim() == 2 and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    model = copy.deepcopy(exact).float().to(device)
    ids = torch.randint(2, 64, (4, 32))
    losses = []
    for each in (exact, model):
        on = next(each.parameters()).device
        streams = RowStreams(torch.arange(4, device=on))
        loss = each(input_ids=ids.to(on), labels=ids.to(on), generator=streams).loss
        loss.backward()
        losses.append(loss.item())
    errors = []
    for one, other in zip(exact.parameters(), model.parameters(), strict=True):
        if one.grad is not None and one.grad.norm() > 0:
            errors.append(((other.grad.cpu().double() - one.grad).norm() / one.grad.norm()).item())
    result = {"loss_error": abs(losses[1] / losses[0] - 1), "largest_gradient_error": max(errors)}
    return result | {"passed": result["loss_error"] < 1e-3 and result["largest_gradient_error"] < 2e-2}


def _compiled_equals_eager(head: str, device: str, arguments: dict[str, Any]) -> dict[str, Any]:
    model = new_model(head, "tiny", vocab_size=64).to(device).eval()
    model.generation_config.eos_token_id = None
    ids = torch.randint(2, 64, (2, 12), device=device)
    texts = [
        model.generate(
            ids, max_new_tokens=64, generator=torch.Generator(device).manual_seed(0), compile=compile, **arguments
        )
        for compile in (False, True)
    ]
    return {"passed": torch.equal(*texts)}


def _golden(device: str) -> dict[str, Any]:
    """Compare hidden states and samples of a recorded model of the reference implementation with its record."""
    import golden

    recorded = golden.load("energy_k4/io")
    model = golden.language_model("energy_k4").to(device)
    with torch.no_grad():
        hidden = model(recorded["input_ids"].to(device)).last_hidden_state[:, :-1].cpu()
        latents = model.head.sample(recorded["head_hidden"].to(device), recorded["head_noise"].to(device)).cpu()
    errors = {}
    for name, value in (("hidden_states", hidden), ("head_out", latents)):
        errors[name] = ((value - recorded[name]).abs().max() / recorded[name].abs().max()).item()
    return errors | {"passed": max(errors.values()) < 1e-4}


# --- training ---------------------------------------------------------------------------------------------------------


def training(options: Any) -> Iterator[Row]:
    models = [("energy", "M"), ("categorical_flow", "M"), ("baseline", "M"), ("energy", "L")]
    for kind, size in [("energy", "tiny"), ("baseline", "tiny")] if options.tiny else models:
        for compiled in (False, True):
            name = f"{kind}, {size}, {'compiled' if compiled else 'eager'}"
            yield name, partial(_training, kind, size, compiled, options)


def _training(kind: str, size: str, compiled: bool, options: Any) -> dict[str, Any]:
    vocab_size = 64 if options.tiny else 128257
    model = new_model(kind, size, vocab_size).to(options.device).train()
    if kind == "baseline":
        use_linear_cross_entropy(model)
    batch_size, block_size = (2, 16) if options.tiny else (16, 8192) if kind != "baseline" else (8, 2048)
    ids = torch.randint(2, vocab_size, (batch_size, block_size), device=options.device)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=options.device == "cuda")
    backend = "aot_eager" if options.tiny else "inductor"
    run = torch.compile(model, backend=backend, dynamic=False) if compiled else model

    def step() -> None:
        streams = {} if kind == "baseline" else {"generator": RowStreams(torch.arange(batch_size, device=ids.device))}
        with no_packed_sequences(), torch.autocast(options.device, torch.bfloat16, enabled=not options.tiny):
            loss = run(input_ids=ids, labels=ids, **streams).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    started = time.perf_counter()
    step()
    _wait(options.device)
    first = time.perf_counter() - started
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = _median_seconds(step, options, repeats=8)
    tokens = batch_size * block_size / seconds
    patch_size = 1 if kind == "baseline" else 4
    flops = compute(model, block_size // patch_size).training_flops_per_token
    result = {"tokens_per_second": tokens, "mfu": tokens * flops / (PEAK_TFLOPS * 1e12), "first_step_seconds": first}
    if options.device == "cuda":
        result["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return result


def _median_seconds(step: Callable[[], Any], options: Any, repeats: int) -> float:
    times = []
    for _ in range(1 if options.tiny else repeats):
        started = time.perf_counter()
        step()
        _wait(options.device)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


# --- generation -------------------------------------------------------------------------------------------------------


def generation(options: Any) -> Iterator[Row]:
    size, batches = ("tiny", (1,)) if options.tiny else ("M", (1, 8, 64))
    ways: list[tuple[str, dict[str, Any]]] = [
        ("energy", {"temperature": 1.0}),
        ("energy", {"temperature": 0.5, "sampler": "batch"}),
        ("energy", {"sampler": "mtp", "temperature": 0.5}),
        ("categorical_flow", {"sampler": "direct", "temperature": 1.0}),
    ]
    for batch_size in batches:
        for kind, arguments in ways:
            for compiled in (False, True):
                how = f"{arguments.get('sampler', 'head')}, T {arguments['temperature']}"
                name = f"{kind}, {how}, batch {batch_size}, {'compiled' if compiled else 'eager'}"
                yield name, partial(_generation, kind, size, batch_size, compiled, arguments, options)
        for compiled in (False, True):
            name = f"baseline, batch {batch_size}, {'static cache, compiled' if compiled else 'eager'}"
            yield name, partial(_generation, "baseline", size, batch_size, compiled, {}, options)


def _generation(
    kind: str, size: str, batch_size: int, compiled: bool, arguments: dict[str, Any], options: Any
) -> dict[str, Any]:
    vocab_size, new_tokens = (64, 8) if options.tiny else (128257, 256)
    model = new_model(kind, size, vocab_size, mtp=arguments.get("sampler") == "mtp")
    model = model.to(options.device, torch.float32 if options.tiny else torch.bfloat16).eval()
    model.generation_config.eos_token_id = None
    ids = torch.randint(2, vocab_size, (batch_size, 64), device=options.device)
    if kind == "baseline":
        how = {"cache_implementation": "static"} if compiled and not options.tiny else {}
        run = partial(model.generate, ids, max_new_tokens=new_tokens, do_sample=True, pad_token_id=0, **how)
    else:
        generator = torch.Generator(options.device)
        compile = compiled and not options.tiny
        run = partial(model.generate, ids, max_new_tokens=new_tokens, generator=generator, compile=compile, **arguments)
    run()
    return {"tokens_per_second": batch_size * new_tokens / _median_seconds(run, options, repeats=3)}


SECTIONS: dict[str, Callable[[Any], Iterator[Row]]] = {
    "correctness": correctness,
    "training": training,
    "generation": generation,
}


# --- predictions ------------------------------------------------------------------------------------------------------

LAUNCH_SECONDS, KERNEL_SECONDS, REPLAY_SECONDS = 7e-6, 2e-6, 10e-6
FLOPS_PER_SECOND, BYTES_PER_SECOND = 0.8 * 790e12, 0.85 * 4.8e12


def predicted_seconds(launches: float, num_bytes: float, flops: float, captured: float = 0) -> float:
    """Return the time of some work: what the host needs to start it or what the device needs, whichever is longer.

    Args:
        launches: kernels that the host starts one by one.
        captured: kernels in a CUDA graph.
        num_bytes: bytes that the device reads and writes.
    """
    host = launches * LAUNCH_SECONDS + (REPLAY_SECONDS if captured else 0)
    device = max(num_bytes / BYTES_PER_SECOND, flops / FLOPS_PER_SECOND, (launches + captured) * KERNEL_SECONDS)
    return max(host, device)


def launches_per_patch(kind: str, batch_size: int, **arguments: Any) -> tuple[float, float, float]:
    """Count launches, host reads and uploads of one patch, with the layers of CALM-M and small widths."""
    from counting.instrument import PRETEND, count

    SIZES["narrow"] = _TINY | {"num_hidden_layers": _M["num_hidden_layers"]}
    model = new_model(kind, "narrow", vocab_size=64).eval().to(PRETEND)
    model.generation_config.eos_token_id = None
    ids, found = torch.randint(2, 64, (batch_size, 16)), []
    for patches in (4, 8):
        with count() as counts:
            model.generate(ids, max_new_tokens=4 * patches, generator=torch.Generator().manual_seed(0), **arguments)
        found.append((counts.launches, counts.host_reads, counts.uploads))
    few, many = found
    return tuple((after - before) / 4 for before, after in zip(few, many, strict=True))  # type: ignore[return-value]


def weight_bytes(kind: str, size: str) -> float:
    """Return the bytes that a patch reads at least: all weights but the encoder's, in bfloat16."""
    with torch.device("meta"):
        model = new_model(kind, size)
    parts = [model.backbone.layers, model.patch_embedding, model.head]
    parts += [model.autoencoder.decoder, model.autoencoder.embed_tokens] if kind == "energy" else []
    return 2.0 * sum(parameter.numel() for part in parts for parameter in part.parameters())


def print_predictions() -> None:
    """Print the model's times of a patch of CALM-M: now, and as one captured step."""
    print("| head | sampler | batch | launches | host reads | eager | captured |")
    print("|---|---|---:|---:|---:|---:|---:|")
    for batch_size in (1, 64):
        for kind, arguments in (("energy", {}), ("energy", {"temperature": 0.5})):
            launches, reads, _ = launches_per_patch(kind, batch_size, **arguments)
            num_bytes = weight_bytes(kind, "M")
            eager = 1e3 * predicted_seconds(launches, num_bytes, 0)
            captured = 1e3 * predicted_seconds(0, num_bytes, 0, captured=launches)
            sampler = f"T = {arguments.get('temperature', 1)}"
            print(
                f"| {kind} | {sampler} | {batch_size} | {launches:.0f} | {reads:.0f} | {eager:.2f} ms | "
                f"{captured:.2f} ms |"
            )


if __name__ == "__main__":
    main()
