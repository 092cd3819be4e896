"""Continuous batching: one loop steps all running sequences together, one chunk each.

Sequences join and leave at any step. Each has random numbers of its own, and rows of a batch do not see each other, so
that a text follows from its prompt, its settings and its seed alone.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedTokenizerBase

from calm.models.context import positions_needed, room_for_new
from calm.models.generation import NextChunk
from calm.serving.slots import SlotCache
from calm.serving.stepping import Sampling, Stepper
from calm.serving.telemetry import Telemetry
from calm.serving.text import TextStream

log = logging.getLogger(__name__)


class QueueFullError(RuntimeError):
    """No more requests are taken for now."""


class EngineError(RuntimeError):
    """A step failed by a fault of the server; the log says more."""


@dataclass
class Chunk:
    """What a sequence gained in a step; the last one has a ``finish_reason``: stop, length, cancelled or error."""

    text: str
    num_tokens: int
    num_drawn: int = 0
    num_decoded: int = 0
    milliseconds: float = 0.0
    finish_reason: str | None = None

    def join(self, later: "Chunk") -> None:
        """Add the chunk that follows this one."""
        self.text += later.text
        self.num_tokens += later.num_tokens
        self.num_drawn += later.num_drawn
        self.num_decoded += later.num_decoded
        self.milliseconds += later.milliseconds
        self.finish_reason = later.finish_reason


@dataclass
class Job:
    """A sequence to generate.

    Args:
        emit: called from the engine's thread with every :class:`Chunk`.
    """

    prompt_ids: list[int]
    max_tokens: int
    sampling: Sampling
    seed: int
    emit: Callable[[Chunk], None]
    stop: Sequence[str] = ()
    cancelled: bool = False
    num_tokens: int = 0
    arrived: float = field(default_factory=time.perf_counter)
    first_chunk: float | None = None

    def cancel(self) -> None:
        """Give the place to another; takes effect before the next step."""
        self.cancelled = True


@dataclass
class _Running:
    job: Job
    generator: torch.Generator
    text: TextStream
    position: int
    since: float


class Engine:
    """Runs jobs of one model in a thread of its own.

    Args:
        max_batch: sequences that run at a time; each has a slot of the cache.
        context: tokens of prompt and continuation together, at most.
        max_queue: sequences that may wait.
    """

    def __init__(
        self,
        stepper: Stepper,
        tokenizer: PreTrainedTokenizerBase,
        max_batch: int,
        context: int,
        max_queue: int,
        telemetry: Telemetry,
    ):
        self.stepper, self.tokenizer = stepper, tokenizer
        self.max_batch, self.max_queue = max_batch, max_queue
        self.context = context // stepper.patch_size * stepper.patch_size
        self.cache = SlotCache(
            stepper.backbone_config, max_batch, context // stepper.patch_size, stepper.dtype, stepper.device
        )
        self.telemetry = telemetry
        telemetry.watch(self)
        self._waiting: deque[Job] = deque()
        self._running: list[_Running] = []  # in the order of their slots
        self._conditions: torch.Tensor = torch.empty(0)
        self._changed = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self._thread.start()

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    def room_for_new(self, num_prompt: int) -> int:
        """New tokens that fit behind a prompt, at least one: what does not fit is refused when it is asked for."""
        return max(1, room_for_new(self.cache.num_positions, num_prompt, self.stepper.patch_size))

    def check(self, job: Job) -> None:
        """ValueError when the model cannot do a job."""
        self.stepper.check(job.sampling)
        if job.prompt_ids and not 0 <= min(job.prompt_ids) <= max(job.prompt_ids) < self.stepper.vocab_size:
            raise ValueError(f"prompt holds token ids outside 0 to {self.stepper.vocab_size - 1}.")
        patch_size = self.stepper.patch_size
        if positions_needed(len(job.prompt_ids), job.max_tokens, patch_size) > self.cache.num_positions:
            room = room_for_new(self.cache.num_positions, len(job.prompt_ids), patch_size)
            remedy = f"shorten the prompt, or ask for at most {room} tokens" if room > 0 else "shorten the prompt"
            raise ValueError(
                f"the prompt ({len(job.prompt_ids)} tokens) and max_tokens ({job.max_tokens}) exceed the context of "
                f"{self.context} tokens: {remedy}."
            )

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue jobs, all or none; :class:`QueueFullError` when there is no room for them."""
        with self._changed:
            if self._stopping:
                raise QueueFullError("the server is shutting down")
            # Those that will find a free slot at once do not wait.
            if len(self._waiting) + len(self._running) + len(jobs) > self.max_queue + self.max_batch:
                raise QueueFullError(f"{len(self._waiting)} sequences are waiting already")
            self._waiting.extend(jobs)
            self._changed.notify()

    def stop(self) -> None:
        """Finish what runs and waits, then end."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    @torch.no_grad()
    def _loop(self) -> None:
        while True:
            with self._changed:
                while not (self._waiting or self._running or self._stopping):
                    self._changed.wait()
                if self._stopping and not (self._waiting or self._running):
                    return
            try:
                self._drop_cancelled()
                self._admit()
                self._step()
            except Exception:
                # A fault of ours must not end the server; those it struck are told.
                log.exception("a step failed")
                for running in self._running:
                    self._finish(running.job, Chunk("", 0, finish_reason="error"))
                self._running = []

    def _drop_cancelled(self) -> None:
        with self._changed:
            gone = [job for job in self._waiting if job.cancelled]
            for job in gone:
                self._waiting.remove(job)
        for job in gone:
            self._finish(job, Chunk("", 0, finish_reason="cancelled"))
        for slot in reversed(range(len(self._running))):
            if self._running[slot].job.cancelled:
                self._finish(self._running[slot].job, Chunk("", 0, finish_reason="cancelled"))
                self._free(slot)

    def _admit(self) -> None:
        """Read the prompts of waiting jobs into free slots."""
        while len(self._running) < self.max_batch:
            with self._changed:
                if not self._waiting:
                    return
                job = self._waiting.popleft()
            slot = len(self._running)
            try:
                condition, cache, length = self.stepper.prefill(job.prompt_ids)
                self.cache.put(slot, cache)
                self._conditions = torch.cat([self._conditions[:slot].to(condition), condition])
                generator = torch.Generator(self.stepper.device).manual_seed(job.seed)
                text = TextStream(self.tokenizer, job.stop, job.prompt_ids)
            except Exception:
                log.exception("a prompt could not be read")
                self._finish(job, Chunk("", 0, finish_reason="error"))
                continue
            self._running.append(_Running(job, generator, text, length, time.perf_counter()))

    def _step(self) -> None:
        """A chunk for every running sequence, and a step of the backbone for those that go on."""
        if not self._running:
            return
        self.telemetry.batch.observe(len(self._running))
        chunks = self._draw()
        rows = [row.tolist() for row in chunks.tokens]
        drawn, decoded = chunks.num_drawn.tolist(), chunks.num_decoded.tolist()
        ended = [
            self._take(running, rows[slot], drawn[slot], decoded[slot]) for slot, running in enumerate(self._running)
        ]
        tokens = chunks.tokens
        for slot in reversed(range(len(ended))):
            if ended[slot]:
                last = len(self._running) - 1
                tokens[slot] = tokens[last]
                self._free(slot)
        if not self._running:
            return
        positions = torch.tensor([running.position for running in self._running], device=self.stepper.device)
        mask = self.cache.next_step(positions)
        self._conditions = self.stepper.step(tokens[: len(positions)], positions, mask, self.cache)
        for running in self._running:
            running.position += 1

    def _draw(self) -> NextChunk:
        """Chunks of all running sequences; those with the same settings are drawn together."""
        groups: dict[Sampling, list[int]] = {}
        for slot, running in enumerate(self._running):
            groups.setdefault(running.job.sampling, []).append(slot)
        count, size = len(self._running), self.stepper.patch_size
        tokens = torch.empty((count, size), dtype=torch.long, device=self.stepper.device)
        effort = torch.empty((2, count), dtype=torch.long, device=self.stepper.device)
        for sampling, slots in groups.items():
            generators = [self._running[slot].generator for slot in slots]
            chunk = self.stepper.draw(self._conditions[slots], sampling, generators)
            tokens[slots] = chunk.tokens
            effort[:, slots] = torch.stack([chunk.num_drawn, chunk.num_decoded])
        return NextChunk(tokens, effort[0], effort[1])

    def _take(self, running: _Running, tokens: list[int], drawn: int, decoded: int) -> bool:
        """Give a sequence its chunk; returns whether that ends it."""
        job, now = running.job, time.perf_counter()
        tokens = tokens[: job.max_tokens - job.num_tokens]
        end = next((place for place, token in enumerate(tokens) if token in self.stepper.end_ids), None)
        reason = None if end is None else "stop"
        tokens = tokens[:end]
        job.num_tokens += len(tokens)
        if reason is None and job.num_tokens >= job.max_tokens:
            reason = "length"
        text = running.text.add(tokens, last=reason is not None)
        if running.text.stopped:
            reason = "stop"
        if job.first_chunk is None:
            job.first_chunk = now - job.arrived
            self.telemetry.first_chunk.observe(job.first_chunk)
        self.telemetry.chunks.inc()
        self.telemetry.tokens.inc(len(tokens))
        chunk = Chunk(text, len(tokens), drawn, decoded, 1000 * (now - running.since), reason)
        running.since = now
        if reason is None:
            self._emit(job, chunk)
        else:
            self._finish(job, chunk)
        return reason is not None

    def _finish(self, job: Job, chunk: Chunk) -> None:
        self.telemetry.finished(chunk.finish_reason)
        self._emit(job, chunk)

    def _emit(self, job: Job, chunk: Chunk) -> None:
        try:
            job.emit(chunk)
        except Exception:  # nobody may end the engine
            log.exception("a chunk could not be handed over")
            job.cancel()

    def _free(self, slot: int) -> None:
        """End a slot; the last running sequence takes its place."""
        last = self._running.pop()
        if slot < len(self._running):
            self.cache.move(len(self._running), slot, last.position)
            self._conditions[slot] = self._conditions[len(self._running)]
            self._running[slot] = last
        self._conditions = self._conditions[: len(self._running)]
