"""Continuous batching: one loop steps all running sequences together, one patch each.

Sequences join and leave at any step. Each has random numbers of its own, and rows of a batch do not see each other, so
that a text depends on its prompt, its parameters and its seed alone.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from transformers import PreTrainedTokenizerBase
from transformers.cache_utils import Cache

from calm.functional.tiles import is_out_of_memory
from calm.generation.model_runner import ModelRunner
from calm.generation.samplers import SampledPatches
from calm.generation.sampling_params import SamplingParams
from calm.models.context import positions_needed, room_for_new
from calm.serving.batch_invariance import BatchInvariance
from calm.serving.jobs import Delta, Job, TokenLogprob
from calm.serving.next_patches import NextPatches
from calm.serving.running import Rounds, Running
from calm.serving.slots import SlotCache
from calm.serving.telemetry import Telemetry
from calm.serving.text import TextStream

log = logging.getLogger(__name__)
_PREFILL_TOKENS = 16384  # tokens of prompts that are read together, with what fills up the shorter ones


class QueueFullError(RuntimeError):
    """The queue of the engine is full, or the server shuts down."""


class EngineError(RuntimeError):
    """A step failed because of an internal error, which is in the log."""


class Engine:
    """Run the jobs of one model in a thread of its own.

    Args:
        max_batch: sequences that run at a time; each has a slot of the cache.
        context: tokens of prompt and continuation together, at most.
        max_queue: sequences that may wait.
        batch_invariant: whether the text of a sequence must not depend on the others, not even by rounding.

    Attributes:
        num_spare: positions of the cache after the longest sequence.
    """

    num_spare = 0

    def __init__(
        self,
        runner: ModelRunner,
        tokenizer: PreTrainedTokenizerBase,
        max_batch: int,
        context: int,
        max_queue: int,
        telemetry: Telemetry,
        batch_invariant: bool = False,
    ):
        self.invariance = BatchInvariance() if batch_invariant else None
        self.runner, self.tokenizer = runner, tokenizer
        self.max_batch, self.max_queue = max_batch, max_queue
        self.context = context // runner.patch_size * runner.patch_size
        num_positions = context // runner.patch_size
        self.cache = SlotCache(
            runner.backbone_config, max_batch, num_positions, runner.dtype, runner.device, self.num_spare
        )
        self.telemetry = telemetry
        telemetry.watch(self)
        self._waiting: deque[Job] = deque()
        self._running: list[Running] = []  # in the order of their slots
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
        """Return the number of new tokens that fit after a prompt, at least one; :meth:`check` refuses more."""
        return max(1, room_for_new(self.cache.num_positions, num_prompt, self.runner.patch_size))

    def check(self, job: Job) -> None:
        """Raise ValueError when the model cannot do a job, whose parameters are resolved."""
        if job.prompt_ids and not 0 <= min(job.prompt_ids) <= max(job.prompt_ids) < self.runner.vocab_size:
            raise ValueError(f"prompt has token ids outside 0 to {self.runner.vocab_size - 1}.")
        patch_size = self.runner.patch_size
        if positions_needed(len(job.prompt_ids), job.max_new_tokens, patch_size) > self.cache.num_positions:
            room = room_for_new(self.cache.num_positions, len(job.prompt_ids), patch_size)
            remedy = f"shorten the prompt, or request at most {room} tokens" if room > 0 else "shorten the prompt"
            raise ValueError(
                f"the prompt ({len(job.prompt_ids)} tokens) and max_tokens ({job.max_new_tokens}) exceed the context "
                f"of {self.context} tokens: {remedy}."
            )

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue jobs, all or none; raise :class:`QueueFullError` when the queue is full."""
        with self._changed:
            if self._stopping:
                raise QueueFullError("the server is shutting down")
            # Jobs that get a free slot at once do not wait.
            if len(self._waiting) + len(self._running) + len(jobs) > self.max_queue + self.max_batch:
                raise QueueFullError(f"{len(self._waiting)} sequences are waiting already")
            self._waiting.extend(jobs)
            self._changed.notify()

    def stop(self) -> None:
        """Finish the running and waiting jobs, then end the thread."""
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
                # Internal errors do not stop the engine loop; affected requests receive an error response.
                log.exception("a step failed")
                for running in self._running:
                    self._finish(running.job, Delta("", 0, finish_reason="error"))
                self._running = []

    def _drop_cancelled(self) -> None:
        with self._changed:
            gone = [job for job in self._waiting if job.cancelled]
            for job in gone:
                self._waiting.remove(job)
        for job in gone:
            self._finish(job, Delta("", 0, finish_reason="cancelled"))
        for slot in reversed(range(len(self._running))):
            if self._running[slot].job.cancelled:
                self._finish(self._running[slot].job, Delta("", 0, finish_reason="cancelled"))
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
            prompts = [self.runner.whole_patches(job.prompt_ids) for job in jobs]
            conditions, cache, lengths = self._prefill(prompts)
            rows = [self._start(job, length) for job, length in zip(jobs, lengths, strict=True)]
            first = len(self._running)
            for row, length in enumerate(lengths):
                self.cache.put(first + row, cache, row, length)
            self._conditions = torch.cat([self._conditions[:first].to(conditions), conditions])
            self._running += rows
        except Exception:
            if len(jobs) > 1:  # one prompt must not fail the others, and one alone needs less memory
                for job in jobs:
                    self._read([job])
                return
            log.exception("a prompt could not be read")
            self._finish(jobs[0], Delta("", 0, finish_reason="error"))

    def _prefill(self, prompts: list[list[int]]) -> tuple[torch.Tensor, Cache, list[int]]:
        return self.runner.prefill(prompts)

    def _start(self, job: Job, length: int) -> Running:
        generator = torch.Generator(self.runner.device).manual_seed(job.params.seed or 0)
        text = TextStream(self.tokenizer, job.params.stop, job.prompt_ids)
        return Running(job, generator, text, length, time.perf_counter())

    def _step(self) -> None:
        """Sample a patch for every running sequence, and step the backbone for those that continue."""
        if not self._running:
            return
        self.telemetry.batch.observe(len(self._running))
        sampled = self._sample()
        patches, is_ready = sampled.all, sampled.is_ready
        # The device is read once.
        counters = [patches.num_samples[:, None], patches.num_decoded[:, None]]
        rows = torch.cat([patches.tokens, *counters], dim=1).tolist()
        ended = [
            running.failed or (is_ready[slot] and self._take(running, rows[slot], sampled.logprobs.get(slot)))
            for slot, running in enumerate(self._running)
        ]
        tokens = patches.tokens
        for slot in reversed(range(len(ended))):
            if ended[slot]:
                if self._running[slot].failed:
                    self._finish(self._running[slot].job, Delta("", 0, finish_reason="error"))
                self._remove(slot, tokens, is_ready)
        self._extend(tokens, is_ready)

    def _extend(self, tokens: torch.Tensor, is_ready: list[bool]) -> None:
        """Feed patches back; when memory does not suffice, end the newest sequences until it does."""
        while any(is_ready[: len(self._running)]):
            count = len(self._running)
            # A sequence without its next patch writes where that patch will be written. The last patch of a sequence is
            # not fed back.
            last = self.cache.num_positions - 1
            places = [min(running.position, last) for running in self._running]
            positions = torch.tensor(places, device=self.runner.device)
            mask = self.cache.next_step(positions, max(places) + 1)
            try:
                with self._own_keys(places):
                    conditions = self.runner.step(tokens[:count], positions, mask, self.cache)
            except Exception as error:
                if count == 1 or not is_out_of_memory(error):
                    raise
                log.error("no memory for a step of %d sequences: the newest one ends", count)
                newest = max(range(count), key=lambda slot: self._running[slot].job.arrived)
                self._finish(self._running[newest].job, Delta("", 0, finish_reason="error"))
                self._remove(newest, tokens, is_ready)
                continue
            if not all(is_ready[:count]):
                ready = torch.tensor(is_ready[:count], device=conditions.device)
                conditions = torch.where(ready[:, None], conditions, self._conditions)
            self._conditions = conditions
            for slot, running in enumerate(self._running):
                running.position += is_ready[slot]
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

    def _sample(self) -> NextPatches:
        """Sample patches of all running sequences, those with the same parameters together."""
        groups: dict[SamplingParams, list[int]] = {}
        for slot, running in enumerate(self._running):
            if running.rounds is None:
                groups.setdefault(running.job.step_params, []).append(slot)
        sampled = NextPatches(len(self._running), self.runner)
        for params, slots in groups.items():
            rows = [self._running[slot] for slot in slots]
            generators = [row.generator for row in rows]
            iterator = self.runner.sample_in_rounds(self._conditions[slots], params, generators, log.warning)
            if iterator is None:
                self._sample_at_once(slots, params, sampled)
            else:
                rounds = Rounds(rows, iterator)
                for row in rows:
                    row.rounds = rounds
        for rounds in {id(row.rounds): row.rounds for row in self._running if row.rounds is not None}.values():
            self._sample_round(rounds, sampled)
        return sampled

    def _sample_at_once(self, slots: list[int], params: SamplingParams, sampled: NextPatches) -> None:
        """Sample patches of some slots; when memory does not suffice, of half of them at a time."""
        generators = [self._running[slot].generator for slot in slots]
        states = [generator.get_state() for generator in generators]
        patches: SampledPatches | None = None
        try:
            patches = self.runner.sample(self._conditions[slots], params, generators)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        if patches is not None:
            sampled.put(slots, patches, range(len(slots)))
        elif len(slots) == 1:
            log.error("no memory for the next patch of a sequence")
            self._running[slots[0]].failed = True
        else:
            for generator, state in zip(generators, states, strict=True):
                generator.set_state(state)
            half = len(slots) // 2
            self._sample_at_once(slots[:half], params, sampled)
            self._sample_at_once(slots[half:], params, sampled)

    def _sample_round(self, rounds: Rounds, sampled: NextPatches) -> None:
        """Run one round; sequences that are ready leave it."""
        slots = {id(running): slot for slot, running in enumerate(self._running) if running.rounds is rounds}
        try:
            patches, final = next(rounds.iterator)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            log.error("no memory for the next patches of %d sequence(s)", len(slots))
            for slot in slots.values():
                self._running[slot].failed = True
            return
        done = [row for row, is_final in enumerate(final.tolist()) if is_final and id(rounds.rows[row]) in slots]
        sampled.put([slots[id(rounds.rows[row])] for row in done], patches, done)
        for row in done:
            rounds.rows[row].rounds = None

    def _take(
        self,
        running: Running,
        row: list[int],
        logprobs: list[TokenLogprob] | None,
    ) -> bool:
        """Add a patch to a sequence, ``row``: its tokens, and the counts of samples and of decoded tokens.

        Returns:
            whether the sequence ends with it.
        """
        *tokens, num_samples, num_decoded = row
        job, now = running.job, time.perf_counter()
        tokens = tokens[: job.max_new_tokens - job.num_tokens]
        end = next((index for index, token in enumerate(tokens) if token in self.runner.end_ids), None)
        reason = None if end is None else "stop"
        tokens = tokens[:end]
        job.num_tokens += len(tokens)
        if reason is None and job.num_tokens >= job.max_new_tokens:
            reason = "length"
        text = running.text.add(tokens, last=reason is not None)
        if running.text.stopped:
            reason = "stop"
        if job.first_patch is None:
            job.first_patch = now - job.arrived
            self.telemetry.first_chunk.observe(job.first_patch)
        self.telemetry.chunks.inc()
        self.telemetry.tokens.inc(len(tokens))
        milliseconds = 1000 * (now - running.since)
        logprobs = (logprobs or [])[: len(tokens)]
        delta = Delta(text, len(tokens), num_samples, num_decoded, milliseconds, reason, logprobs)
        running.since = now
        if reason is None:
            self._emit(job, delta)
        else:
            self._finish(job, delta)
        return reason is not None

    def _finish(self, job: Job, delta: Delta) -> None:
        self.telemetry.finished(delta.finish_reason)
        self._emit(job, delta)

    def _emit(self, job: Job, delta: Delta) -> None:
        try:
            job.emit(delta)
        except Exception:  # a receiver must not end the engine
            log.exception("a patch could not be passed to its request")
            job.cancel()

    def _remove(self, slot: int, tokens: torch.Tensor, is_ready: list[bool]) -> None:
        """End a slot as :meth:`_free` does; the last sequence takes its sampled patch along."""
        last = len(self._running) - 1
        tokens[slot], is_ready[slot] = tokens[last], is_ready[last]
        self._free(slot)

    def _free(self, slot: int) -> None:
        """End a slot; the last running sequence moves into it."""
        last = self._running.pop()
        if slot < len(self._running):
            self.cache.move(len(self._running), slot, last.position)
            self._conditions[slot] = self._conditions[len(self._running)]
            self._running[slot] = last
        self._conditions = self._conditions[: len(self._running)]
