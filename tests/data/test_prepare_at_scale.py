"""Remote sources, long documents, and work that is divided, submitted or cut short."""

import functools
import gzip
import http.server
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from itertools import chain

import fsspec
import pyarrow
import pyarrow.parquet
import pytest

from calm.data.documents import read_documents, split_text
from calm.data.pipeline import Executor
from calm.data.prepare import prepare
from calm.data.sources import find_sources
from calm.data.tokenizer import train_tokenizer

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dogs", "and", "other", "animals", "of", "land"]
DOCUMENTS = [" ".join(WORDS[(i * j) % len(WORDS)] for j in range(40 + i % 7)) + f" {i}\n" for i in range(200)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(DOCUMENTS, 300)


def write_jsonl(path, documents=DOCUMENTS):
    path.write_bytes(gzip.compress("".join(json.dumps({"text": text}) + "\n" for text in documents).encode()))
    return path


@pytest.fixture
def folder(tmp_path):
    """Four files of documents."""
    (tmp_path / "texts").mkdir()
    for i in range(4):
        write_jsonl(tmp_path / "texts" / f"{i}.jsonl.gz", DOCUMENTS[i::4])
    return tmp_path / "texts"


def contents(path):
    return {each.name: each.read_bytes() for each in path.iterdir() if each.is_file()}


def test_a_dataset_in_the_hubs_layout_is_read_by_split_and_subset(tmp_path):
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: plain\n  data_files:\n  - split: train\n    path: plain/train-*.parquet\n"
        "  - split: test\n    path: plain/test-*.parquet\n---\nA card.\n"
    )
    (tmp_path / "plain").mkdir()
    for name in ("train-00000", "train-00001", "test-00000"):
        pyarrow.parquet.write_table(pyarrow.table({"text": [name]}), tmp_path / "plain" / f"{name}.parquet")
    train = [file.path for file in find_sources([tmp_path], split="train")]
    assert list(read_documents(train)) == ["train-00000", "train-00001"]
    test = [file.path for file in find_sources([tmp_path], split="test", subset="plain")]
    assert list(read_documents(test)) == ["test-00000"]
    with pytest.raises(ValueError, match=r"no split 'dev', but train, test"):
        find_sources([tmp_path], split="dev")
    with pytest.raises(ValueError, match=r"cannot be read.*'nope'"):
        find_sources([tmp_path], subset="nope")


def test_addresses_may_hold_patterns(folder):
    for pattern, names in (("*.jsonl.gz", "0123"), ("[0-2].jsonl.gz", "012")):
        found = find_sources([f"file://{folder}/{pattern}"])
        assert [file.path.rsplit("/", 1)[1] for file in found] == [f"{name}.jsonl.gz" for name in names]


def test_files_of_a_web_server_are_read_without_a_copy(tmp_path, tokenizer):
    write_jsonl(tmp_path / "a.jsonl.gz")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            address = f"http://127.0.0.1:{server.server_port}"
            (file,) = find_sources([f"{address}/a.jsonl.gz"])
            assert file.size == (tmp_path / "a.jsonl.gz").stat().st_size
            assert list(read_documents([file.path])) == DOCUMENTS
            remote = prepare([f"{address}/a.jsonl.gz"], tokenizer, tmp_path / "remote")
            with pytest.raises(ValueError, match=r"cannot read http://127\.0\.0\.1:\d+/b\.jsonl"):
                find_sources([f"{address}/b.jsonl"])
        finally:
            server.shutdown()
            thread.join()
    local = prepare([tmp_path / "a.jsonl.gz"], tokenizer, tmp_path / "local")
    assert remote["files"] == local["files"]
    with pytest.raises(OSError, match="does not answer"):  # gone, which is no bad record
        list(read_documents([file.path], on_bad="skip"))


