"""The work of `calm prepare` as a datatrove pipeline: files are read, tokenised and shuffled in tasks of their own.

A task reads its share of the files and writes one token file; which task reads what depends on the number of tasks
alone, so every executor makes the same files. A task that is cut short starts over, one that is complete is left alone.
"""

import json
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from fsspec.implementations.local import LocalFileSystem
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from tokenizers import Tokenizer

from calm.data.checksums import file_checksums
from calm.data.documents import read_documents, split_text
from calm.utils.files import write_whole

EXECUTORS = ("local", "slurm", "ray")
COUNTS, LOGS, UNSHUFFLED, JOBS = "counts", "logs", "unshuffled", "slurm_jobs"
WORK = "work"  # tokenizer and locks of the tasks, checksums of what they wrote
PLAIN_TOKENIZER = "plain_tokenizer.json"
_WAIT_FOR_WORKERS = 60  # seconds
# Documents that are tokenised at once, at some 100 bytes a character. Larger batches are hardly faster.
_BATCH_SIZE = 10


@dataclass
class Executor:
    """Where the tasks run.

    Args:
        kind: ``"local"``, processes of this machine; ``"slurm"``, a job array (and a job that finishes the output, so
            that the call returns when both are submitted); ``"ray"``, the cluster this process is connected to, or one
            of this machine.
        workers: tasks at a time; default one per core, and all of them on a cluster.
        options: for Slurm and Ray, arguments of datatrove's executor; ``partition`` and ``time`` are needed on Slurm.
    """

    kind: str = "local"
    workers: int | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in EXECUTORS:
            raise ValueError(f"executor must be one of {', '.join(EXECUTORS)}, got {self.kind!r}.")
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"workers must be at least 1, got {self.workers}.")
        if self.kind == "slurm" and not {"partition", "time"} <= self.options.keys():
            raise ValueError("the Slurm executor needs --partition and --time, as sbatch takes them.")
        if self.kind == "local" and self.options:
            raise ValueError(f"{', '.join(self.options)}: such options are for the executors slurm and ray.")


class DocumentSource:
    """First step of the pipeline: this task's share of the files as documents."""

    def __init__(self, files: list[str], text_key: str, on_bad: str, max_characters: int | None, draft: Path):
        self.files, self.text_key, self.on_bad = files, text_key, on_bad
        self.max_characters, self.draft = max_characters, draft

    def __setstate__(self, state: dict) -> None:
        _silence_datatrove()  # worker processes log for themselves
        self.__dict__.update(state)

    def __call__(self, data=None, rank: int = 0, world_size: int = 1):
        from datatrove.data import Document

        _hold_task_lock(self.draft, rank)
        counts: Counter = Counter()
        skipped: dict[str, str] = {}
        parent = os.getppid()
        files = self.files[rank::world_size]
        for text in read_documents(files, self.text_key, self.on_bad, counts, skipped):
            if os.getppid() != parent:
                sys.exit("the process that prepares the data is gone")  # its successor does this task again
            for piece, part in enumerate(split_text(text, self.max_characters)):
                counts["cuts"] += piece > 0
                yield Document(text=part, id=f"{rank}/{counts['documents']}/{piece}")
        folder = self.draft / COUNTS
        folder.mkdir(exist_ok=True)
        (folder / f"{rank:05d}.json").write_text(json.dumps({"counts": counts, "skipped": skipped}), encoding="utf-8")


_task_lock: FileLock | None = None


def _hold_task_lock(draft: Path, rank: int) -> None:
    """Wait until no other process works on a task; it may be a worker whose preparation was killed.

    The lock is held until this process begins its next task, or ends: until the token file is written.
    """
    global _task_lock
    if _task_lock is not None:
        _task_lock.release()
    _task_lock = FileLock(draft / WORK / f"{rank:05d}.lock")
    with suppress(NotImplementedError, OSError):  # file systems without locks
        _task_lock.acquire()


