"""Responses of jobs: complete, or as server-sent events while they are generated."""

import asyncio
import json
import time
import uuid
from collections import deque
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from calm.serving.engine import EngineError
from calm.serving.errors import error_document
from calm.serving.jobs import Delta, Job, TokenLogprob
from calm.serving.logprobs import chat_logprobs, completion_logprobs
from calm.serving.schemas import SamplingRequest
from calm.serving.service import Service


@dataclass
class ResponseDocuments:
    """The documents of one response, complete or as events."""

    kind: str
    service: Service
    with_logprobs: bool
    id: str = field(default_factory=lambda: f"cmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def is_chat(self) -> bool:
        """Whether this is a response of the chat endpoint."""
        return self.kind == "chat.completion"

    def document(self, choices: list[dict], is_event: bool, **more: Any) -> dict:
        """Return a document with the common fields."""
        kind = f"{self.kind}.chunk" if is_event and self.is_chat else self.kind
        common = {"id": self.id, "object": kind, "created": self.created, "model": self.service.name}
        return common | {"choices": choices} | more

    def choice(self, index: int, text: "_Text") -> dict:
        """Return a complete text."""
        content: dict[str, Any] = {"text": text.text}
        if self.is_chat:
            content = {"message": {"role": "assistant", "content": text.text}}
        logprobs = self._logprobs(text.logprobs, 0)
        return {"index": index, **content, "finish_reason": text.finish_reason, "logprobs": logprobs}

    def delta(self, index: int, delta: Delta, before: "_Text") -> dict:
        """Return what a text gained in a step, after ``before``."""
        content: dict[str, Any] = {"text": delta.text}
        if self.is_chat:
            # Clients add up the fields of all deltas.
            role = {} if before.has_begun else {"role": "assistant"}
            content = {"delta": role | {"content": delta.text}}
        logprobs = self._logprobs(delta.logprobs, before.logprob_characters)
        return {"index": index, **content, "finish_reason": delta.finish_reason, "logprobs": logprobs}

    def _logprobs(self, logprobs: list[TokenLogprob], offset: int) -> dict | None:
        if not self.with_logprobs:
            return None
        tokenizer = self.service.tokenizer
        return chat_logprobs(tokenizer, logprobs) if self.is_chat else completion_logprobs(tokenizer, logprobs, offset)


@dataclass
class _Text:
    """A text so far."""

    text: str = ""
    finish_reason: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    logprob_characters: int = 0  # of the tokens whose log-probabilities were sent
    has_begun: bool = False

    def add(self, delta: Delta) -> None:
        """Add the delta of a step."""
        self.text += delta.text
        self.finish_reason = delta.finish_reason or ""
        self.logprobs += delta.logprobs


class Unread:
    """Deltas of a request that its client has not received yet.

    A client that reads slowly, or never, does not make the server store a delta for every step: beyond ``most`` deltas
    the next delta of a text is joined to its last one.
    """

    def __init__(self, most: int = 1024):
        self.most = most
        self._deltas: deque[tuple[int, Delta]] = deque()
        self._last: dict[int, Delta] = {}  # by text
        self._ready = asyncio.Event()

    def __len__(self) -> int:
        return len(self._deltas)

    def put(self, index: int, delta: Delta) -> None:
        """Add a delta of a text."""
        if len(self._deltas) >= self.most and index in self._last:
            self._last[index].join(delta)
            return
        self._deltas.append((index, delta))
        self._last[index] = delta
        self._ready.set()

    async def get(self) -> tuple[int, Delta]:
        """Wait for the next delta, and return it with the number of its text."""
        while not self._deltas:
            self._ready.clear()
            await self._ready.wait()
        index, delta = self._deltas.popleft()
        if self._last[index] is delta:
            del self._last[index]
        return index, delta


async def respond(
    kind: str, service: Service, body: SamplingRequest, prompts: list[list[int]], max_tokens: int, request: Request
) -> Response:
    """Generate the texts of a request; a client that disconnects ends it.

    Args:
        kind: of the response, ``"text_completion"`` or ``"chat.completion"``.
    """
    documents = ResponseDocuments(kind, service, body.num_logprobs is not None)
    unread = Unread()
    loop = asyncio.get_running_loop()

    def emit(index: int, delta: Delta) -> None:
        with suppress(RuntimeError):  # the server has stopped: no client waits for the result
            loop.call_soon_threadsafe(unread.put, index, delta)

    jobs = service.jobs(body, prompts, max_tokens, emit)
    service.engine.submit(jobs)
    usage = {"prompt_tokens": sum(map(len, prompts)), "completion_tokens": 0, "total_tokens": 0}
    if body.stream:
        with_usage = body.stream_options is not None and bool(body.stream_options.include_usage)
        content = _events(documents, jobs, unread, usage, with_usage)
        return _Stream(content, jobs)
    gone = asyncio.create_task(_client_gone(request))
    try:
        texts = await _collect(jobs, unread, gone)
    finally:
        gone.cancel()
        for job in jobs:
            job.cancel()  # without effect on those that have ended
    _count(usage, jobs)
    choices = [documents.choice(index, text) for index, text in enumerate(texts)]
    return JSONResponse(documents.document(choices, is_event=False, usage=usage))


async def _collect(jobs: list[Job], unread: Unread, gone: asyncio.Task) -> list[_Text]:
    """Return all texts; they are incomplete when the client is gone."""
    texts = [_Text() for _ in jobs]
    while not all(text.finish_reason for text in texts):
        event = asyncio.create_task(unread.get())
        await asyncio.wait({event, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not event.done():
            event.cancel()
            return texts
        index, delta = event.result()
        if delta.finish_reason == "error":
            raise EngineError("a step of the engine failed")
        texts[index].add(delta)
    return texts


async def _events(
    documents: ResponseDocuments, jobs: list[Job], unread: Unread, usage: dict, with_usage: bool
) -> AsyncIterator[str]:
    """Yield server-sent events."""
    running = len(jobs)
    before = [_Text() for _ in jobs]
    while running:
        index, delta = await unread.get()
        running -= delta.finish_reason is not None
        if delta.finish_reason == "error":
            yield _event(error_document(500, "the server failed in the middle of this response", "internal_error"))
            return
        cost = {
            "tokens": delta.num_tokens, "samples": delta.num_samples, "decoded": delta.num_decoded,
            "milliseconds": round(delta.milliseconds, 2),
            "drawn": delta.num_samples,  # the former name of samples, for one release
        }  # fmt: skip
        more = {"usage": None} if with_usage else {}
        choice = documents.delta(index, delta, before[index])
        yield _event(documents.document([choice], is_event=True, calm=cost, **more))
        before[index].has_begun = True
        if choice["logprobs"] and not documents.is_chat:
            before[index].logprob_characters += sum(map(len, choice["logprobs"]["tokens"]))
    if with_usage:
        _count(usage, jobs)
        yield _event(documents.document([], is_event=True, usage=usage))
    yield "data: [DONE]\n\n"


class _Stream(StreamingResponse):
    """Events of jobs, which end with it, also when the client is gone before the first event."""

    def __init__(self, content: AsyncIterator[str], jobs: list[Job]):
        super().__init__(content, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self.jobs = jobs

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            for job in self.jobs:
                job.cancel()


def _event(document: dict) -> str:
    return f"data: {json.dumps(document, ensure_ascii=False)}\n\n"


def _count(usage: dict, jobs: list[Job]) -> None:
    usage["completion_tokens"] = sum(job.num_tokens for job in jobs)
    usage["total_tokens"] = usage["prompt_tokens"] + usage["completion_tokens"]


async def _client_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
