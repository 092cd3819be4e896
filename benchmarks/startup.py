"""Start-up times of the command line and of `import calm`, in seconds of processor time and of the clock.

    python benchmarks/startup.py
    python benchmarks/startup.py --repeats 9 --output startup.json

Every command is a process of its own; the lowest of several runs is printed, since other work on the machine only adds
to it. Processor time is user and system time of the process.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

CALM = [sys.executable, "-m", "calm"]
COMMANDS = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "import calm": [sys.executable, "-c", "import calm"],
    "calm --version": [*CALM, "--version"],
    "calm --help": [*CALM, "--help"],
    "calm train --help": [*CALM, "train", "--help"],
    "calm trian (usage error)": [*CALM, "trian"],
    "shell completion": CALM,
    "calm train missing.yaml": [*CALM, "train", "missing.yaml"],
    "calm generate ./missing": [*CALM, "generate", "./missing"],
    "calm info recipes/paper/calm_m.yaml": [*CALM, "info", "recipes/paper/calm_m.yaml"],
    "import torch": [sys.executable, "-c", "import torch"],
}
COMPLETION = {"_CALM_COMPLETE": "complete_bash", "COMP_WORDS": "calm ge", "COMP_CWORD": "1"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, help="write JSON here")
    options = parser.parse_args()

    rows = []
    for name, command in COMMANDS.items():
        environment = os.environ | (COMPLETION if name == "shell completion" else {})
        runs = [measure(command, environment) for _ in range(options.repeats)]
        rows.append({"command": name, "cpu_seconds": min(cpu for cpu, _ in runs), "seconds": min(s for _, s in runs)})
    print("| command | processor time, s | clock, s |\n|---|---:|---:|")
    for row in rows:
        print(f"| `{row['command']}` | {row['cpu_seconds']:.2f} | {row['seconds']:.2f} |")
    if options.output:
        about = {"machine": platform.processor() or platform.machine(), "cores": os.cpu_count(),
                 "python": platform.python_version(), "load_average": os.getloadavg()}  # fmt: skip
        options.output.write_text(json.dumps(about | {"rows": rows}, indent=1))


def measure(command: list[str], environment: dict[str, str]) -> tuple[float, float]:
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return cpu, time.perf_counter() - started


if __name__ == "__main__":
    main()