def _release_task_lock() -> None:
    global _task_lock
    if _task_lock is not None:
        _task_lock.release()
    _task_lock = None


def wait_for_workers(draft: Path) -> None:
    """Wait until the workers of a preparation that was killed have ended; ValueError when they do not."""
    for path in sorted((draft / WORK).glob("*.lock")):
        try:
            with FileLock(path, timeout=_WAIT_FOR_WORKERS):
                pass
        except Timeout as error:
            raise ValueError(
                f"workers of an interrupted preparation are still writing in {draft}: end them, and repeat the command."
            ) from error
        except (NotImplementedError, OSError):
            return  # file systems without locks


class Checksums:
    """Last step of the pipeline: the checksums of the file that the task wrote."""

    def __init__(self, draft: Path):
        self.draft = draft

    def __call__(self, data=None, rank: int = 0, world_size: int = 1):
        for path in self.draft.glob(f"{rank:05d}_*.ds"):
            write_whole(self.draft / WORK / f"{path.name}.json", json.dumps(file_checksums(path)))


class Finish:
    """The one step of the job that follows the tasks on Slurm."""

    def __init__(self, finish: Callable[[], object]):
        self.finish = finish

    def __call__(self, data=None, rank: int = 0, world_size: int = 1):
        self.finish()


def run_tasks(
    executor: Executor,
    source: DocumentSource,
    num_tasks: int,
    separator_id: int,
    seed: int,
    finish: Callable[[], object],
) -> bool:
    """Run the tasks and then ``finish``; False where they are only submitted."""
    from datatrove.io import DataFolder
    from datatrove.pipeline.tokens import DocumentTokenizer

    _silence_datatrove()
    draft = source.draft
    folder = lambda path: DataFolder(str(path), fs=LocalFileSystem())  # noqa: E731 -- a name may look like an address
    tokenizer_path = str(draft / WORK / PLAIN_TOKENIZER)
    tokenize = DocumentTokenizer(
        folder(draft),
        tokenizer_path,
        local_working_dir=folder(draft / UNSHUFFLED),
        eos_token=Tokenizer.from_file(tokenizer_path).id_to_token(separator_id),
        batch_size=_BATCH_SIZE,
        seed=seed,
        save_index=False,
        save_final_metadata=False,
    )
    pipeline = [source, tokenize, Checksums(draft)]
    common: dict[str, Any] = {"pipeline": pipeline, "tasks": num_tasks, "logging_dir": folder(draft / LOGS)}
    if executor.kind == "slurm":
        _submit(executor, draft, common, finish)
        return False
    try:
        with _progress(draft, num_tasks):
            if executor.kind == "local":
                _run_locally(executor, common)
            else:
                _run_on_ray(executor, draft, common)
    finally:
        _release_task_lock()  # one worker runs in this process
    finish()
    return True


def check_no_jobs(draft: Path) -> None:
    """ValueError while jobs of Slurm work on a draft: others beside them would mix up the tasks."""
    if not was_submitted(draft):
        return
    jobs = (draft / JOBS).read_text(encoding="utf-8")
    try:
        listed = subprocess.run(["squeue", "--noheader", "--jobs", jobs], capture_output=True, text=True).stdout.split()
    except OSError:
        listed = []
    if listed:
        raise ValueError(
            f"jobs {jobs} of Slurm are still at work on this: repeat the command when they have ended, or `scancel` "
            "them."
        )


def was_submitted(draft: Path) -> bool:
    """Whether jobs of Slurm were given a draft to work on."""
    return (draft / JOBS).exists()


def num_complete(draft: Path) -> int:
    """Tasks that are done."""
    return len(list((draft / LOGS / "completions").glob("*")))


