"""Clients that hold connections: they take neither the server's place for others nor its end."""

import asyncio
import socket
import threading
from functools import partial

import httpx2 as httpx
import pytest
import uvicorn

from calm.serving import connections
from calm.serving.connections import BoundedProtocol, ConnectionLimits, descriptor_limits

PIECE = b"x" * 2**16


@pytest.fixture
def server_of():
    """Starts servers of a small application: `/` answers at once, `/endless` streams until the client is gone."""
    running = []

    def start(**limits):
        gone = threading.Event()

        async def app(scope, receive, send):
            await send({"type": "http.response.start", "status": 200, "headers": []})
            if scope["path"] == "/endless":
                leaving = asyncio.create_task(wait_for_disconnect(receive))
                while not leaving.done():
                    await send({"type": "http.response.body", "body": PIECE, "more_body": True})
                    await asyncio.sleep(0)
                gone.set()
            await send({"type": "http.response.body", "body": b"here"})

        protocol = partial(BoundedProtocol, limits=ConnectionLimits(**limits))
        server = uvicorn.Server(
            uvicorn.Config(app, http=protocol, ws="none", lifespan="off", log_level="error", access_log=False)
        )
        listener = socket.create_server(("127.0.0.1", 0))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        running.append((server, thread))
        return listener.getsockname(), gone

    yield start
    for server, thread in running:
        server.should_exit = True
        thread.join()


async def wait_for_disconnect(receive):
    while (await receive())["type"] != "http.disconnect":
        pass


def connect(address, data=b""):
    client = socket.create_connection(address, timeout=60)
    client.sendall(data)
    return client


def closed(client):
    """Waits for the end of a connection."""
    try:
        while client.recv(2**16):
            pass
    except ConnectionResetError:
        pass
    client.close()


@pytest.mark.parametrize("data", [b"", b"GET / HTTP/1.1\r\nhost: a", b"GET / HTTP/1.1\r\nhost: a\r\n\r\nGET / HT"])
def test_headers_that_are_never_finished_end_a_connection(server_of, data):
    address, _ = server_of(header_timeout=0.2, idle_timeout=0.2)
    closed(connect(address, data))


def test_headers_that_come_byte_by_byte_do_not_put_the_end_off(server_of):
    address, _ = server_of(header_timeout=0.2)
    client = connect(address)
    with pytest.raises(ConnectionError):  # noqa: PT012
        while True:
            client.sendall(b"G")
            threading.Event().wait(0.02)
    client.close()


def test_a_stream_that_is_never_read_is_ended(server_of):
    address, gone = server_of(write_timeout=0.2)
    client = connect(address, b"GET /endless HTTP/1.1\r\nhost: a\r\n\r\n")
    assert gone.wait(timeout=60)
    client.close()


def test_at_the_limit_a_new_connection_replaces_the_one_that_waited_longest(server_of):
    address, _ = server_of(max_connections=3, header_timeout=60)
    slow = [connect(address, b"GET / HTTP/1.1\r\n") for _ in range(3)]
    for _ in range(5):
        assert httpx.get(f"http://{address[0]}:{address[1]}/", timeout=60).text == "here"
    closed(slow[0])
    for client in slow[1:]:
        client.close()


def test_where_all_connections_have_requests_a_new_one_is_refused(server_of):
    address, _ = server_of(max_connections=2, write_timeout=60)
    busy = [connect(address, b"GET /endless HTTP/1.1\r\nhost: a\r\n\r\n") for _ in range(2)]
    for client in busy:
        assert client.recv(100).startswith(b"HTTP/1.1 200")
    refused = connect(address)
    assert refused.recv(100).startswith(b"HTTP/1.1 503")
    for client in [*busy, refused]:
        client.close()


@pytest.mark.parametrize(("limit", "expected"), [(100_000, 1000), (1024, 800), (64, 20)])
def test_connections_leave_descriptors_for_what_is_accepted_at_once(monkeypatch, limit, expected):
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(resource, "getrlimit", lambda _: (limit, limit))
    monkeypatch.setattr(connections.os, "listdir", lambda _: [""] * 10)
    most, accepted = descriptor_limits()
    assert expected <= most <= limit - 10 - 5 * accepted
    monkeypatch.setattr(resource, "getrlimit", lambda _: (16, 16))
    with pytest.raises(ValueError, match="limit of 16 open files leaves none for connections: raise it with"):
        descriptor_limits()
