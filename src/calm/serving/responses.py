"""From jobs to answers: whole, or as server-sent events while they are generated."""

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
from calm.serving.jobs import Chunk, Job
from calm.serving.schemas import SamplingRequest
from calm.serving.service import Service


@dataclass
class Answer:
    """Documents of one answer, whole or as events."""

    kind: str
    model: str
    id: str = field(default_factory=lambda: f"cmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def document(self, choices: list[dict], chunk: bool, **more: Any) -> dict:
        kind = f"{self.kind}.chunk" if chunk and self.kind == "chat.completion" else self.kind
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices} | more

    def choice(self, index: int, text: str, finish_reason: str | None) -> dict:
        content: dict[str, Any] = {"text": text}
        if self.kind == "chat.completion":
            content = {"message": {"role": "assistant", "content": text}}
        return {"index": index, **content, "finish_reason": finish_reason, "logprobs": None}

    def delta(self, index: int, chunk: Chunk, is_first: bool) -> dict:
        content: dict[str, Any] = {"text": chunk.text}
        if self.kind == "chat.completion":
            # Clients add up the fields of all deltas.
            role = {"role": "assistant"} if is_first else {}
            content = {"delta": role | {"content": chunk.text}}
        return {"index": index, **content, "finish_reason": chunk.finish_reason, "logprobs": None}


class Unread:
    """Chunks of a request that its client has not taken yet.

    A client that reads slowly, or never, does not make the server hold a chunk for every step: beyond ``most`` chunks a
    text's next chunk is joined to its last one.
    """

    def __init__(self, most: int = 1024):
        self.most = most
        self._chunks: deque[tuple[int, Chunk]] = deque()
        self._last: dict[int, Chunk] = {}  # by text
        self._ready = asyncio.Event()

    def __len__(self) -> int:
        return len(self._chunks)

    def put(self, index: int, chunk: Chunk) -> None:
        if len(self._chunks) >= self.most and index in self._last:
            self._last[index].join(chunk)
            return
        self._chunks.append((index, chunk))
        self._last[index] = chunk
        self._ready.set()

    async def get(self) -> tuple[int, Chunk]:
        while not self._chunks:
            self._ready.clear()
            await self._ready.wait()
        index, chunk = self._chunks.popleft()
        if self._last[index] is chunk:
            del self._last[index]
        return index, chunk


async def respond(
    kind: str, service: Service, body: SamplingRequest, prompts: list[list[int]], max_tokens: int, request: Request
) -> Response:
    """Generate what a request asks for; a client that goes away ends it.

    Args:
        kind: of the answer, ``"text_completion"`` or ``"chat.completion"``.
    """
    answer = Answer(kind, service.name)
    events = Unread()
    loop = asyncio.get_running_loop()

    def emit(index: int, chunk: Chunk) -> None:
        with suppress(RuntimeError):  # the server has ended, and nobody waits for this
            loop.call_soon_threadsafe(events.put, index, chunk)

    jobs = service.jobs(body, prompts, max_tokens, emit)
    service.engine.submit(jobs)
    usage = {"prompt_tokens": sum(map(len, prompts)), "completion_tokens": 0, "total_tokens": 0}
    if body.stream:
        asked = body.stream_options is not None and bool(body.stream_options.include_usage)
        content = _events(answer, jobs, events, usage, asked)
        return _Stream(content, jobs)
    gone = asyncio.create_task(_client_gone(request))
    try:
        texts, reasons = await _collect(jobs, events, gone)
    finally:
        gone.cancel()
        for job in jobs:
            job.cancel()  # those that have ended do not mind
    _count(usage, jobs)
    choices = [
        answer.choice(index, text, reason) for index, (text, reason) in enumerate(zip(texts, reasons, strict=True))
    ]
    return JSONResponse(answer.document(choices, chunk=False, usage=usage))


async def _collect(jobs: list[Job], events: Unread, gone: asyncio.Task) -> tuple[list[str], list[str]]:
    """All texts; they stay short when the client is gone, and nobody will see them."""
    texts, reasons = [""] * len(jobs), [""] * len(jobs)
    while not all(reasons):
        event = asyncio.create_task(events.get())
        await asyncio.wait({event, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not event.done():
            event.cancel()
            return texts, reasons
        index, chunk = event.result()
        if chunk.finish_reason == "error":
            raise EngineError("a step of the engine failed")
        texts[index] += chunk.text
        reasons[index] = chunk.finish_reason or ""
    return texts, reasons


async def _events(answer: Answer, jobs: list[Job], events: Unread, usage: dict, with_usage: bool) -> AsyncIterator[str]:
    """Server-sent events."""
    running = len(jobs)
    begun: set[int] = set()
    while running:
        index, chunk = await events.get()
        running -= chunk.finish_reason is not None
        if chunk.finish_reason == "error":
            yield _event(error_document(500, "the server failed in the middle of this answer", "internal_error"))
            return
        about = {
            "tokens": chunk.num_tokens, "drawn": chunk.num_drawn, "decoded": chunk.num_decoded,
            "milliseconds": round(chunk.milliseconds, 2),
        }  # fmt: skip
        more = {"usage": None} if with_usage else {}
        yield _event(answer.document([answer.delta(index, chunk, index not in begun)], chunk=True, calm=about, **more))
        begun.add(index)
    if with_usage:
        _count(usage, jobs)
        yield _event(answer.document([], chunk=True, usage=usage))
    yield "data: [DONE]\n\n"


class _Stream(StreamingResponse):
    """Events of jobs, which end with it: also where the client is gone before the first event."""

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