def _run_locally(executor: Executor, common: dict[str, Any]) -> None:
    import multiprocess
    from datatrove.executor import LocalPipelineExecutor

    # Imported once, in the process that all workers are forked from: they share that memory.
    multiprocess.get_context("forkserver").set_forkserver_preload(["calm.data.pipeline", "datatrove.pipeline.tokens"])
    # Those that a scheduler gave us, which may be fewer than there are.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(common["tasks"], executor.workers or cores)
    # Cores that have no task of their own help to tokenise.
    os.environ["RAYON_NUM_THREADS"] = str(max(1, cores // workers))
    LocalPipelineExecutor(**common, workers=workers).run()


def _run_on_ray(executor: Executor, draft: Path, common: dict[str, Any]) -> None:
    try:
        import ray
    except ImportError as error:
        raise ValueError("the Ray executor takes the ray library: pip install ray.") from error
    from datatrove.executor.ray import RayPipelineExecutor

    ours = not ray.is_initialized()
    if ours:
        ray.init(log_to_driver=False)
    try:
        RayPipelineExecutor(**common, workers=executor.workers or -1, **executor.options).run()
    finally:
        if ours:
            ray.shutdown()
    if num_complete(draft) < common["tasks"]:
        raise ValueError(
            f"{common['tasks'] - num_complete(draft)} of {common['tasks']} tasks failed, see {draft / LOGS / 'logs'}; "
            "run the command again to repeat them."
        )


def _submit(executor: Executor, draft: Path, common: dict[str, Any], finish: Callable[[], object]) -> None:
    from datatrove.executor import SlurmPipelineExecutor
    from datatrove.io import DataFolder

    options = {"job_name": "calm-prepare", "mail_type": "NONE"} | executor.options
    if sys.prefix != sys.base_prefix:
        options.setdefault("venv_path", f"{sys.prefix}/bin/activate")
    tasks = SlurmPipelineExecutor(**common, workers=executor.workers or -1, **options)
    # Not in the draft: this job still writes its log when it has put that in place.
    logs = str(draft.with_name(draft.name.removesuffix(".partial") + ".slurm"))
    last = SlurmPipelineExecutor(
        pipeline=[Finish(finish)],
        tasks=1,
        logging_dir=DataFolder(logs, fs=LocalFileSystem()),
        depends=tasks,
        skip_completed=False,
        **options,
    )
    for jobs in (tasks, last):
        # Their job would write into the draft after the last one has put it in place.
        setattr(jobs, "launch_merge_stats", _no_stats)  # noqa: B010
    try:
        tasks.run()
        (draft / JOBS).write_text(str(tasks.job_id), encoding="utf-8")
        last.run()
    except (OSError, subprocess.CalledProcessError) as error:
        raise ValueError(f"the jobs could not be submitted ({error}): look at `sbatch` and its options.") from error
    with suppress(FileNotFoundError):  # the last job has ended already
        (draft / JOBS).write_text(f"{tasks.job_id},{last.job_id}", encoding="utf-8")


def _no_stats() -> None:
    """In the place of a job that sums up datatrove's own counts; the manifest has ours."""


def _silence_datatrove() -> None:
    from loguru import logger

    logger.disable("datatrove")


@contextmanager
def _progress(draft: Path, num_tasks: int) -> Iterator[None]:
    """A line that shows tasks done and bytes written, as the output directory shows them."""
    progress = Progress(
        SpinnerColumn(),
        TextColumn("[bold]prepare"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("tasks"),
        TimeElapsedColumn(),
        TextColumn("[dim]{task.fields[written]:,.0f} MB of tokens"),
        console=Console(stderr=True),
        disable=not sys.stderr.isatty(),
    )
    ended = threading.Event()

    def watch() -> None:
        task = progress.add_task("", total=num_tasks, written=0)
        while not progress.finished:
            written = sum(file.stat().st_size for file in draft.rglob("*.ds") if file.exists())
            progress.update(task, completed=num_complete(draft), written=written / 1e6)
            if ended.wait(0.5):
                return

    with progress:
        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            ended.set()
            watcher.join()
