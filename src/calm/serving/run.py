"""Loading models and running the server until it is told to stop."""

import asyncio
import ipaddress
import logging
import os
import socket
from collections.abc import Sequence
from functools import partial
from types import FrameType

import torch
import uvicorn

from calm.checkpoints.loading import load_language_model
from calm.data.tokenizer import load_tokenizer
from calm.functional.tiles import is_out_of_memory
from calm.models.drafters import load_drafter
from calm.serving.app import create_app
from calm.serving.connections import BoundedProtocol, ConnectionLimits, descriptor_limits
from calm.serving.middleware import LOOPBACK
from calm.serving.service import Limits, Service
from calm.serving.telemetry import Metrics
from calm.utils.device import resolve_device, resolve_dtype


def run_server(
    models: dict[str, tuple[str, str]],
    limits: Limits,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_keys: Sequence[str] = (),
    insecure: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    shutdown_timeout: float = 30.0,
    drafter: str | None = None,
) -> None:
    """Serve until SIGTERM or Ctrl-C; requests that run then are finished, new ones refused.

    Args:
        models: by name, the directory or hub id of a model and of its tokenizer; the first is the default.
        insecure: allow an address that others can reach without a key.
        shutdown_timeout: seconds that requests have to finish; then their connections are closed.
        drafter: directory of a drafter of the first model.
    """
    if not 0 <= shutdown_timeout < float("inf"):
        raise ValueError(f"shutdown_timeout must be a number of seconds, 0 or more, got {shutdown_timeout}.")
    local = _is_loopback(host)
    if not (local or api_keys or insecure):
        raise ValueError(
            f"{host} can be reached from elsewhere: give --api-key-file, or --insecure to let everyone generate."
        )
    try:
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise ValueError(
            f"cannot listen on {host}:{port} ({error.strerror or error}): choose another --port."
        ) from error
    # Every chunk goes out at once; accepted connections take this from the listener.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    target = resolve_device(device)
    if target.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        # A core for the event loop: threads of a product that wait for one that is not running cost more than it gives.
        torch.set_num_threads(max(1, torch.get_num_threads() - 1))
    metrics = Metrics()
    services = []
    for index, (name, (path, tokenizer)) in enumerate(models.items()):
        model = load_language_model(path, resolve_dtype(dtype, target))
        model.to(target)  # type: ignore[arg-type]
        try:
            own_drafter = load_drafter(drafter) if drafter is not None and index == 0 else None
            services.append(Service(name, model, load_tokenizer(tokenizer), limits, metrics, own_drafter))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise ValueError(
                f"no memory for the cache of {limits.max_batch} slots of {limits.context} tokens: take a smaller "
                "--max-batch or --context."
            ) from error
        kind = f"CALM, {services[-1].patch_size} tokens a step" if services[-1].is_calm else "token model"
        if own_drafter is not None:
            kind = f"{kind}, drafts of {own_drafter.config.num_tokens} tokens"
        print(f"{name}: {kind}; {services[-1].memory()}")
    # A name that leads here from another site would let that site's pages in.
    hosts = tuple(dict.fromkeys((*LOOPBACK, host.lower()))) if local else None
    app = create_app(services, metrics, api_keys, hosts)
    shown = f"[{host}]" if ":" in host else host
    print(f"http://{shown}:{listener.getsockname()[1]}  (Ctrl-C ends it when all requests are answered)", flush=True)
    logging.basicConfig(level=logging.WARNING)
    max_connections, backlog = descriptor_limits()
    connection_limits = ConnectionLimits(max_connections)
    config = uvicorn.Config(
        app,
        http=partial(BoundedProtocol, limits=connection_limits),  # type: ignore[arg-type]
        ws="none",
        log_level="warning",
        access_log=False,
        timeout_keep_alive=int(connection_limits.idle_timeout),
        backlog=backlog,
    )
    _Server(config, services, shutdown_timeout).run(sockets=[listener])


class _Server(uvicorn.Server):
    """Ends without an error when requests are answered or their time is over; a second signal ends it at once."""

    def __init__(self, config: uvicorn.Config, services: Sequence[Service], shutdown_timeout: float):
        super().__init__(config)
        self.engines = [service.engine for service in services]
        self.shutdown_timeout = shutdown_timeout

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:
            # Nothing is half-written that would have to be put in order, and a step may take long.
            os._exit(128 + sig)
        self.should_exit = True  # before anything is printed: the next signal may come at once
        unanswered = sum(engine.num_running + engine.num_waiting for engine in self.engines)
        if unanswered:
            print(
                f"{unanswered} sequence(s) to finish first; Ctrl-C again ends the server at once; otherwise it "
                f"ends within {self.shutdown_timeout:g} seconds",
                flush=True,
            )

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listener in sockets or []:
            listener.listen(1024)  # connections may wait to be accepted, though only few are accepted at once

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        timer = asyncio.get_running_loop().call_later(self.shutdown_timeout, self._end_connections)
        await super().shutdown(sockets)
        timer.cancel()

    def _end_connections(self) -> None:
        """Close all connections at once; sequences end with the requests that asked for them."""
        for connection in list(self.server_state.connections):
            connection.end()  # type: ignore[union-attr]


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
