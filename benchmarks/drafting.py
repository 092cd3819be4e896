"""Tokens per second and tokens per verification of drafters, beside the target's own generation.

    python benchmarks/drafting.py TARGET DRAFTER... --prompts benchmarks/chat_prompts.txt --chat --max-new-tokens 128

All ways take turns on the same prompts, in one process; medians over the repeats are printed, and ratios to `generate`
of transformers. `prompt lookup` is transformers' own drafting without a model. `--check` compares the greedy texts.
Tokens per pass are also the predicted speed-up on a device where a pass over a draft takes as long as over one token.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from calm import load_drafter
from calm.generation.draft_length import AdaptiveDraftLength
from calm.generation.drafting import generate_with_drafter
from calm.generation.prompts import left_padded


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target")
    parser.add_argument("drafters", nargs="*")
    parser.add_argument("--prompts", type=Path, required=True, help="text file, one prompt per line")
    parser.add_argument("--chat", action="store_true", help="prompts are messages: apply the chat template")
    parser.add_argument("--num-prompts", type=int, default=16)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1])
    parser.add_argument(
        "--draft-tokens", nargs="+", default=["auto"], help="numbers, or auto: chosen by measured times and acceptance"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    target = AutoModelForCausalLM.from_pretrained(arguments.target, dtype=torch.float32, trust_remote_code=False).eval()
    tokenizer = AutoTokenizer.from_pretrained(arguments.target, trust_remote_code=False)
    lines = arguments.prompts.read_text(encoding="utf-8").split("\n")
    prompts = [encode(tokenizer, line, arguments.chat) for line in lines if line][: arguments.num_prompts]
    ways = {"generate": lambda batch, temperature: plain(target, batch, arguments.max_new_tokens, temperature)}
    ways["prompt lookup"] = lambda batch, temperature: plain(
        target, batch, arguments.max_new_tokens, temperature, prompt_lookup_num_tokens=4
    )
    for path in arguments.drafters:
        drafter = load_drafter(path).attach(target)
        for length in arguments.draft_tokens:
            ways[f"{Path(path).name}, {length}"] = drafted(target, drafter, length, arguments.max_new_tokens)
    rows = []
    for temperature in arguments.temperatures:
        for batch_size in arguments.batch_sizes:
            here = {name: way for name, way in ways.items() if batch_size == 1 or name != "prompt lookup"}
            rows += measure(here, prompts, temperature, batch_size, arguments)
    print(f"\n{'way':<28}{'T':>5}{'batch':>6}{'tokens/s':>10}{'ratio':>7}{'per pass':>9}")
    for row in rows:
        print(
            f"{row['way']:<28}{row['temperature']:>5g}{row['batch_size']:>6}{row['tokens_per_second']:>10.1f}"
            f"{row['ratio']:>7.2f}{row['tokens_per_verification']:>9.2f}"
        )
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(rows, indent=1), encoding="utf-8")


def encode(tokenizer, line: str, chat: bool) -> list[int]:
    if not chat:
        return tokenizer(line)["input_ids"]
    message = [{"role": "user", "content": line}]
    return tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=True)["input_ids"]


def plain(target, batch, max_new_tokens: int, temperature: float, **options):
    """Return new tokens of every row, passes of the target are not counted."""
    ids, mask = left_padded(batch, 0)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    out = target.generate(ids, attention_mask=mask, max_new_tokens=max_new_tokens, **sampling, **options)
    return trimmed(target, out[:, ids.shape[1] :]), float("nan")


def drafted(target, drafter, length: str, max_new_tokens: int):
    lengths: dict[int, AdaptiveDraftLength] = {}

    def run(batch, temperature):
        if length == "auto":  # measured for every batch size
            chosen = lengths.setdefault(len(batch), AdaptiveDraftLength(drafter.config.num_tokens))
        else:
            chosen = int(length)
        ids, mask = left_padded(batch, 0)
        result = generate_with_drafter(
            target, drafter, ids, mask if len(batch) > 1 else None, max_new_tokens=max_new_tokens,
            temperature=temperature, num_draft_tokens=chosen,
        )  # fmt: skip
        return trimmed(target, result.sequences[:, ids.shape[1] :]), result.statistics.tokens_per_verification

    return run


def trimmed(target, rows) -> list[list[int]]:
    end = target.generation_config.eos_token_id
    texts = rows.tolist()
    return [text[: text.index(end) + 1] if end in text else text for text in texts]


def measure(ways, prompts, temperature: float, batch_size: int, arguments) -> list[dict]:
    batches = [prompts[start : start + batch_size] for start in range(0, len(prompts), batch_size)]
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    accepted: dict[str, list[float]] = {name: [] for name in ways}
    texts: dict[str, list] = {}
    for _ in range(arguments.repeats):
        for name, way in ways.items():
            torch.manual_seed(0)
            start, made, per_pass = time.perf_counter(), [], []
            for batch in batches:
                new, verified = way(batch, temperature)
                made += new
                per_pass.append(verified)
            speeds[name].append(sum(map(len, made)) / (time.perf_counter() - start))
            accepted[name].append(statistics.mean(per_pass))
            texts[name] = made
            print(f"{name}: {speeds[name][-1]:.1f} tokens/s", flush=True)
    if arguments.check and temperature == 0:
        for name, made in texts.items():
            same = sum(a == b for a, b in zip(made, texts["generate"], strict=True))
            print(f"{name}: {same} of {len(made)} greedy texts identical to generate")
    base = statistics.median(speeds["generate"])
    rows = []
    for name in ways:
        per_pass = statistics.median(accepted[name])
        speed = statistics.median(speeds[name])
        row = {"way": name, "temperature": temperature, "batch_size": batch_size, "tokens_per_second": speed}
        rows.append(row | {"ratio": speed / base, "tokens_per_verification": per_pass})
    return rows


if __name__ == "__main__":
    main()