def test_folders_and_patterns_of_a_remote_store_are_listed_in_order():
    store = fsspec.filesystem("memory")
    for name in ("b.txt", "a.txt", "c.png"):
        store.pipe(f"/corpus/{name}", b"text of " + name.encode())
    for source in ("memory://corpus", "memory://corpus/*.txt"):
        files = [file.path for file in find_sources([source])]
        assert list(read_documents(files)) == ["text of a.txt", "text of b.txt"]
    with pytest.raises(ValueError, match=r"no documents at memory://corpus/\*\.parquet"):
        find_sources(["memory://corpus/*.parquet"])


def test_pieces_of_a_long_document_are_the_document_and_so_are_their_tokens(tokenizer):
    text = "".join(DOCUMENTS)
    for limit in (7, 50, 1000):
        pieces = list(split_text(text, limit))
        assert "".join(pieces) == text
        assert max(map(len, pieces)) <= limit
        assert len(pieces) < 4 * len(text) / limit
    ids = [tokenizer(piece)["input_ids"] for piece in split_text(text, 1000)]
    assert list(chain.from_iterable(ids)) == tokenizer(text)["input_ids"]
    assert list(split_text("x" * 10, 4)) == ["xxxx", "xxxx", "xx"]  # no place to cut
    assert list(split_text(text, None)) == [text]


def test_long_documents_are_cut_and_counted(tmp_path, tokenizer):
    (tmp_path / "long.txt").write_text("".join(DOCUMENTS))
    whole = prepare([tmp_path / "long.txt"], tokenizer, tmp_path / "whole", max_characters=None)
    cut = prepare([tmp_path / "long.txt"], tokenizer, tmp_path / "cut", max_characters=5000)
    assert (whole["num_documents"], whole["num_cuts"]) == (cut["num_documents"], 0) == (1, 0)
    assert cut["num_cuts"] >= len("".join(DOCUMENTS)) // 5000
    assert cut["num_tokens"] == whole["num_tokens"] + cut["num_cuts"]  # a separator behind every piece


def test_the_number_of_workers_does_not_change_the_files(tmp_path, tokenizer, folder):
    prepare([folder], tokenizer, tmp_path / "one", executor=Executor(workers=1))
    prepare([folder], tokenizer, tmp_path / "three", executor=Executor(workers=3))
    assert contents(tmp_path / "one") == contents(tmp_path / "three")
    assert len(list((tmp_path / "one").glob("*.ds"))) == 4
    prepare([folder], tokenizer, tmp_path / "tasks", num_tasks=2)
    assert len(list((tmp_path / "tasks").glob("*.ds"))) == 2


def test_killed_and_started_again_the_files_are_the_same(tmp_path, tokenizer, folder):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    for number in range(5):  # enough for a kill to fall between two tasks
        write_jsonl(folder / f"more-{number}.jsonl.gz", DOCUMENTS * 15)
    arguments = [str(folder), "--tokenizer", str(tmp_path / "tokenizer"), "--workers", "1"]

    def command(output):
        return [sys.executable, "-m", "calm.cli.main", "prepare", *arguments, "-o", str(output)]

    subprocess.run(command(tmp_path / "whole"), check=True, capture_output=True)
    completions = tmp_path / ".killed.partial" / "logs" / "completions"
    process = subprocess.Popen(command(tmp_path / "killed"), start_new_session=True)
    while process.poll() is None and len(list(completions.glob("*"))) < 3:
        time.sleep(0.01)
    assert process.poll() is None
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed").exists()
    done = {path.name: path.stat().st_mtime_ns for path in completions.iterdir()}
    files = {path: path.stat().st_mtime_ns for path in completions.parent.parent.glob("*.ds")}
    assert 3 <= len(done) < 9
    subprocess.run(command(tmp_path / "killed"), check=True, capture_output=True)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    kept = [path for path in files if (tmp_path / "killed" / path.name).stat().st_mtime_ns == files[path]]
    assert len(kept) >= len(done)  # complete tasks were left alone
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed", "texts", "tokenizer", "whole"]


