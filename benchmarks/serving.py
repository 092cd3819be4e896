"""`calm serve` under load: throughput and latency at 1 to 64 clients, and whether every answer is the right one.

    python benchmarks/serving.py                                   # random weights of the study shape
    python benchmarks/serving.py --model runs/calm --baseline runs/baseline --temperature 0.5
    python benchmarks/serving.py --check [--batch-invariant]       # 1000 requests of 64 clients against single runs

Compared are the engine with a batch, the same engine with one sequence at a time, the same engine with the token
model, and a plain loop: FastAPI around transformers' `generate` on the token model, one request after the other. Each
server is a process of its own; the clients are in this one and stream. Every client asks again as soon as it is
answered.
"""

import argparse
import asyncio
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx2 as httpx
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from calm import CalmAutoencoder, CalmAutoencoderConfig, CalmForCausalLM
from calm.checkpoints.loading import load_language_model
from calm.data.corpus import stdlib_documents
from calm.data.tokenizer import load_tokenizer, train_tokenizer
from calm.generation.completions import complete
from calm.generation.sampling_params import SamplingParams

BACKBONE = {
    "vocab_size": 8192, "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 6, "num_attention_heads": 4,
    "max_position_embeddings": 2048, "eos_token_id": None, "bos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
PROMPTS = ["def read(self, size=-1):\n", "import os\n", "class Error(Exception):\n    ", "# ", ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a trained CALM; default random weights, K = 4")
    parser.add_argument("--baseline", help="a token model; default random weights of the same backbone")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--tokens", type=int, default=64, help="of every answer")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=4, help="answers per client, at least 8 in all")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--check", action="store_true", help="compare 1000 texts with those of single runs")
    parser.add_argument("--batch-invariant", action="store_true", help="start the servers with this option")
    parser.add_argument("--output", type=Path, default=Path("serving.json"))
    parser.add_argument("--plain-server", nargs=2, metavar=("MODEL", "PORT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.plain_server:
        plain_server(*arguments.plain_server)
        return
    with tempfile.TemporaryDirectory() as name:
        model, baseline = arguments.model, arguments.baseline
        if model is None or baseline is None:
            drafts = random_models(Path(name), ends=arguments.check)
            model, baseline = model or drafts[0], baseline or drafts[1]
        result = check(model, arguments.batch_invariant) if arguments.check else load(model, baseline, arguments)
    machine = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__}
    arguments.output.write_text(json.dumps(machine | result, indent=1), encoding="utf-8")
    print(f"written: {arguments.output}")


def random_models(folder: Path, ends: bool) -> tuple[str, str]:
    """A CALM and a token model of one backbone, with a tokenizer; where speed is measured, texts never end early."""
    tokenizer = train_tokenizer((text for _, text in stdlib_documents()), BACKBONE["vocab_size"])
    torch.manual_seed(0)
    sizes = {"vocab_size": 8192, "hidden_size": 256, "intermediate_size": 640, "latent_size": 64}
    end = tokenizer.eos_token_id if ends else None
    autoencoder = CalmAutoencoder(CalmAutoencoderConfig(**sizes, eos_token_id=end, pad_token_id=0))
    calm = CalmForCausalLM.from_autoencoder(autoencoder, BACKBONE)
    for parameter in calm.head.parameters():
        if parameter.abs().sum() == 0:  # a new head gives one and the same latent
            torch.nn.init.normal_(parameter, std=0.02)
    token_model = LlamaForCausalLM(LlamaConfig(**BACKBONE))
    token_model.generation_config.eos_token_id = None
    for name, each in (("calm", calm), ("baseline", token_model)):
        each.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return str(folder / "calm"), str(folder / "baseline")


def load(model: str, baseline: str, arguments: argparse.Namespace) -> dict:
    most = max(arguments.clients)
    serve = [sys.executable, "-m", "calm.cli.main", "serve"]
    size = ["--context", "1024", "--max-queue", str(2 * most)]
    size += ["--batch-invariant"] * arguments.batch_invariant
    servers = {
        "CALM, batched": [*serve, model, "--max-batch", str(most), *size],
        "CALM, one at a time": [*serve, model, "--max-batch", "1", *size],
        "token model, batched": [*serve, baseline, "--max-batch", str(most), *size],
        "token model, plain loop": [sys.executable, __file__, "--plain-server", baseline],
    }
    rates: dict[tuple[str, int], list[dict]] = {}
    for repeat in range(arguments.repeats):
        for name, command in servers.items():
            with Server(command) as address:
                asyncio.run(clients_of(address, 1, 2, arguments))  # warm
                for count in arguments.clients:
                    total = max(8, arguments.rounds * count) if name != "token model, plain loop" else max(4, count)
                    measured = asyncio.run(clients_of(address, count, total, arguments))
                    rates.setdefault((name, count), []).append(measured)
                    print(f"{repeat + 1}: {name}, {count} clients: {measured['tokens_per_second']:.0f} tokens/s",
                          file=sys.stderr)  # fmt: skip
    rows = []
    columns = ("tokens/s", "x 1 client", "x plain loop", "first p50", "first p95", "all p50", "all p95")
    print(f"\n{'':26}{'clients':>8}" + "".join(f"{column:>13}" for column in columns) + "   (ms)")
    of = {each: statistics.median(run["tokens_per_second"] for run in runs) for each, runs in rates.items()}
    for (name, count), runs in rates.items():
        row = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        row |= {
            "server": name, "clients": count,
            "to_one_client": row["tokens_per_second"] / of[name, arguments.clients[0]],
            "to_plain_loop": row["tokens_per_second"] / of["token model, plain loop", count],
        }  # fmt: skip
        rows.append(row)
        print(
            f"{name:26}{count:>8}{row['tokens_per_second']:>13.0f}{row['to_one_client']:>13.2f}"
            f"{row['to_plain_loop']:>13.2f}{row['first_p50']:>13.0f}{row['first_p95']:>13.0f}"
            f"{row['all_p50']:>13.0f}{row['all_p95']:>13.0f}"
        )
    settings = {"tokens": arguments.tokens, "temperature": arguments.temperature, "repeats": arguments.repeats}
    return settings | {"rows": rows, "runs": [{"server": s, "clients": c, "runs": r} for (s, c), r in rates.items()]}


async def clients_of(address: str, count: int, total: int, arguments: argparse.Namespace) -> dict:
    """Let so many clients ask until there are ``total`` answers."""
    numbers = iter(range(total))
    firsts, alls, tokens = [], [], 0

    async def client(http: httpx.AsyncClient) -> None:
        nonlocal tokens
        for number in numbers:
            body = {"prompt": PROMPTS[number % len(PROMPTS)], "max_tokens": arguments.tokens, "seed": number,
                    "temperature": arguments.temperature, "stream": True}  # fmt: skip
            start, first = time.perf_counter(), None
            async with http.stream("POST", f"{address}/v1/completions", json=body) as answer:
                assert answer.status_code == 200, await answer.aread()
                async for line in answer.aiter_lines():
                    if line.startswith("data: {"):
                        first = first or time.perf_counter()
                        tokens += json.loads(line[6:])["calm"]["tokens"]
            firsts.append(first - start)
            alls.append(time.perf_counter() - start)

    start = time.perf_counter()
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(timeout=600, limits=limits) as http:
        await asyncio.gather(*(client(http) for _ in range(count)))
    seconds = time.perf_counter() - start
    return {
        "tokens_per_second": tokens / seconds, "requests_per_second": total / seconds,
        **{f"{name}_{label}": 1000 * quantile(values, share)
           for name, values in (("first", firsts), ("all", alls)) for label, share in (("p50", 0.5), ("p95", 0.95))},
    }  # fmt: skip


def quantile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


class Server:
    """A server in a process, as long as it is needed."""

    def __init__(self, command: list[str]):
        plain = "--plain-server" in command
        self.command = [*command, "0"] if plain else [*command, "--port", "0"]

    def __enter__(self) -> str:
        self.process = subprocess.Popen(self.command, stdout=subprocess.PIPE, text=True)
        for line in self.process.stdout:
            if line.startswith("http://"):
                return line.split()[0]
        raise RuntimeError(f"no server came of {self.command}")

    def __exit__(self, *error: object) -> None:
        self.process.terminate()
        self.process.wait()


def plain_server(model: str, port: str) -> None:
    """What one writes first: a lock, `generate`, the answer as one event."""
    import socket

    import uvicorn
    from fastapi import FastAPI, Request
    from fastapi.responses import Response

    app, lock = FastAPI(), asyncio.Lock()
    tokenizer, token_model = load_tokenizer(model), load_language_model(model)

    def answer(body: dict) -> str:
        ids = tokenizer(body["prompt"] or "\n", return_tensors="pt")["input_ids"]
        torch.manual_seed(body["seed"])
        out = token_model.generate(
            ids, max_new_tokens=body["max_tokens"], do_sample=True, top_k=0, temperature=body["temperature"]
        )
        text = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        return json.dumps({"choices": [{"text": text}], "calm": {"tokens": out.shape[1] - ids.shape[1]}})

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        body = await request.json()
        async with lock:
            return Response(f"data: {await asyncio.to_thread(answer, body)}\n\n", media_type="text/event-stream")

    listener = socket.create_server(("127.0.0.1", int(port)))
    print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
    uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listener])


