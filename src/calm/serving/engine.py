"""Continuous batching: one loop steps all running sequences together, one chunk each.

Sequences join and leave at any step. Each has random numbers of its own, and rows of a batch do not see each other, so
that a text follows from its prompt, its settings and its seed alone.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from calm.functional.tiles import is_out_of_memory
from calm.generation.loop import NextChunk
from calm.models.context import positions_needed, room_for_new
from calm.serving.batch_invariance import BatchInvariance
from calm.serving.jobs import Chunk, Job
from calm.serving.model_runner import Sampling, Stepper
from calm.serving.slots import SlotCache
from calm.serving.telemetry import Telemetry
from calm.serving.text import TextStream

log = logging.getLogger(__name__)
_PREFILL_TOKENS = 16384  # tokens of prompts that are read together, with what fills up the shorter ones


class QueueFullError(RuntimeError):
    """No more requests are taken for now."""


class EngineError(RuntimeError):
    """A step failed by a fault of the server; the log says more."""


@dataclass
class _Running:
    job: Job
    generator: torch.Generator
    text: TextStream
    position: int
    since: float
    search: "_Search | None" = None  # for the next chunk
    failed: bool = False


@dataclass
class _Search:
    """Sequences whose next chunk is drawn in rounds, one in every step."""

    rows: list[_Running]
    rounds: Iterator[tuple[NextChunk, torch.Tensor]]


class Engine:
    """Runs jobs of one model in a thread of its own.

    Args:
        max_batch: sequences that run at a time; each has a slot of the cache.
        context: tokens of prompt and continuation together, at most.
        max_queue: sequences that may wait.
        batch_invariant: whether the text of a sequence must not depend on the others, not even by rounding.
    """

    def __init__(
        self,
        stepper: Stepper,
        tokenizer: PreTrainedTokenizerBase,
        max_batch: int,
        context: int,
        max_queue: int,
        telemetry: Telemetry,
        batch_invariant: bool = False,
    ):
        self.invariance = BatchInvariance() if batch_invariant else None
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
        with self.invariance or nullcontext():
            self._run()

    def _run(self) -> None:
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
        """Read the prompts of waiting jobs into free slots, those of similar length together."""
        with self._changed:
            count = min(self.max_batch - len(self._running), len(self._waiting))
            jobs = [self._waiting.popleft() for _ in range(count)]
        group: list[Job] = []
        for job in sorted(jobs, key=lambda job: len(job.prompt_ids)):
            if group and (self.invariance or (len(group) + 1) * len(job.prompt_ids) > _PREFILL_TOKENS):
                self._read(group)
                group = []
            group.append(job)
        if group:
            self._read(group)

    def _read(self, jobs: list[Job]) -> None:
        try:
            prompts = [self.stepper.whole_patches(job.prompt_ids) for job in jobs]
            conditions, cache, lengths = self.stepper.prefill(prompts)
            rows = [self._start(job, length) for job, length in zip(jobs, lengths, strict=True)]
            first = len(self._running)
            for row, length in enumerate(lengths):
                self.cache.put(first + row, cache, row, length)
            self._conditions = torch.cat([self._conditions[:first].to(conditions), conditions])
            self._running += rows
        except Exception:
            if len(jobs) > 1:  # one prompt must not end the others, and one alone needs less memory
                for job in jobs:
                    self._read([job])
                return
            log.exception("a prompt could not be read")
            self._finish(jobs[0], Chunk("", 0, finish_reason="error"))

    def _start(self, job: Job, length: int) -> _Running:
        generator = torch.Generator(self.stepper.device).manual_seed(job.seed)
        text = TextStream(self.tokenizer, job.stop, job.prompt_ids)
        return _Running(job, generator, text, length, time.perf_counter())

    def _step(self) -> None:
        """A chunk for every running sequence, and a step of the backbone for those that continue."""
        if not self._running:
            return
        self.telemetry.batch.observe(len(self._running))
        chunks, is_drawn = self._draw()
        # The device is read once.
        rows = torch.cat([chunks.tokens, chunks.num_drawn[:, None], chunks.num_decoded[:, None]], dim=1).tolist()
        ended = [
            running.failed or (is_drawn[slot] and self._take(running, rows[slot][:-2], *rows[slot][-2:]))
            for slot, running in enumerate(self._running)
        ]
        tokens = chunks.tokens
        for slot in reversed(range(len(ended))):
            if ended[slot]:
                if self._running[slot].failed:
                    self._finish(self._running[slot].job, Chunk("", 0, finish_reason="error"))
                self._remove(slot, tokens, is_drawn)
        self._extend(tokens, is_drawn)

    def _extend(self, tokens: torch.Tensor, is_drawn: list[bool]) -> None:
        """Feed chunks back; where memory does not suffice, end the newest sequences until it does."""
        while any(is_drawn[: len(self._running)]):
            count = len(self._running)
            # A sequence without its next chunk writes where that chunk will be written. Its last chunk is not fed back.
            last = self.cache.num_positions - 1
            places = [min(running.position, last) for running in self._running]
            positions = torch.tensor(places, device=self.stepper.device)
            mask = self.cache.next_step(positions, max(places) + 1)
            try:
                with self._own_keys(places):
                    conditions = self.stepper.step(tokens[:count], positions, mask, self.cache)
            except Exception as error:
                if count == 1 or not is_out_of_memory(error):
                    raise
                log.error("no memory for a step of %d sequences: the newest one ends", count)
                newest = max(range(count), key=lambda slot: self._running[slot].job.arrived)
                self._finish(self._running[newest].job, Chunk("", 0, finish_reason="error"))
                self._remove(newest, tokens, is_drawn)
                continue
            if not all(is_drawn[:count]):
                drawn = torch.tensor(is_drawn[:count], device=conditions.device)
                conditions = torch.where(drawn[:, None], conditions, self._conditions)
            self._conditions = conditions
            for slot, running in enumerate(self._running):
                running.position += is_drawn[slot]
            return

    @contextmanager
    def _own_keys(self, places: list[int]) -> Iterator[None]:
        """Tell batch-invariant attention how many keys each sequence has while the last of them is written."""
        if self.invariance:
            self.invariance.lengths = [place + 1 for place in places]
        try:
            yield
        finally:
            if self.invariance:
                self.invariance.lengths = None

    def _draw(self) -> tuple[NextChunk, list[bool]]:
        """Draw chunks of all running sequences, those with the same settings together; return also which have one."""
        groups: dict[Sampling, list[int]] = {}
        for slot, running in enumerate(self._running):
            if running.search is None:
                groups.setdefault(running.job.sampling, []).append(slot)
        count, size = len(self._running), self.stepper.patch_size
        tokens = torch.zeros((count, size), dtype=torch.long, device=self.stepper.device)
        chunks = NextChunk(tokens, *torch.zeros((2, count), dtype=torch.long, device=self.stepper.device))
        is_drawn = [False] * count
        for sampling, slots in groups.items():
            rows = [self._running[slot] for slot in slots]
            rounds = self.stepper.draw_in_rounds(self._conditions[slots], sampling, [row.generator for row in rows])
            if rounds is None:
                self._draw_at_once(slots, sampling, chunks, is_drawn)
            else:
                search = _Search(rows, rounds)
                for row in rows:
                    row.search = search
        for search in {id(row.search): row.search for row in self._running if row.search is not None}.values():
            self._draw_round(search, chunks, is_drawn)
        return chunks, is_drawn

    def _draw_at_once(self, slots: list[int], sampling: Sampling, chunks: NextChunk, is_drawn: list[bool]) -> None:
        """Draw chunks into ``chunks``; where memory does not suffice, for half of the sequences at a time."""
        generators = [self._running[slot].generator for slot in slots]
        states = [generator.get_state() for generator in generators]
        chunk: NextChunk | None = None
        try:
            chunk = self.stepper.draw(self._conditions[slots], sampling, generators)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        if chunk is not None:
            _put(chunk, range(len(slots)), chunks, slots, is_drawn)
        elif len(slots) == 1:
            log.error("no memory for the next chunk of a sequence")
            self._running[slots[0]].failed = True
        else:
            for generator, state in zip(generators, states, strict=True):
                generator.set_state(state)
            half = len(slots) // 2
            self._draw_at_once(slots[:half], sampling, chunks, is_drawn)
            self._draw_at_once(slots[half:], sampling, chunks, is_drawn)

    def _draw_round(self, search: _Search, chunks: NextChunk, is_drawn: list[bool]) -> None:
        slots = {id(running): slot for slot, running in enumerate(self._running) if running.search is search}
        try:
            chunk, final = next(search.rounds)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            log.error("no memory for the next chunks of %d sequence(s)", len(slots))
            for slot in slots.values():
                self._running[slot].failed = True
            return
        done = [row for row, is_final in enumerate(final.tolist()) if is_final and id(search.rows[row]) in slots]
        _put(chunk, done, chunks, [slots[id(search.rows[row])] for row in done], is_drawn)
        for row in done:
            search.rows[row].search = None

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

    def _remove(self, slot: int, tokens: torch.Tensor, is_drawn: list[bool]) -> None:
        """End a slot, as :meth:`_free`, with what was drawn for it."""
        last = len(self._running) - 1
        tokens[slot], is_drawn[slot] = tokens[last], is_drawn[last]
        self._free(slot)

    def _free(self, slot: int) -> None:
        """End a slot; the last running sequence takes its place."""
        last = self._running.pop()
        if slot < len(self._running):
            self.cache.move(len(self._running), slot, last.position)
            self._conditions[slot] = self._conditions[len(self._running)]
            self._running[slot] = last
        self._conditions = self._conditions[: len(self._running)]


def _put(chunk: NextChunk, rows: Sequence[int], chunks: NextChunk, slots: list[int], is_drawn: list[bool]) -> None:
    """Copy rows of a chunk to the slots of their sequences."""
    rows = list(rows)
    chunks.tokens[slots] = chunk.tokens[rows]
    chunks.num_drawn[slots], chunks.num_decoded[slots] = chunk.num_drawn[rows], chunk.num_decoded[rows]
    for slot in slots:
        is_drawn[slot] = True