def test_asked_to_end_it_takes_its_workers_along(tmp_path, tokenizer, folder):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    write_jsonl(folder / "long.jsonl.gz", DOCUMENTS * 400)
    arguments = [str(folder), "--tokenizer", str(tmp_path / "tokenizer"), "--workers", "2", "-o", str(tmp_path / "out")]
    command = [sys.executable, "-m", "calm.cli.main", "prepare", *arguments]
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list((tmp_path / ".out.partial" / "logs" / "completions").glob("*")):
        time.sleep(0.01)
    assert process.poll() is None
    process.terminate()
    assert process.wait() == 128 + signal.SIGTERM
    deadline = time.monotonic() + 60
    while is_alive(process.pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not is_alive(process.pid)


def is_alive(group):
    """Whether a process of this group is left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_what_is_complete_survives_a_bad_record_and_serves_when_bad_ones_are_skipped(tmp_path, tokenizer, folder):
    (folder / "z.jsonl").write_text("{broken\n" + json.dumps({"text": "fine"}) + "\n")
    with pytest.raises(ValueError, match=r"z\.jsonl line 1 is not valid JSON.*4 of 5 tasks are complete and kept"):
        prepare([folder], tokenizer, tmp_path / "data", executor=Executor(workers=1))
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / ".data.partial").glob("*.ds")}
    assert len(kept) == 4
    manifest = prepare([folder], tokenizer, tmp_path / "data", on_bad="skip")
    assert manifest["num_documents"] == len(DOCUMENTS) + 1
    assert manifest["skipped"]["not valid JSON"]["count"] == 1
    assert all((tmp_path / "data" / name).stat().st_mtime_ns == time for name, time in kept.items())
    assert not (tmp_path / ".data.partial").exists()


def test_what_other_settings_left_behind_is_neither_used_nor_lost(tmp_path, tokenizer, folder):
    (folder / "z.jsonl").write_text("{broken\n")
    with pytest.raises(ValueError, match="4 of 5 tasks are complete"):
        prepare([folder], tokenizer, tmp_path / "data", seed=1, executor=Executor(workers=1))
    with pytest.raises(ValueError, match=r"holds 4 complete tasks .* \(different: seed\): repeat its"):
        prepare([folder], tokenizer, tmp_path / "data", seed=2)
    manifest = prepare([folder], tokenizer, tmp_path / "data", seed=1, on_bad="skip")
    assert manifest["skipped"]["not valid JSON"]["count"] == 1


def test_a_kill_while_the_output_is_put_in_place_loses_nothing(tmp_path, tokenizer, folder, monkeypatch):
    prepare([folder], tokenizer, tmp_path / "whole")
    remove, calls = shutil.rmtree, []

    def killed(path, *arguments, **options):
        if str(path).endswith(("counts", "logs")):
            calls.append(path)
            if len(calls) in (1, 3):
                raise KeyboardInterrupt
        remove(path, *arguments, **options)

    monkeypatch.setattr(shutil, "rmtree", killed)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            prepare([folder], tokenizer, tmp_path / "data")
    prepare([folder], tokenizer, tmp_path / "data")
    assert contents(tmp_path / "data") == contents(tmp_path / "whole")
    assert not (tmp_path / ".data.partial").exists()


def test_an_output_inside_a_source_is_refused(tmp_path, tokenizer, folder):
    with pytest.raises(ValueError, match="lies inside the source"):
        prepare([folder], tokenizer, folder / "prepared")


def test_lines_that_no_reader_takes_are_bad_records(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": ' + "9" * 5000 + "}\n" + "[" * 100_000 + '\n{"text": "good"}\n')
    assert list(read_documents([str(tmp_path / "a.jsonl")], on_bad="skip")) == ["good"]
    with pytest.raises(ValueError, match=r"a\.jsonl line 1 cannot be read as JSON"):
        list(read_documents([str(tmp_path / "a.jsonl")]))


def test_slurm_gets_a_job_array_and_a_job_that_finishes(tmp_path, tokenizer, folder, monkeypatch):
    """`sbatch` here keeps the script it is given and its arguments; the scripts then run as Slurm would run them."""
    commands = {
        "sbatch": f'#!/bin/sh\nn=$(ls "{tmp_path}" | grep -c job-)\nfor last; do :; done\n'
        f'cp "$last" "{tmp_path}/job-$n.sh"; echo "$@" > "{tmp_path}/arguments-$n"; echo "Submitted batch job 10$n"\n',
        "srun": '#!/bin/sh\nwhile [ "$1" != launch_pickled_pipeline ]; do shift; done\nexec "$@"\n',
        "scontrol": "#!/bin/sh\necho localhost\n",
    }
    (tmp_path / "bin").mkdir()
    for name, script in commands.items():
        path = tmp_path / "bin" / name
        path.write_text(script)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    options = {"partition": "cpu", "time": "1:00:00", "sbatch_args": {"account": "mine"}}
    executor = Executor("slurm", workers=3, options=options)
    assert prepare([folder], tokenizer, tmp_path / "data", num_tasks=2, executor=executor) is None
    assert not (tmp_path / "data").exists()

    jobs = [path.read_text() for path in sorted(tmp_path.glob("job-*.sh"))]
    (tasks,) = [job for job in jobs if "--array=0-1%3" in job]
    for line in ("#SBATCH --partition=cpu", "#SBATCH --time=1:00:00", "#SBATCH --account=mine"):
        assert line in tasks
    assert f"source {sys.prefix}/bin/activate" in tasks
    finish = next(i for i, job in enumerate(jobs) if ".data.slurm/executor.pik" in job)
    assert "--dependency=afterok:100" in (tmp_path / f"arguments-{finish}").read_text()

    (tmp_path / "bin" / "squeue").write_text("#!/bin/sh\necho $3 RUNNING\n")
    (tmp_path / "bin" / "squeue").chmod(0o755)
    with pytest.raises(ValueError, match=r"jobs 100,101 of Slurm are still at work on this: repeat the command when"):
        prepare([folder], tokenizer, tmp_path / "data", num_tasks=2, executor=executor)
    (tmp_path / "bin" / "squeue").write_text("#!/bin/sh\nexit 1\n")

    for script, index in [(tasks, task) for task in range(2)] + [(jobs[finish], 0)]:
        slurm = {"SLURM_ARRAY_TASK_ID": str(index), "SLURM_NODELIST": "localhost", "RUN_OFFSET": "0"}
        subprocess.run(["bash", "-c", script], env=os.environ | slurm, check=True, capture_output=True)
    prepare([folder], tokenizer, tmp_path / "local", num_tasks=2)
    assert contents(tmp_path / "data") == contents(tmp_path / "local")
    assert not (tmp_path / ".data.partial").exists()


def test_slurm_without_sbatch_or_its_options_is_refused(tmp_path, tokenizer, folder):
    with pytest.raises(ValueError, match="needs --partition and --time"):
        Executor("slurm")
    with pytest.raises(ValueError, match="look at `sbatch`"):
        prepare(
            [folder],
            tokenizer,
            tmp_path / "data",
            executor=Executor("slurm", options={"partition": "cpu", "time": "1:00:00"}),
        )
    with pytest.raises(ValueError, match="executor must be one of local, slurm, ray, got 'spark'"):
        Executor("spark")
    with pytest.raises(ValueError, match="partition: such options are for"):
        Executor("local", options={"partition": "cpu"})
    with pytest.raises(ValueError, match="num_tasks must be 1 to 4, the number of files, got 5"):
        prepare([folder], tokenizer, tmp_path / "data", num_tasks=5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_a_local_ray_cluster_makes_the_same_files(tmp_path, tokenizer, folder):
    pytest.importorskip("ray", reason="needs `pip install ray`")
    prepare([folder], tokenizer, tmp_path / "local")
    executor = Executor("ray", workers=2, options={"mem_per_cpu_gb": 0.5})
    prepare([folder], tokenizer, tmp_path / "ray", executor=executor)
    assert contents(tmp_path / "ray") == contents(tmp_path / "local")