def check(model: str, batch_invariant: bool) -> dict:
    """1,000 requests of 64 clients at once, and the same requests one after the other: is every text the same?

    The texts are also compared with those of `generate`, which rounds otherwise in batch-invariant steps.
    """
    settings = [{"temperature": 1.0}, {"temperature": 0.5, "num_candidates": 32}]

    def body(number: int) -> dict:
        return {"prompt": PROMPTS[number % len(PROMPTS)], "max_tokens": 8 + number % 25, "seed": number,
                **settings[number % len(settings)]}  # fmt: skip

    async def texts_of(address: str, num_clients: int) -> dict[int, str]:
        texts, numbers = {}, iter(range(1000))

        async def client(http: httpx.AsyncClient) -> None:
            for number in numbers:
                response = await http.post("/v1/completions", json=body(number))
                texts[number] = response.json()["choices"][0]["text"]

        async with httpx.AsyncClient(base_url=address, timeout=600, limits=httpx.Limits(max_connections=None)) as http:
            await asyncio.gather(*(client(http) for _ in range(num_clients)))
        return texts

    command = [sys.executable, "-m", "calm.cli.main", "serve", model, "--max-batch", "64", "--context", "1024"]
    seconds = {}
    with Server([*command, *["--batch-invariant"] * batch_invariant]) as address:
        texts = {}
        for num_clients in (64, 1):
            start = time.perf_counter()
            texts[num_clients] = asyncio.run(texts_of(address, num_clients))
            seconds[num_clients] = time.perf_counter() - start
    calm, tokenizer = load_language_model(model), load_tokenizer(model)
    generated = {}
    for number in range(1000):
        asked = body(number)
        one = SamplingParams(
            asked["temperature"], num_candidates=asked.get("num_candidates"), max_new_tokens=asked["max_tokens"],
            seed=asked["seed"],
        )  # fmt: skip
        generated[number] = complete(calm, tokenizer, [asked["prompt"]], one)[0]["text"]
    different = {
        name: [number for number in range(1000) if other[number] != texts[64].get(number)]
        for name, other in (("one_client", texts[1]), ("generate", generated))
    }
    print(
        f"1000 requests of 64 clients in {seconds[64]:.0f} s (1 client: {seconds[1]:.0f} s): {len(texts[64])} answers, "
        f"{len(different['one_client'])} not the text of the request alone, {len(different['generate'])} not that of "
        "generate"
    )
    return {"answers": len(texts[64]), "different": different, "seconds": seconds}


if __name__ == "__main__":
    main()
