"""What every request meets first: the host it names, its key, its size."""

import asyncio
import hmac
import json
from collections.abc import Sequence
from typing import Any

from calm.serving.errors import error_document
from calm.serving.telemetry import Metrics

_PATIENCE = 16  # times the largest body
LOOPBACK = ("127.0.0.1", "localhost", "::1")
# The page has to load before a user can enter a key.
_PAGE = ("/api.js", "/chart.js", "/page.css", "/page.js", "/pane.js")
_OPEN = ("/", "/health", *_PAGE)
_PATHS = (*_OPEN, "/metrics", "/v1/models", "/v1/completions", "/v1/chat/completions")


class Guard:
    """ASGI middleware; counts requests as well.

    Args:
        api_keys: one of them is asked for as a bearer token, where there are any.
        hosts: names a request may give as its host, so that no page of another site can reach a server of this
            machine by a name of its own; None allows all.
        max_body: bytes.
        body_timeout: seconds that a body may take to arrive; one that never does would keep the server from ending.
    """

    def __init__(
        self,
        app: Any,
        metrics: Metrics,
        api_keys: Sequence[str] = (),
        hosts: Sequence[str] | None = None,
        max_body: int = 2**20,
        body_timeout: float = 30.0,
    ):
        self.app, self.metrics, self.hosts, self.max_body = app, metrics, hosts, max_body
        self.body_timeout = body_timeout
        self.api_keys = [key.encode() for key in api_keys]

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        send = self._counted(scope["path"], send)
        if scope.get("method") == "HEAD":  # what a GET says of itself
            scope, send = scope | {"method": "GET"}, _without_body(send)
        if self.hosts is not None and _host(headers.get(b"host", b"")) not in self.hosts:
            await refuse(send, 421, "this server answers to " + ", ".join(self.hosts), "wrong_host")
        elif not self._knows(headers.get(b"authorization", b"")) and scope["path"] not in _OPEN:
            await refuse(send, 401, "a valid API key is needed, as a bearer token", "invalid_api_key")
        else:
            try:
                body = await asyncio.wait_for(self._read(receive), self.body_timeout)
            except TimeoutError:
                message = f"the body of the request did not arrive within {self.body_timeout:g} seconds"
                await refuse(send, 408, message, "request_timeout")
                return
            if body is None:
                await refuse(send, 413, f"the request is larger than {self.max_body:,} bytes", "request_too_large")
            else:
                await self.app(scope, _replay(body, receive), send)

    def _counted(self, path: str, send: Any) -> Any:
        async def count(message: dict) -> None:
            if message["type"] == "http.response.start":
                known = path if path in _PATHS else "other"
                self.metrics.requests.labels(known, message["status"]).inc()
            await send(message)

        return count

    def _knows(self, authorization: bytes) -> bool:
        if not self.api_keys:
            return True
        given = authorization.removeprefix(b"Bearer ")
        # All of them, each in constant time: nothing can be learned from how long it takes.
        matches = [hmac.compare_digest(given, key) for key in self.api_keys]
        return any(matches)

    async def _read(self, receive: Any) -> bytes | None:
        """The body; None when it is too large, in which case some more of it is read and forgotten.

        A client that is still sending would not see an answer, but a broken connection.
        """
        parts, size = [], 0
        while size <= _PATIENCE * self.max_body:
            message = await receive()
            part = message.get("body", b"")
            size += len(part)
            if size <= self.max_body:
                parts.append(part)
            if not message.get("more_body", False):
                break
        return b"".join(parts) if size <= self.max_body else None


def _without_body(send: Any) -> Any:
    async def head(message: dict) -> None:
        await send(message | {"body": b""} if message["type"] == "http.response.body" else message)

    return head


def _replay(body: bytes, receive: Any) -> Any:
    given = False

    async def again() -> dict:
        nonlocal given
        if given:
            return await receive()  # what comes next is that the client is gone
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


def _host(header: bytes) -> str:
    name = header.decode("latin-1").lower()
    return name[1:].partition("]")[0] if name.startswith("[") else name.partition(":")[0]


async def refuse(send: Any, status: int, message: str, code: str) -> None:
    body = json.dumps(error_document(status, message, code)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status in (408, 413):
        headers.append((b"connection", b"close"))  # the rest of the body is not read
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
