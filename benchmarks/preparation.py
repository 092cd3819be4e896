"""Cost of preparing data: tokens per second and core beside `datasets.map`, memory and restarts of a big corpus.

    python benchmarks/preparation.py                                 # on the embedded corpus, one core and all cores
    python benchmarks/preparation.py --sources FILES --tokenizer DIR
    python benchmarks/preparation.py --gigabytes 5 --kills 3         # synthetic: peak memory, killed and started again

Both ways read the same files, use the same tokenizer and leave tokens on the disk, each in a process of its own; they
take turns, and medians are compared. Memory is that of the whole tree of processes (proportional set size), looked at
ten times a second. The synthetic corpus is .jsonl.zst of documents put together from lines of the embedded corpus; its
size is that of the text. After every kill -9 the same command goes on.
"""

import argparse
import hashlib
import json
import os
import platform
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import zstandard

from calm.data.corpus import stdlib_documents, write_embedded_corpus
from calm.data.sources import find_sources
from calm.data.tokenizer import train_tokenizer

MAP = """
import sys
from datasets import load_dataset
from transformers import AutoTokenizer
tokenizer_path, output, num_proc, *files = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
def tokenize(batch):
    return {"ids": [ids + [tokenizer.eos_token_id] for ids in tokenizer(batch["text"], verbose=False)["input_ids"]]}
data = load_dataset("json", data_files=files, split="train", cache_dir=output + "/cache")
data = data.map(tokenize, batched=True, remove_columns=data.column_names, num_proc=int(num_proc))
print(sum(map(len, data.with_format("numpy")["ids"])))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sources", nargs="+", help=".jsonl(.gz, .zst) files; default the embedded corpus in 8 files")
    parser.add_argument("--tokenizer", help="default one of 8192 tokens, trained on the embedded corpus")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--gigabytes", type=float, help="measure memory and restarts on so much synthetic text")
    parser.add_argument("--files", type=int, default=20, help="of the synthetic corpus")
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="for what is written; default a temporary one")
    parser.add_argument("--output", type=Path, default=Path("preparation.json"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        tokenizer = arguments.tokenizer
        if tokenizer is None:
            tokenizer = folder / "tokenizer"
            train_tokenizer((text for _, text in stdlib_documents()), 8192).save_pretrained(tokenizer)
        if arguments.gigabytes:
            result = survival(folder, str(tokenizer), arguments)
        else:
            result = throughput(folder, str(tokenizer), arguments)
    machine = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    arguments.output.write_text(json.dumps(machine | result, indent=1), encoding="utf-8")
    print(f"written: {arguments.output}")


def throughput(folder: Path, tokenizer: str, arguments: argparse.Namespace) -> dict:
    files = [file.path for file in find_sources(arguments.sources)] if arguments.sources else _embedded(folder)
    cores = os.cpu_count() or 1
    ways = {(kind, workers): [] for workers in sorted({1, cores}) for kind in ("calm prepare", "datasets.map")}
    tokens = {}
    for _ in range(arguments.repeats):
        for (kind, workers), seconds in ways.items():
            shutil.rmtree(folder / "out", ignore_errors=True)
            environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}
            output = str(folder / "out" / "data")
            if kind == "calm prepare":
                command = prepare_command(files, tokenizer, output, workers)
            else:
                command = [sys.executable, "-c", MAP, tokenizer, output, str(workers), *files]
            start = time.perf_counter()
            done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
            seconds.append(time.perf_counter() - start)
            tokens[kind] = int(done.stdout.split()[0].replace(",", ""))
    assert tokens["calm prepare"] >= tokens["datasets.map"], tokens  # and a separator per cut of a long document
    rows = []
    print(f"\n{'':14}{'workers':>8}{'tokens/s per core':>20}{'ratio':>8}")
    for (kind, workers), seconds in ways.items():
        rate = tokens[kind] / statistics.median(seconds) / workers
        ratio = rate / (tokens["datasets.map"] / statistics.median(ways["datasets.map", workers]) / workers)
        rows.append({"kind": kind, "workers": workers, "seconds": seconds, "rate_per_core": rate, "ratio": ratio})
        print(f"{kind:14}{workers:>8}{rate:>20,.0f}{ratio:>8.2f}")
    return {"tokens": tokens, "rows": rows}


def survival(folder: Path, tokenizer: str, arguments: argparse.Namespace) -> dict:
    source = folder / "synthetic"
    compressed = write_synthetic(source, arguments.gigabytes * 1e9, arguments.files)
    print(f"{arguments.gigabytes} GB of text in {arguments.files} files ({compressed / 1e9:.2f} GB compressed)")
    command = prepare_command([str(source)], tokenizer, str(folder / "data"), os.cpu_count() or 1)
    chance = random.Random(0)
    peak, start, interrupted = 0, time.perf_counter(), set()
    targets = sorted(chance.sample(range(1, arguments.files), arguments.kills))
    for target in [*targets, None]:
        process = subprocess.Popen(command, start_new_session=True)
        wait = chance.uniform(0, 5)
        while process.poll() is None:
            peak = max(peak, tree_memory(process.pid))
            done = {int(path.name) for path in (folder / ".data.partial" / "logs" / "completions").glob("*")}
            if target is not None and len(done) >= target:
                time.sleep(wait)
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                # Tasks are begun in their order, one per core.
                interrupted |= {task for task in range(max(done) + 1 + (os.cpu_count() or 1)) if task not in done}
                seconds = time.perf_counter() - start
                print(f"killed after {len(done)} of {arguments.files} tasks, {seconds:.0f} s", flush=True)
                break
            time.sleep(0.1)
        else:
            assert process.returncode == 0, process.returncode
    seconds = time.perf_counter() - start
    manifest = json.loads((folder / "data" / "manifest.json").read_text())
    print(f"{manifest['num_tokens']:,} tokens in {seconds:.0f} s with {arguments.kills} kills")
    print(f"peak memory of all processes {peak / 2**20:,.0f} MiB", flush=True)
    # What a kill interrupted, prepared again alone: the same bytes.
    files = sorted(source.iterdir())
    interrupted &= set(range(len(files)))
    same = 0
    for task in sorted(interrupted):
        alone = folder / f"alone-{task}"
        subprocess.run(prepare_command([str(files[task])], tokenizer, str(alone), 1), check=True, capture_output=True)
        same += digest(next(alone.glob("*.ds"))) == digest(folder / "data" / manifest["files"][task]["name"])
    print(f"interrupted tasks whose files equal those of an uninterrupted run: {same} of {len(interrupted)}")
    return {
        "gigabytes": arguments.gigabytes, "compressed_bytes": compressed, "num_tokens": manifest["num_tokens"],
        "num_documents": manifest["num_documents"], "seconds": seconds, "peak_bytes": peak, "kills": arguments.kills,
        "same_files": same, "interrupted": len(interrupted),
    }  # fmt: skip


def prepare_command(files: list[str], tokenizer: str, output: str, workers: int) -> list[str]:
    options = ["--tokenizer", tokenizer, "--workers", str(workers), "--max-characters", "100000"]
    return [sys.executable, "-m", "calm.cli.main", "prepare", *files, *options, "-o", output]


def _embedded(folder: Path) -> list[str]:
    lines = write_embedded_corpus(folder / "corpus")["train"].read_text(encoding="utf-8").splitlines(keepends=True)
    files = []
    for number in range(8):
        path = folder / "corpus" / f"{number}.jsonl"
        path.write_text("".join(lines[number::8]), encoding="utf-8")
        files.append(str(path))
    return files


def write_synthetic(folder: Path, num_bytes: float, num_files: int) -> int:
    """Documents of 100 characters to a few MB, most of them short, as on the web and in book collections."""
    folder.mkdir()
    lines = [line for _, text in stdlib_documents() for line in text.splitlines(keepends=True)]
    for number in range(num_files):
        chance, written = random.Random(number), 0
        with (
            open(folder / f"{number:03d}.jsonl.zst", "wb") as raw,
            zstandard.ZstdCompressor(3).stream_writer(raw) as out,
        ):
            while written < num_bytes / num_files:
                count = min(int(chance.paretovariate(0.9) * 10), 100_000)
                text = "".join(chance.choices(lines, k=count))
                written += len(text)
                out.write((json.dumps({"text": text}) + "\n").encode())
    return sum(path.stat().st_size for path in folder.iterdir())


def tree_memory(pid: int) -> int:
    total = 0
    try:
        parent = psutil.Process(pid)
        for process in [parent, *parent.children(recursive=True)]:
            try:
                total += process.memory_full_info().pss
            except psutil.Error:
                continue
    except psutil.Error:
        return 0
    return total


def digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    main()
