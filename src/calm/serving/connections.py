"""Connections that cannot hold the server: what uvicorn has no setting for, added to its HTTP protocol.

uvicorn closes a connection that is idle *between* requests. It has no time-out for the headers of a request and none
for a client that does not read its answer, and it accepts connections until no descriptor is left.
"""

import asyncio
import os
from dataclasses import dataclass, field
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

_REFUSAL = b"HTTP/1.1 503 Service Unavailable\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
_SPARE = 8  # descriptors for other files
# asyncio accepts this many connections in a turn of its loop, before any of them can be counted.
_MOST_ACCEPTED = 32
_TURNS = 5  # from the accepting of a connection to its closing


@dataclass
class ConnectionLimits:
    """
    Args:
        max_connections: connections at a time. At the limit a new connection replaces the one that has waited longest
            for the end of its headers; where all have requests that run, it gets status 503.
        header_timeout: seconds from the start of a connection to the end of the headers of its first request.
        idle_timeout: the same for further requests, from the end of the answer before.
        write_timeout: seconds that a client may let data wait without reading any.
    """

    max_connections: int = 1000
    header_timeout: float = 10.0
    idle_timeout: float = 30.0
    write_timeout: float = 30.0
    # Those without a running request, oldest first.
    idle: "dict[BoundedProtocol, asyncio.TimerHandle]" = field(default_factory=dict, repr=False)


class BoundedProtocol(H11Protocol):
    """uvicorn's protocol with :class:`ConnectionLimits`."""

    def __init__(self, *args: Any, limits: ConnectionLimits, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.limits = limits
        self._unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        super().connection_made(transport)
        if len(self.connections) > self.limits.max_connections:
            longest = next(iter(self.limits.idle), None)
            if longest is None:
                transport.write(_REFUSAL)
                transport.close()
            else:
                longest.end()
        self._wait_for_request(self.limits.header_timeout)

    def handle_events(self) -> None:
        super().handle_events()
        if self.cycle is not None and not self.cycle.response_complete:  # the headers of a request are complete
            self._stop_waiting()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.cycle.response_complete:  # otherwise the client had sent its next request already
            self._wait_for_request(self.limits.idle_timeout)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread = self.loop.call_later(self.limits.write_timeout, self.end)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        if self._unread is not None:
            self._unread.cancel()
        super().connection_lost(exc)

    def end(self) -> None:
        """Close the connection at once; what the client has not read is lost."""
        self._stop_waiting()
        self.transport.abort()

    def _wait_for_request(self, seconds: float) -> None:
        self._stop_waiting()
        self.limits.idle[self] = self.loop.call_later(seconds, self.end)

    def _stop_waiting(self) -> None:
        if (timer := self.limits.idle.pop(self, None)) is not None:
            timer.cancel()


def descriptor_limits(most: int = 1000) -> tuple[int, int]:
    """Return how many connections the process has file descriptors for, and how many to accept at once.

    Raises ValueError where there are too few to serve.
    """
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return most, _MOST_ACCEPTED
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if limit == resource.RLIM_INFINITY:
        return most, _MOST_ACCEPTED
    free = limit - len(os.listdir("/dev/fd")) - _SPARE
    accepted = min(_MOST_ACCEPTED, max(1, free // (2 * _TURNS)))
    connections = min(most, free - _TURNS * accepted)
    if connections < 1:
        raise ValueError(f"the limit of {limit} open files leaves none for connections: raise it with `ulimit -n`.")
    return connections, accepted
