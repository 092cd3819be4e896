"""Training speed by the wait policy of OpenMP, on a free machine and beside other load.

    python benchmarks/threads.py                     # no load, and 4 busy processes per core
    python benchmarks/threads.py --load 0 8 --repeats 5 --output threads.json

Every measurement is a process of its own, since OpenMP reads its settings once: it trains the quickstart's CALM on a
random batch and counts tokens per second of wall-clock time. The settings take turns; medians are printed, with the
range. The load is that many processes that compute without a pause. `calm` sets the passive policy (see
calm/cli/environment.py); the table is the reason.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

SETTINGS = {
    "default": {},
    "passive": {"OMP_WAIT_POLICY": "passive", "KMP_BLOCKTIME": "0"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
VARIABLES = ("OMP_WAIT_POLICY", "KMP_BLOCKTIME", "KMP_LIBRARY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS")
BUSY = "while True: pass"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--load", type=int, nargs="+", default=[0, 4 * (os.cpu_count() or 1)], help="busy processes")
    parser.add_argument("--seconds", type=float, default=5.0, help="of a measurement")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help="write JSON here")
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(tokens_per_second(options.seconds)))
        return

    print(f"load average before the start: {os.getloadavg()[0]:.2f}", file=sys.stderr)
    rows = []
    for load in options.load:
        rates: dict[str, list[float]] = {name: [] for name in SETTINGS}
        busy = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(load)]
        try:
            for _ in range(options.repeats):
                for name, variables in SETTINGS.items():
                    rates[name].append(measure(variables, options.seconds))
        finally:
            for process in busy:
                process.kill()
                process.wait()
        rows += [
            {"busy_processes": load, "setting": name, "tokens_per_second": sorted(several)}
            for name, several in rates.items()
        ]
    print("| busy processes | setting | tokens/s, median | lowest | highest |\n|---:|---|---:|---:|---:|")
    for row in rows:
        several = row["tokens_per_second"]
        print(
            f"| {row['busy_processes']} | {row['setting']} | {statistics.median(several):,.0f} | {several[0]:,.0f} | "
            f"{several[-1]:,.0f} |"
        )
    if options.output:
        about = {
            "options": {name: str(value) for name, value in vars(options).items()},
            "machine": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "load_average": os.getloadavg(),
        }
        options.output.write_text(json.dumps(about | {"rows": rows}, indent=1))


def measure(variables: dict[str, str], seconds: float) -> float:
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    command = [sys.executable, __file__, "--worker", "--seconds", str(seconds)]
    done = subprocess.run(command, env=environment | variables, stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout)


def tokens_per_second(seconds: float) -> float:
    import torch
    import yaml

    from calm import CalmAutoencoder, CalmAutoencoderConfig, CalmForCausalLM
    from calm.training.recipe.recipe import find_recipe

    recipes = {
        stage: yaml.safe_load(find_recipe(f"recipes/quickstart/{stage}.yaml").read_text(encoding="utf-8"))
        for stage in ("autoencoder", "calm")
    }
    torch.manual_seed(0)
    autoencoder = CalmAutoencoder(CalmAutoencoderConfig(vocab_size=1024, **recipes["autoencoder"]["model"]))
    fields = recipes["calm"]["model"]
    auxiliary = {name: value for name, value in fields.items() if name.startswith("token_prediction")}
    backbone = fields["backbone"] | {"vocab_size": 1024}
    model = CalmForCausalLM.from_autoencoder(autoencoder, backbone, fields["head"], **auxiliary).train()
    batch_size, block_size = recipes["calm"]["training"]["per_device_train_batch_size"], 256
    ids = torch.randint(2, 1024, (batch_size, block_size))
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-5)

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    steps, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        step()
        steps += 1
    return steps * ids.numel() / (time.perf_counter() - started)


if __name__ == "__main__":
    main()
